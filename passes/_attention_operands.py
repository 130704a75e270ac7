"""Bringing q, k, v and the masks into the coordinates of the fused op: [batch, heads, rows or keys, width].

How a model laid its operands out is not matched: the index map of the chain of layout ops between an operand of the
matmul and each earlier value is computed, and the value is used from which the op's layout is reached in the fewest
moves. Heads that the chain repeats in place (h // g, as in grouped-query attention) are left unrepeated; heads that it
repeats in another order are not those of grouped-query attention, and the repeated value itself is passed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxopt.graph.query import aten, is_widening_cast, val
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.axes import (
    Axis,
    Group,
    Layout,
    Move,
    expand,
    extent,
    identity,
    is_layout,
    moves,
    product,
    quotient,
    reshape,
    simplify,
    through,
)
from fxopt.match.match import Match
from fxopt.match.region import back, private, size_source
from fxopt.passes._attention_program import Scale
from fxopt.passes._attention_scores import scaling

#: layout ops between an operand and its base that are looked through
MAX_CHAIN = 16


@dataclass(frozen=True)
class Frame:
    """The coordinates: the matmul's own leading dimensions and the batch and heads that they are read as."""

    lead: tuple[Dim, ...]
    batch: Dim
    heads: Dim


@dataclass(frozen=True)
class Operand:
    """q, k or v as the fused op takes it: `moves` applied to `base`, and the scales met on the way.

    `covered` are the nodes between base and matmul that nothing else uses; `heads` counts unrepeated heads.
    """

    base: Node
    moves: tuple[Move, ...]
    heads: Dim
    scales: tuple[Scale, ...] = ()
    covered: tuple[Node, ...] = ()


def place(
    end: Node,
    frame: Frame,
    region: Collection[Node],
    *,
    transposed: bool = False,
    grouped: bool = False,
    scaled: bool = False,
    casts: bool = False,
    bare: bool = False,
) -> Operand | None:
    """The operand that reaches the matmul as `end`, in coordinates [batch, heads, rows, width]; None if it can't be.

    transposed: `end` is [..., width, rows]. grouped: repeated heads may stay unrepeated. scaled: multiplications by
    numbers may be taken off. casts: so may casts to a wider dtype. bare: nothing may be, `end` itself is the base.
    """

    def through_chain(node: Node) -> bool:
        if is_layout(node):
            return True
        return (scaled and scaling(node) is not None) or (casts and is_widening_cast(node))

    chain = list(back(end, through_chain))[:MAX_CHAIN]
    usable = 0 if bare else len(private(chain, region))  # a base may be shared, what lies after it may not
    best: tuple[tuple[int, int], Operand] | None = None
    for i, base in enumerate(chain[: usable + 1]):
        covered = tuple(chain[:i])
        layout = _follow(base, covered, frame, transposed)
        if layout is None:
            continue
        heads = frame.heads
        repeats = 0
        if grouped:
            layout, heads, repeats = _ungroup(layout, frame.heads)
        steps = moves(val(base).shape, layout)
        if steps is None:
            continue
        # Fewest repeated heads, then fewest moves (a late expand is free), then the earliest value.
        cost = (-repeats, sum(kind != "expand" for kind, _ in steps))
        scales = tuple(s for s in map(scaling, reversed(covered)) if scaled and s is not None)
        if best is None or cost <= best[0]:
            best = cost, Operand(base, tuple(steps), heads, scales, covered)
    return best[1] if best is not None else None


def place_term(shape: Sequence[Dim], layout: Layout, sizes: Sequence[Dim]) -> tuple[Move, ...] | None:
    """The moves that bring a mask, broadcast to scores laid out as `layout`, to [batch, heads, rows, keys].

    `shape` is the mask's, `sizes` are the four coordinates'. Dimensions that the mask repeats stay of size 1.
    """
    if len(layout) == len(sizes) and all(
        len(g) <= 1 and all(a.dim == d and a.stride == 1 for a in g) for d, g in enumerate(layout)
    ):
        return ()
    missing = len(layout) - len(shape)
    if missing < 0:
        return None
    wanted: list[list[tuple[Dim, Axis]]] = [[] for _ in sizes]
    for i, group in enumerate(layout):
        whole = i >= missing and not known_equal(shape[i - missing], 1)
        if whole and not known_equal(shape[i - missing], extent(group)):
            return None
        inner: Dim = 1
        for axis in reversed(group):
            if axis.dim is None:
                return None
            piece = Axis(axis.size, i - missing, inner) if whole else Axis(axis.size, None)
            wanted[axis.dim].append((axis.stride, piece))
            inner = inner * axis.size
    result: list[Group] = []
    for pieces in wanted:
        ordered = _by_stride(pieces)
        if ordered is None:
            return None
        group = simplify(ordered)
        result.append(() if all(axis.dim is None for axis in group) else group)
    found = moves(shape, tuple(result))
    return tuple(found) if found is not None else None


def emit(match: Match, node: Node, steps: Sequence[Move], sources: Sequence[Node]) -> Node:
    """Insert the layout ops; symbolic sizes are read off `sources`, which must be bound in the match."""
    for kind, numbers in steps:
        shape = val(node).shape
        if kind == "permute":
            swapped = [i for i, d in enumerate(numbers) if i != d]
            if len(swapped) == 2:
                node = match.call(aten.transpose.int, node, *swapped)
            else:
                node = match.call(aten.permute.default, node, list(numbers))
        elif kind == "expand":
            node = match.call(aten.expand.default, node, _spell(match, numbers, sources, spare=False))
        elif (dims := _inserted_ones(shape, numbers)) is not None:
            for d in dims:
                node = match.call(aten.unsqueeze.default, node, d)
        else:
            node = match.call(aten.reshape.default, node, _spell(match, numbers, sources, spare=True))
    return node


def spellable(steps: Sequence[Move], sources: Sequence[Node]) -> bool:
    """Whether every symbolic size in `steps` can be read off one of `sources` (a reshape may leave one open)."""
    for kind, numbers in steps:
        if kind == "permute":
            continue
        unknown = [n for n in numbers if not isinstance(n, int) and size_source(n, sources) is None]
        if len(unknown) > (kind == "reshape"):
            return False
    return True


def _spell(match: Match, sizes: Sequence[Dim], sources: Sequence[Node], *, spare: bool) -> list[Any]:
    result: list[Any] = []
    for n in sizes:
        found = None if isinstance(n, int) else size_source(n, sources)
        if isinstance(n, int):
            result.append(n)
        elif found is not None:
            result.append(match.call(aten.sym_size.int, *found))
        elif spare and -1 not in result:
            result.append(-1)
        else:
            raise ValueError(f"no tensor of the match has the size {n}")
    return result


def _inserted_ones(shape: Sequence[Dim], sizes: Sequence[Dim]) -> list[int] | None:
    """Where ones must be inserted in `shape` to make it `sizes`, or None if that is not all."""
    rest, result = list(shape), []
    for d, n in enumerate(sizes):
        if rest and known_equal(rest[0], n):
            rest.pop(0)
        elif known_equal(n, 1):
            result.append(d)
        else:
            return None
    return result if not rest else None


def _follow(base: Node, covered: Sequence[Node], frame: Frame, transposed: bool) -> Layout | None:
    """The layout of the operand over `base`, in coordinates [batch, heads, rows, width]."""
    layout: Layout = identity(val(base).shape)
    for node in reversed(covered):
        after = through(node, layout) if is_layout(node) else layout
        if after is None:
            return None
        layout = after
    if len(layout) < 2:
        return None
    full = expand(layout[:-2], frame.lead)
    lead = reshape(full, (frame.batch, frame.heads)) if full is not None else None
    if lead is None:
        return None
    rows, width = (layout[-1], layout[-2]) if transposed else (layout[-2], layout[-1])
    return (*lead, rows, width)


def _ungroup(layout: Layout, heads: Dim) -> tuple[Layout, Dim, int]:
    """The layout without the repetition of each head in place, the heads left, and 1 if there was any."""
    group = simplify(layout[1])
    if not group or group[-1].dim is not None:
        return layout, heads, 0
    left = quotient(heads, group[-1].size)
    if left is None:
        return layout, heads, 0
    return (layout[0], group[:-1], *layout[2:]), left, 1


def _by_stride(pieces: list[tuple[Dim, Axis]]) -> list[Axis] | None:
    """The pieces of one coordinate, outermost (largest stride) first."""
    result: list[Axis] = []
    rest, covered = list(pieces), 1
    while rest:
        found = next((p for p in rest if known_equal(p[0], covered)), None)
        if found is None:
            return None
        rest.remove(found)
        result.insert(0, found[1])
        covered = product((covered, found[1].size))  # type: ignore[assignment]
    return result
