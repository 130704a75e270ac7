"""Index maps of layout ops, as algebra: which element of the base does each element of a view show?

A value that is only a re-layout of a base is described by writing each of its dimensions as a product of *axes*,
outermost first. An axis of `size` n walks n steps of `stride` s along dimension d of the base; an axis with no
dimension repeats the same elements n times. For a base [B, H, N, D]:

    transpose(1, 2)                            [B:0] [N:2] [H:1] [D:3]
    reshape(B, H, N * D)                       [B:0] [H:1] [N:2 D:3]
    unsqueeze(2).expand(g), flatten(1, 2)      [B:0] [H:1 g:repeat] [N:2] [D:3]     repeat_interleave: GQA
    repeat(1, g, 1, 1)                         [B:0] [g:repeat H:1] [N:2] [D:3]     another order of heads

Every question about a chain of layout ops (is this a transpose, are heads repeated and in which order) is then a
comparison of lists. Sizes may be symbolic: nothing is evaluated and nothing is specialised, so a chain costs the same
whatever the tensor's size. The representation is the "layout" of CuTe (sizes and strides of nested modes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import COPIES, arguments, aten, is_cast, is_reshape, permutation, val
from fxopt.graph.symbols import Dim, known_equal, known_true, same_shape


@dataclass(frozen=True)
class Axis:
    """`size` steps of `stride` along dimension `dim` of the base; `dim` None repeats the same elements."""

    size: Dim
    dim: int | None
    stride: Dim = 1


Group = tuple[Axis, ...]
Layout = tuple[Group, ...]

_EXPANDS = frozenset({aten.expand.default, aten.expand_as.default, aten.broadcast_to.default})
_REPEATS = frozenset({aten.repeat.default, aten.repeat_interleave.self_int})


def is_layout(node: Any) -> bool:
    """Whether `node` only rearranges its first argument (reshape, permute, expand, repeat, copy)."""
    if not isinstance(node, Node) or node.op != "call_function" or not isinstance(val(node), Tensor):
        return False
    known = node.target in _EXPANDS or node.target in _REPEATS or node.target in COPIES
    return known or is_reshape(node) or permutation(node) is not None


def identity(shape: Iterable[Dim]) -> Layout:
    """The layout of a base of this shape."""
    return tuple(() if known_equal(n, 1) else (Axis(n, d),) for d, n in enumerate(shape))


def through(node: Node, layout: Layout) -> Layout | None:
    """The layout after `node` (a layout op or cast), given that of its first argument; None where it isn't known."""
    value = val(node)
    if node.target in COPIES or is_cast(node):
        return layout
    order = permutation(node)
    if order is not None:
        return tuple(layout[d] for d in order)
    if is_reshape(node):
        return reshape(layout, value.shape)
    if node.target in _EXPANDS:
        return expand(layout, value.shape)
    if node.target is aten.repeat.default:
        times = list(node.args[1])  # type: ignore[arg-type]
        padded = ((),) * (len(times) - len(layout)) + layout
        return tuple(_times(val(n)) + group for n, group in zip(times, padded, strict=True))
    if node.target is aten.repeat_interleave.self_int:
        given = arguments(node)
        if given["dim"] is None:
            return None
        d = given["dim"] % len(layout)
        return (*layout[:d], layout[d] + _times(val(given["repeats"])), *layout[d + 1 :])
    return None


def expand(layout: Layout, shape: Sequence[Dim]) -> Layout | None:
    """The layout broadcast to `shape`, by the rules of broadcasting."""
    if len(shape) < len(layout):
        return None
    result: list[Group] = []
    for group, n in zip(((),) * (len(shape) - len(layout)) + layout, shape, strict=True):
        if known_equal(extent(group), n):
            result.append(group)
        elif known_equal(extent(group), 1):
            result.append(_times(n))
        else:
            return None
    return tuple(result)


def reshape(layout: Layout, shape: Iterable[Dim]) -> Layout | None:
    """The layout of the same elements in the same order under another shape, or None where that isn't certain."""
    rest = [axis for group in layout for axis in group]
    result: list[Group] = []
    for n in shape:
        group: list[Axis] = []
        while not known_equal(n, 1):
            if not rest:
                return None
            axis = rest.pop(0)
            inner, outer = quotient(axis.size, n), quotient(n, axis.size)
            if outer is not None:  # the whole axis goes in
                group.append(axis)
                n = outer
            elif inner is not None:  # only its outer part
                group.append(Axis(n, axis.dim, axis.stride * inner if axis.dim is not None else 1))
                rest.insert(0, Axis(inner, axis.dim, axis.stride))
                n = 1
            else:
                return None
        result.append(simplify(group))
    return tuple(result) if not rest else None


def simplify(group: Iterable[Axis]) -> Group:
    """The same group with neighbours joined that walk one dimension without a gap."""
    result: list[Axis] = []
    for axis in group:
        last = result[-1] if result else None
        if known_equal(axis.size, 1):
            continue
        if (
            last is not None
            and last.dim == axis.dim
            and (axis.dim is None or known_equal(last.stride, axis.stride * axis.size))
        ):
            result[-1] = Axis(last.size * axis.size, axis.dim, axis.stride)
        else:
            result.append(axis)
    return tuple(result)


def same_layout(a: Layout, b: Layout) -> bool:
    """Whether two layouts over one base are known to be equal."""
    return len(a) == len(b) and all(same_group(x, y) for x, y in zip(a, b, strict=True))


def same_group(a: Iterable[Axis], b: Iterable[Axis]) -> bool:
    """Whether two groups are known to be equal."""
    one, two = simplify(a), simplify(b)
    return len(one) == len(two) and all(
        x.dim == y.dim and known_equal(x.size, y.size) and known_equal(x.stride, y.stride)
        for x, y in zip(one, two, strict=True)
    )


def extent(group: Iterable[Axis]) -> Dim:
    """The size of a dimension."""
    return product(axis.size for axis in group)


def product(sizes: Iterable[Dim]) -> Dim:
    """The product of sizes, symbolic ones included."""
    result: Dim = 1
    for n in sizes:
        result = result * n
    return result


def quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b where b is known to divide a, or None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b > 0 and a % b == 0 else None
    if known_equal(a, b):
        return 1
    if not known_true(b > 0):
        return None
    q = a // b
    return q if known_equal(q * b, a) else None


def is_identity(layout: Layout, shape: Sequence[Dim]) -> bool:
    """Whether the layout shows a base of this shape unchanged."""
    return same_layout(layout, identity(shape)) and same_shape([extent(g) for g in layout], shape)


def _times(n: Dim) -> Group:
    return () if known_equal(n, 1) else (Axis(n, None),)


#: one layout op to run: ("reshape" | "permute" | "expand", its sizes or order)
Move = tuple[str, tuple[Any, ...]]


def moves(shape: Sequence[Dim], layout: Layout) -> list[Move] | None:
    """The fewest layout ops that bring a base of this shape into `layout`; None if it drops elements of the base.

    A dimension that is all repeats becomes size 1 and is expanded at the end, so it stays a view.
    """
    parts = [_parts(d, n, layout) for d, n in enumerate(shape)]
    if any(part is None for part in parts):
        return None
    stored = [axis for part in parts for axis in part or ()]
    wanted = [axis for group in layout for axis in group if axis.dim is not None]
    if len(stored) != len(wanted):
        return None
    order = [next((i for i, axis in enumerate(stored) if axis is w), -1) for w in wanted]
    result: list[Move] = []
    at: list[Dim] = list(shape)

    def reshape_to(sizes: list[Dim]) -> None:
        nonlocal at
        if not same_shape(at, sizes):
            result.append(("reshape", tuple(sizes)))
            at = sizes

    def expand_to(sizes: list[Dim]) -> None:
        nonlocal at
        if not same_shape(at, sizes):
            result.append(("expand", tuple(sizes)))
            at = sizes

    mixed = any(len(g) > 1 and any(a.dim is None for a in g) for g in layout)
    if order != list(range(len(order))):
        full = None if mixed else _plain_permutation(shape, layout)
        if full is not None:
            result.append(("permute", full))
            at = [shape[d] for d in full]
        else:
            reshape_to([axis.size for axis in stored])
            result.append(("permute", tuple(order)))
            at = [axis.size for axis in wanted]
    if mixed:
        flat = [axis for group in layout for axis in group]
        reshape_to([1 if axis.dim is None else axis.size for axis in flat])
        expand_to([axis.size for axis in flat])
        reshape_to([extent(group) for group in layout])
    else:
        reshape_to([extent(a for a in group if a.dim is not None) for group in layout])
        expand_to([extent(group) for group in layout])
    return result


def _parts(d: int, n: Dim, layout: Layout) -> list[Axis] | None:
    """The axes that walk dimension d of the base, outermost first, or None if they don't cover it exactly."""
    rest = [axis for group in layout for axis in group if axis.dim == d]
    covered: Dim = 1
    result: list[Axis] = []
    while rest:
        axis = next((a for a in rest if known_equal(a.stride, covered)), None)
        if axis is None:
            return None
        rest = [a for a in rest if a is not axis]
        result.insert(0, axis)
        covered = covered * axis.size
    return result if known_equal(covered, n) else None


def _plain_permutation(shape: Sequence[Dim], layout: Layout) -> tuple[int, ...] | None:
    """The layout as one permutation of the base's dimensions (those of size 1 fill the gaps), or None."""
    if len(shape) != len(layout) or any(len(group) > 1 for group in layout):
        return None
    ones = [d for d, n in enumerate(shape) if known_equal(n, 1)]
    result: list[int] = []
    for group in layout:
        if group and group[0].dim is not None:
            if not known_equal(group[0].size, shape[group[0].dim]):
                return None
            result.append(group[0].dim)
        elif ones:
            result.append(ones.pop(0))
        else:
            return None
    return tuple(result)
