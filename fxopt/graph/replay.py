"""Calls that come again are copied from the trace, not traced again: a model's layers are nearly all the same calls.

    h1 = silu(h0)   traced: silu = aten.silu(h0)
    h2 = silu(h1)   copied: silu_1 = aten.silu(h1), if h1 looks to an op like h0 did

Tracing one call takes some twenty dispatches in Python. What it records depends on the function, on its arguments that
aren't tensors, and on how its tensors look (shape, strides, dtype, device), as long as all of that is static and
nothing is differentiated. So the recorded nodes are kept with what was called, and a call that is equal in all of it
gets copies of them, with the metadata of the program's node that it stands for. Its result is made without running
anything: fresh memory is fresh, a view is a view of the same argument, and what was an argument is that argument.

Kept are calls of torch's own functions whose nodes are plain ATen calls that write to nothing; all others are traced
each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    set_original_aten_op,
    snapshot_fake,
    track_tensor,
)
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from fxopt.graph import autocast
from fxopt.graph.fakes import fresh, is_plain, look
from fxopt.graph.query import is_mutable, storage

#: functions of these modules record the same for the same arguments
_MODULES = ("torch", "_operator", "math")


@dataclass(frozen=True)
class _Ref:
    """A tensor of a call by its number: its arguments in order, then what its nodes return."""

    index: int


@dataclass(frozen=True)
class _Made:
    """One node that a call recorded, and where its value comes from."""

    target: OpOverload
    name: str
    args: Any  # with a _Ref for each node
    kwargs: Any
    like: FakeTensor
    tensor_meta: Any
    same: int | None  # the number of the argument that it returned as it is
    base: int | None  # the number of the tensor that it is a view of


@dataclass(frozen=True)
class _Recording:
    """What a call added to the trace; `result` is the number of the tensor that it returned."""

    made: tuple[_Made, ...]
    result: int


class Replay:
    """The calls of one trace that can be copied."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[Hashable, _Recording | None] = {}

    def __call__(self, run: Callable[[], Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `run`, which calls `target` in the trace under way, returns; its nodes are in the trace then."""
        with torch._C.DisableTorchFunction():  # a trace's modes want to see every question for a shape
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            mode = get_proxy_mode() if tensors else None
            tracer: Any = mode.tracer if mode is not None else None
            described = _described(target, leaves, tensors, tracer) if tracer is not None else None
            key = described, structure
            known = self._known.get(key)
            if known is not None:
                return _copy(known, tensors, tracer)
            if described is not None and key not in self._known:
                before = [_node(tensor, tracer) for tensor in tensors]
        if described is None or key in self._known:
            return run()
        last = next(iter(reversed(tracer.graph.nodes)), None)
        result = run()
        with torch._C.DisableTorchFunction():
            self._known[key] = _recording(last, before, tensors, result, tracer)
        return result


def _described(target: Any, leaves: Sequence[Any], tensors: Sequence[Tensor], tracer: Any) -> Hashable:
    """All that the nodes of a call depend on, or None where that can't be said."""
    if not _is_known(target) or autocast.state() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    slots: list[Any] = [get_proxy_slot(tensor, tracer, None) for tensor in tensors]
    if any(slot is None or slot.constant is not None for slot in slots):
        return None
    looks = look(leaves)
    return None if looks is None else (target, looks)


def _is_known(target: Any) -> bool:
    if isinstance(target, str):  # a method of a plain fake tensor
        return True
    if isinstance(target, OpOverload):
        return target.namespace == "aten"
    plain = isinstance(target, (FunctionType, BuiltinFunctionType, type(Tensor.add)))
    return plain and (getattr(target, "__module__", None) or "").split(".")[0] in _MODULES


def _node(tensor: Tensor, tracer: Any) -> Node | None:
    """The node of the trace whose value `tensor` is now."""
    slot: Any = get_proxy_slot(tensor, tracer, None)
    node: Node | None = slot.proxy.node if slot is not None else None
    return node


def _recording(
    last: Node | None, before: Sequence[Node | None], tensors: Sequence[Tensor], result: Any, tracer: Any
) -> _Recording | None:
    """What a call recorded behind `last`, in a form to copy; None where a copy might not be the same."""
    new: list[Node] = []
    for node in reversed(tracer.graph.nodes):
        if node is last:
            break
        new.insert(0, node)
    refs: dict[Node, _Ref] = {}
    values: list[Any] = list(tensors)
    for i, (node, tensor) in enumerate(zip(before, tensors, strict=True)):
        if node is None or values[refs.setdefault(node, _Ref(i)).index] is not tensor:
            return None  # one node for two tensors
    # A function can return its argument; from then on that tensor is the new node's value.
    returned = {_node(tensor, tracer): i for i, tensor in reversed(list(enumerate(tensors)))}
    made = []
    for node in new:
        if not _can_be_copied(node) or any(source not in refs for source in node.all_input_nodes):
            return None
        value = node.meta["val"]
        base = next((i for i, other in enumerate(values) if storage(other) == storage(value)), None)
        if base is not None and values[base].dtype != value.dtype:
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: refs[n])  # type: ignore[arg-type, return-value]
        name = tracer.graph._target_to_str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]
        tensor_meta = node.meta.get("tensor_meta")
        made.append(_Made(node.target, name, args, kwargs, value, tensor_meta, returned.get(node), base))  # type: ignore[arg-type]
        refs[node] = _Ref(len(values))
        values.append(value)
    if not isinstance(result, Tensor):
        return None
    for i, tensor in enumerate(tensors):
        if tensor is result:
            return _Recording(tuple(made), i)
    node_of_result = _node(result, tracer)
    if type(result) is not FakeTensor or node_of_result not in new:
        return None
    return _Recording(tuple(made), refs[node_of_result].index)


def _can_be_copied(node: Node) -> bool:
    """Whether the node is a plain call that makes one static tensor and does nothing else."""
    value: Any = node.meta.get("val")
    plain = isinstance(node.target, OpOverload) and node.target.namespace == "aten" and not is_mutable(node)
    static = is_plain(value) and not (value.is_conj() or value.is_neg())
    return plain and static and "unbacked_bindings" not in node.meta


def _copy(recording: _Recording, tensors: Sequence[Tensor], tracer: Any) -> Tensor:
    """Record the nodes of a call once more, for other tensors; the tensor that the call returns."""
    values = list(tensors)
    nodes = [_node(tensor, tracer) for tensor in tensors]
    for made in recording.made:
        args, kwargs = _filled((made.args, made.kwargs), nodes)
        with set_original_aten_op(made.target):
            node = tracer.create_node("call_function", made.target, args, kwargs, made.name)
        value = _value(made, values)
        track_tensor(value, tracer.proxy(node), constant=None, tracer=tracer)
        node.meta["val"] = snapshot_fake(value)
        node.meta["tensor_meta"] = made.tensor_meta
        values.append(value)
        nodes.append(node)
    return values[recording.result]


def _filled(argument: Any, nodes: Sequence[Node | None]) -> Any:
    if isinstance(argument, _Ref):
        return nodes[argument.index]
    if isinstance(argument, (tuple, list)):
        return type(argument)([_filled(part, nodes) for part in argument])
    if isinstance(argument, dict):
        return {name: _filled(part, nodes) for name, part in argument.items()}
    return argument


def _value(made: _Made, values: Sequence[Tensor]) -> Tensor:
    """A tensor in the place of `made.like`, made of the values that there are by now."""
    like = made.like
    if made.same is not None:
        return values[made.same]
    if made.base is not None:
        with disable_proxy_modes_tracing():
            return values[made.base].as_strided(like.shape, like.stride(), like.storage_offset())
    return fresh(like)
