"""Giving a value back the strides that the original had, where somebody downstream can tell.

A faster implementation often lays its result out differently (attention as [B, M, H, D] in memory, say). Most readers
don't care. Graph outputs do: the user's next program may call `.view` on them. So do ops that take strides literally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxopt.graph.query import faking, is_cast, val
from fxopt.graph.scope import storages
from fxopt.graph.symbols import hint, known_equal
from fxopt.rewrite.driver import STANDS_FOR

aten = torch.ops.aten

#: which lack the tag
_ELEMENT_BY_ELEMENT = {aten.clone.default, aten.dropout.default, aten.native_dropout.default, aten.masked_fill_.Scalar}

_LITERAL_STRIDES = {aten.as_strided.default, aten.view.default, aten.view.dtype, aten.view_as_real.default}


def restore_strides(graph: Graph, old: Node, new: Node) -> Node:
    """`new`, or a copy of it with the strides of what `old` stands for, if a reader of `old` depends on strides."""
    wanted, given = old.meta.get(STANDS_FOR, val(old)), val(new)
    if not isinstance(wanted, Tensor) or not isinstance(given, Tensor) or same_strides(wanted, given):
        return new
    if not _strides_matter(old):
        return new
    return with_strides(graph, new, wanted)


def with_strides(graph: Graph, new: Node, wanted: Tensor) -> Node:
    """A copy of `new` with the strides of `wanted`, which must be those of a permuted contiguous tensor."""
    order = sorted(range(wanted.dim()), key=lambda d: (-hint(wanted.stride(d)), d))
    back = [order.index(d) for d in range(wanted.dim())]
    with graph.inserting_before(new.next):
        permuted = _call(graph, new, aten.permute.default, new, order)
        packed = _call(graph, new, aten.clone.default, permuted, memory_format=torch.contiguous_format)
        return _call(graph, new, aten.permute.default, packed, back)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same shape have the same strides in every dimension longer than one."""
    return all(
        known_equal(size, 1) or known_equal(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def _strides_matter(node: Node) -> bool:
    """Whether the value, or what takes its strides from it, is returned or read by an op that takes strides literally.

    A view does, and so does what is computed from the value element by element.
    """
    work, seen = [node], {node}
    while work:
        current = work.pop()
        for user in current.users:
            if user.op == "output" or user.target in _LITERAL_STRIDES or not _is_plain_aten(user):
                return True
            if user not in seen and (_keeps_strides(user) or storages(user) & storages(current)):
                seen.add(user)
                work.append(user)
    return False


def _keeps_strides(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or is_cast(node) or node.target in _ELEMENT_BY_ELEMENT


def _is_plain_aten(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("aten", "fxopt", "prims")


def _call(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    values = [val(a) for a in args]
    with faking(val(args[0]).fake_mode):
        node.meta["val"] = target(*values, **kwargs)
    return node
