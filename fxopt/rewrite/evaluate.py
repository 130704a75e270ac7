"""Running cut-out functions on real tensors, in float64 or in their own dtypes, apart from whatever is being compiled.

Promotion to float64 is a dispatch mode: any op that is told to make a floating dtype makes float64 instead, in the
original nodes and inside the references of fused ops alike. With the rounding steps gone two ways to write the same
mathematics agree to about 1e-12, and everything else is a difference in the algebra.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from fxopt.graph.query import aten, val
from fxopt.graph.symbols import is_static
from fxopt.ops import Implementation, Target, find_op
from fxopt.rewrite.standin import Sizes

CPU = torch.device("cpu")

#: dtypes that promotion replaces; narrower ones are storage formats whose rounding is part of the mathematics
_PROMOTED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class ShapeMismatch(Exception):
    """A value has another shape at stand-in sizes than the original's shape, mapped: the sizes don't fit together."""


class Objection(Exception):
    """The implementation that would run refuses the stand-in sizes; the message is its objection."""


class Promote(TorchDispatchMode):
    """Every op that is told to make a floating dtype makes float64 (complex: complex128) instead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_promoted, (args, kwargs or {}))
        op = find_op(func)
        if op is not None:
            return op.reference(*op.bind(*args, **kwargs))
        return func(*args, **kwargs)


def _promoted(argument: Any) -> Any:
    return _PROMOTED.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def promote(value: Any) -> Any:
    """A tensor's values in float64; integers, bools and storage formats keep their dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype=_PROMOTED.get(value.dtype, value.dtype))


#: on 16 cores (H200 machine) 16 threads took 3.0 s over what 2 did in 0.6 s: the tensors are small
THREADS = 2


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def isolated(device: torch.device = CPU, default_dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Run eager code as if nothing were being compiled: no modes, no gradients, no autocast, RNG put back after."""
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    before = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())  # a default device is a torch function mode
        stack.enter_context(torch._guards.tracing(None))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_few_threads())
        # What is differentiated here is not for the user's hooks: checkpointing counts what they see.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(default_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def run_promoted(
    nodes: Iterable[Node],
    values: dict[Node, Any],
    sizes: Sizes,
    *,
    check: bool,
    chosen: Mapping[Node, Implementation] | None = None,
    device: torch.device = CPU,
) -> dict[Node, Any]:
    """Values of `nodes` in float64 on `device`; `values` are those of the inputs, already promoted.

    With `check`, raises ShapeMismatch where a shape isn't the original's at the stand-in sizes. Fused ops are computed
    by their references, or by their implementations in `chosen`.
    """

    def call(node: Node, args: Any, kwargs: Any) -> Any:
        implementation = chosen.get(node) if chosen else None
        op = find_op(node.target)
        if implementation is None or op is None:
            return _reference(node, args, kwargs)
        return implementation.run(*op.bind(*args, **kwargs))

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promote():
            return _run(nodes, values, sizes, device, call, check=check)
    finally:
        torch.set_default_dtype(before)


def run_native(
    nodes: Iterable[Node],
    values: dict[Node, Any],
    sizes: Sizes,
    device: torch.device,
    chosen: dict[Node, Implementation],
    target: Target,
) -> dict[Node, Any]:
    """Values of `nodes` in their own dtypes on `device`, fused ops computed by their `chosen` implementations.

    Raises Objection where an implementation doesn't take the stand-in sizes.
    """

    def call(node: Node, args: Any, kwargs: Any) -> Any:
        implementation = chosen.get(node)
        if implementation is None:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        op = find_op(node.target)
        assert op is not None
        bound = op.bind(*args, **kwargs)
        objection = implementation.objection(target, *bound)
        if objection is not None:
            raise Objection(f"{op.name} ({implementation.name}): {objection}")
        return _unwritten(op.name, implementation.run, bound)

    return _run(nodes, values, sizes, device, call, check=False)


def _unwritten(name: str, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """run(*args), where the arguments stay what they are. Raises ValueError where one is written to."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.layout == torch.strided]
    before = [a.clone() for a in tensors]
    result = run(*args)
    for old, new in zip(before, tensors, strict=True):
        same = torch.equal(old, new) or torch.allclose(old, new, rtol=0, atol=0, equal_nan=True)
        if not same:
            raise ValueError(f"{name} writes to one of its arguments, which its schema does not say")
    return result


def _reference(node: Node, args: Any, kwargs: Any) -> Any:
    op = find_op(node.target)
    if op is not None:
        return _unwritten(op.name, op.reference, op.bind(*args, **kwargs))
    if node.target is aten.rms_norm.default and (len(args) < 4 or args[3] is None) and kwargs.get("eps") is None:
        # The default eps is that of the dtype it computes in (at least float32), and this is another one now.
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        wide = val(node.args[0]).dtype == torch.float64
        return node.target(args[0], args[1], weight, torch.finfo(torch.float64 if wide else torch.float32).eps)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _run(
    nodes: Iterable[Node],
    values: dict[Node, Any],
    sizes: Sizes,
    device: torch.device,
    call: Callable[[Node, Any, Any], Any],
    *,
    check: bool,
) -> dict[Node, Any]:
    values = dict(values)
    for node in nodes:
        args, kwargs = sizes.arguments(node, values, device)
        if node.target is aten.scaled_dot_product_attention.default and kwargs.get("scale") is None:
            # The default scale is that of the real width, wherever the other side has it as a number.
            kwargs = kwargs | {"scale": _default_scale(val(node.args[0]), sizes)}
        values[node] = call(node, args, kwargs)
        if check:
            _check_shape(node, val(node), values[node], sizes)
    return values


def _default_scale(query: Tensor, sizes: Sizes) -> float:
    width = query.shape[-1]
    return float((width if is_static(width) else sizes.size(width)) ** -0.5)


def _check_shape(node: Node, expected: Any, found: Any, sizes: Sizes) -> None:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        wanted = sizes.shape(expected)
        if tuple(found.shape) != wanted:
            raise ShapeMismatch(f"{node.name} has shape {tuple(found.shape)}, not {wanted}")
    elif isinstance(expected, (tuple, list)) and isinstance(found, (tuple, list)):
        if len(expected) != len(found):
            raise ShapeMismatch(f"{node.name} has {len(found)} results, not {len(expected)}")
        for a, b in zip(expected, found, strict=True):
            _check_shape(node, a, b, sizes)
    elif isinstance(expected, (int, torch.SymInt)) and not isinstance(expected, bool):
        wanted_size = sizes.size(expected)
        if found != wanted_size:
            raise ShapeMismatch(f"{node.name} is {found}, not {wanted_size}")
