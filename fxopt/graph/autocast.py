"""Autocast made explicit: `linear(x, w)` under autocast becomes `linear(x.to(bf16), w.to(bf16))` outside of it.

A pre-dispatch trace records an op above the Autocast dispatch key: the result has the cast's dtype, the casts are not
in the graph. So each traced node is marked with the autocast state it ran under, and the graph is traced once more: a
marked op that has a kernel for the Autocast key is entered at that key, and the casts, which the kernel makes through
the dispatcher, are recorded like any op. What results needs no autocast and must run without it.

A composite op with no such kernel of its own (einsum on the CPU) can hold ops that have one. It is decomposed by one
level, its parts are marked, and the graph is traced again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.query import val

#: (device type, dtype) for each device type that autocast is on for
State = tuple[tuple[str, torch.dtype], ...]

#: meta key of a traced node: the autocast state it ran under
UNDER = "fxopt_autocast"

#: meta key of a node that has its casts already: it runs with autocast off
EXPLICIT = "fxopt_explicit"

#: traces until all casts are there: one, and one for each level of composite ops that hide some
MOST_PASSES = 8

_KEYS = {device: f"Autocast{device.upper()}" for device in ("cpu", "cuda", "xpu", "mps", "hpu")}


def state() -> State:
    """The autocast state of this thread."""
    return tuple((device, torch.get_autocast_dtype(device)) for device in _KEYS if _enabled(device))


def _enabled(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device type that this build doesn't know
        return False


@contextlib.contextmanager
def under(wanted: State) -> Iterator[None]:
    """Autocast exactly as `wanted` says, on for no other device type; `()` is off."""
    before = state()
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def _set(wanted: State) -> None:
    # Not torch.autocast: a pre-dispatch trace would record it.
    for device, _ in state():
        torch.set_autocast_enabled(device, False)
    for device, dtype in wanted:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)


def enter(device: str, dtype: torch.dtype | None, enabled: bool, *_: Any) -> State:
    """Enter the region torch.autocast(device, dtype, enabled) of a graph; the state to go back to (with `leave`)."""
    before = state()
    region = torch.autocast(device, dtype=dtype, enabled=enabled)  # it knows what each device allows
    others = tuple(entry for entry in before if entry[0] != device)
    _set((*others, (device, region.fast_dtype)) if region._enabled else others)
    return before


leave = _set


@contextlib.contextmanager
def off() -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Autocast off; gives what makes a function run so wherever it is off here only because of this."""
    on = state()
    with under(()):
        yield _without if on else lambda run: run


def _without(run: Callable[..., Any]) -> Callable[..., Any]:
    def without_autocast(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return run(*args)

    return without_autocast


class Obeying(Interpreter):
    """Runs a graph and obeys its autocast regions, without a trace that is going on recording them."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            return enter(*args)
        if target is torch.amp.autocast_mode._exit_autocast:
            return leave(*args)
        return super().call_function(target, args, kwargs)


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Mark the nodes that the current trace records meanwhile with the autocast state they ran under."""
    mode = get_proxy_mode()
    assert mode is not None
    graph: Graph = mode.tracer.graph
    last = next(iter(reversed(graph.nodes)), None)
    yield
    on = state()
    if on:
        for node in reversed(graph.nodes):
            if node is last:
                break
            node.meta.setdefault(UNDER, on)


def is_marked(module: GraphModule) -> bool:
    """Whether any node of the graph still runs under autocast."""
    return any(UNDER in node.meta for node in module.graph.nodes)


class Explicit:
    """How the nodes of a marked graph are called in the next trace, so that it holds the casts."""

    def __init__(self, module: GraphModule) -> None:
        self._hiding = {n for n in module.graph.nodes if UNDER in n.meta and _hides_casts(n)}

    def call(self, node: Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `target` for `node` in the trace; autocast is off outside."""
        on: State = node.meta.get(UNDER, ())
        cast = _cast(target, on, (args, kwargs))
        if cast is not None:
            device, dtype = cast
            with under(((device, dtype),)):
                return target.redispatch(_only(_KEYS[device]), *args, **kwargs)
        if node in self._hiding:
            with under(on), marking():
                return target.redispatch(_only("CompositeImplicitAutograd"), *args, **kwargs)
        return target(*args, **kwargs)


def _only(key: str) -> torch._C.DispatchKeySet:
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))


def _cast(target: OpOverload, on: State, values: Any) -> tuple[str, torch.dtype] | None:
    """The device type and dtype that autocast casts the arguments of `target` for, or None where it doesn't."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type in dict(on):
            device = leaf.device.type
            return (device, dict(on)[device]) if _has_kernel(target, _KEYS[device]) else None
    return None


def _has_kernel(target: OpOverload, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key)


def _hides_casts(node: Node) -> bool:
    """Whether a composite op with no autocast kernel of its own computes otherwise with autocast on."""
    target = node.target
    if not isinstance(target, OpOverload) or not _has_kernel(target, "CompositeImplicitAutograd"):
        return False
    args, kwargs = tree_map(_value, (node.args, node.kwargs))
    if _cast(target, node.meta[UNDER], (args, kwargs)) is not None:
        return False
    with under(()):
        plain = _Ops.of(target, args, kwargs)
    with under(node.meta[UNDER]):
        return _Ops.of(target, args, kwargs) != plain


def _value(leaf: Any) -> Any:
    """The leaf's fake; in one floating dtype, since without autocast a call may not take several."""
    found = val(leaf)
    if not isinstance(found, Tensor):
        return found
    return found.detach().float() if found.is_floating_point() else found.detach()


class _Ops(TorchDispatchMode):
    """Records the ops that a call comes down to."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, target: OpOverload, args: Any, kwargs: Any) -> list[Any]:
        """The ops, in order."""
        with torch.no_grad(), cls() as seen:
            target(*args, **kwargs)
        return seen.ops
