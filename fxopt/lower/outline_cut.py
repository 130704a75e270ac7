"""Where to cut a run of repeated layers: where the fewest values cross, and no fusion is lost.

Inductor fuses nothing across the border of a shared body. A value that crosses a border costs nothing if it would be
written to memory anyway: the result of a matmul, or one that is needed again after the next matmul (the residual
stream). It costs a kernel and a round trip if it was made by a pointwise op or a reduction whose reader could have had
it from a register. Both are read off *levels*: the level of a node is the largest number of opaque calls on a path to
it, and only nodes of one level can end up in one kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import val
from fxopt.graph.symbols import hint
from fxopt.lower.outline_labels import is_size, may_alias

aten = torch.ops.aten

#: calls that Inductor makes as they are, so that neither their arguments nor their results stay in registers
_OPAQUE = {
    aten.linear,
    aten.matmul,
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.scaled_dot_product_attention,
    aten.conv1d,
    aten.conv2d,
    aten.conv3d,
    aten.convolution,
    aten.einsum,
    aten.lstm,
    aten.gru,
}


def is_opaque(node: Node) -> bool:
    """Whether the compiler leaves the call as it is."""
    target = node.target
    if target is operator.getitem or not isinstance(target, torch._ops.OpOverload):
        return False
    return target.overloadpacket in _OPAQUE or target.namespace not in ("aten", "prims")


def levels(nodes: Sequence[Node]) -> dict[Node, int]:
    """How many opaque calls lie on the longest path to each node, the node itself not counted."""
    found: dict[Node, int] = {}
    for node in nodes:
        found[node] = max((found[a] + is_opaque(a) for a in node.all_input_nodes if a in found), default=0)
    return found


def best_cut(nodes: Sequence[Node], period: int, at_least: int) -> int:
    """The offset in [0, period) at which to cut the run `nodes`, whose labels repeat after `period`.

    Costs are taken in the middle of the run, where the borders look alike. In order: several results that would cross
    as one (a body returns tensors); too few periods left; bytes of values that would not have been written otherwise;
    periods lost, because the run does not start at a border; bytes that cross.
    """
    whole = len(nodes) // period
    first = max(0, whole // 2 - 1) * period
    sample = nodes[first : first + 3 * period]
    position = {node: i for i, node in enumerate(sample)}
    level = levels(sample)
    last = {node: max((position[u] for u in _readers(node) if u in position), default=-1) for node in sample}

    def cost(offset: int) -> tuple[bool, bool, int, int, int]:
        border = period + offset
        crossing = {_base(node, position) for node in sample[:border] if last[node] >= border}
        lost = sum(_bytes(node) for node in crossing if _fuses_across(node, border, position, level))
        left = (len(nodes) - offset) // period
        tuples = any(not isinstance(val(node), Tensor) for node in crossing)
        return tuples, left < at_least, lost, whole - left, sum(map(_bytes, crossing))

    return min(range(period), key=cost)


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if not is_size(user)]


def _base(node: Node, position: dict[Node, int]) -> Node:
    """What a view looks at, as far as the run goes."""
    while may_alias(node):
        source = next((a for a in node.all_input_nodes if a in position), None)
        if source is None:
            break
        node = source
    return node


def _fuses_across(node: Node, border: int, position: dict[Node, int], level: dict[Node, int]) -> bool:
    """Whether a kernel that makes `node` could also have computed a reader behind the border."""
    if is_opaque(node):
        return False
    work = _readers(node)
    while work:
        reader = work.pop()
        if reader not in position or level[reader] != level[node]:
            continue
        if may_alias(reader):
            work += _readers(reader)
        elif position[reader] >= border and not is_opaque(reader):
            return True
    return False


def _bytes(node: Node) -> int:
    total = 0
    for leaf in tree_leaves(val(node)):
        if isinstance(leaf, Tensor):
            total += int(leaf.element_size() * _product([int(hint(s)) for s in leaf.shape]))
    return total


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
