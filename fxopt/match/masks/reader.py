"""Reading masks of a graph: `read_mask` is what a fusion calls.

What was lifted is kept for as long as the graph's Scope lives: layers share masks, and mostly also their programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.axes import Move
from fxopt.match.masks import arithmetic, logic, reads, views
from fxopt.match.masks.conditions import TRUE, Eq, Ne
from fxopt.match.masks.forms import Form, coordinate, elements, integer
from fxopt.match.masks.lemmas import with_segments
from fxopt.match.masks.lift import Index, Lifter
from fxopt.match.masks.program import MaskProgram, depends, read_value
from fxopt.match.masks.values import Opaque, Value, atoms, exactly
from fxopt.match.miss import Miss

#: what says how each op is followed
RULES = (views, arithmetic, logic, reads)

NAMES = ("b", "h", "i", "j")

_LIFTERS: WeakKeyDictionary[Scope, Lifter] = WeakKeyDictionary()


def lifter_of(scope: Scope) -> Lifter:
    """The lifter of a graph, with all that it has lifted so far."""
    found = _LIFTERS.get(scope)
    if found is None or any(node._erased for node, _, _ in found.lifted):
        found = _LIFTERS[scope] = Lifter(scope)
    return found


def coordinates_of(lifter: Lifter, sizes: Sequence[Dim]) -> tuple[Form, ...]:
    """The coordinates b, h, i and j of scores [batch, heads, rows, keys]."""
    return tuple(coordinate(name, lifter.size(n)) for name, n in zip(NAMES, sizes, strict=True))


def read_mask(
    node: Node,
    scope: Scope,
    sizes: Sequence[Dim],
    *,
    at: Node | None = None,
    moves: Sequence[Move] = (),
    keep: bool = True,
    hard: float | None = None,
) -> MaskProgram | Miss:
    """The program of the mask `node`, or why nothing is known of it.

    `moves` (as `fxopt.match.axes` makes them) bring the mask to a shape that broadcasts to `sizes`, which are those of
    the scores: batch, heads, rows, keys. A boolean mask is true where a key is live; with `keep` False where it is not.
    A floating mask, which is added to the scores, takes out positions that it gives a value of at most `hard` (None:
    finfo.min of its dtype). `at` is the node that will read the elements which the program depends on: those that are
    written to before it are replaced by what other nodes have kept of them, or the mask is a Miss. Nothing is
    assumed, and no guard is added.
    """
    lifter = lifter_of(scope)
    found = _lifted(lifter, node, sizes, at, moves)
    if isinstance(found, Miss):
        return found
    try:
        return _program(lifter, node, *found, lifter.size(sizes[-1]), keep, hard)
    except Opaque as reason:
        return _unread(node, reason)


def read_values(
    node: Node, scope: Scope, sizes: Sequence[Dim], *, at: Node | None = None, moves: Sequence[Move] = ()
) -> tuple[Value, tuple[Form, ...]] | Miss:
    """What a tensor holds at the coordinates of the scores (b, h, i, j), and these; or why that is not known.

    The arguments are those of `read_mask`. The value may be any element of the tensor itself: nothing more is known
    then.
    """
    return _lifted(lifter_of(scope), node, sizes, at, moves)


def _lifted(
    lifter: Lifter, node: Node, sizes: Sequence[Dim], at: Node | None, moves: Sequence[Move]
) -> tuple[Value, tuple[Form, ...]] | Miss:
    value = val(node)
    if not isinstance(value, Tensor) or value.dtype.is_complex:
        return Miss(f"the mask {node.name} is no real tensor", node)
    if lifter.epoch(node, at) != lifter.epoch(node, node):
        return Miss(f"the mask {node.name} is written to after it is made", node)
    try:
        coordinates = coordinates_of(lifter, sizes)
        index = _index(lifter, value.shape, moves, sizes, coordinates)
        lifted = lifter.value(node, index, at)
        fresh = lifter.refreshed(lifted, at, elements(atoms(lifted)))
    except Opaque as reason:
        return _unread(node, reason)
    if fresh is not None:
        return fresh, coordinates
    old = lifter.stale(elements(atoms(lifted)), at)[0].node
    return Miss(f"{old.name}, which the mask {node.name} is made from, is written to before it is used", old)


def _unread(node: Node, reason: Opaque) -> Miss:
    return Miss(f"the mask {node.name} can't be read: {reason}", node)


def _program(
    lifter: Lifter, node: Node, value: Value, coordinates: Index, keys: Form, keep: bool, hard: float | None
) -> MaskProgram | Miss:
    program = read_value(node, value, coordinates, keys, keep=keep, hard=hard)
    if program.segments:
        live, ordered = with_segments(lifter, program.live)
        if live is not program.live or ordered:
            program = program.with_live(live, ordered)
    unknown = _unknown(program, coordinates)
    if unknown is not None:
        return Miss(f"nothing is known of the elements of {node.name}: {unknown}", node)
    return program


def _unknown(program: MaskProgram, coordinates: Index) -> str | None:
    """Why there is no more to a program than the mask itself, in words; None if there is."""
    if program.live is TRUE:
        if program.bias is not None and {"i", "j"} <= program.bias_depends:
            return "it is added as it is"
        return None
    live = program.live
    if isinstance(live, (Eq, Ne)) and len(live.form.terms) == 1:
        flags = exactly(live.form)
        if {"i", "j"} <= depends(flags, coordinates):
            return "it is read as it is"
    return None


def _index(
    lifter: Lifter, shape: Sequence[Any], moves: Sequence[Move], sizes: Sequence[Dim], coordinates: Index
) -> Index:
    """The index into the mask for the coordinates of the scores, back through the moves."""
    shapes: list[Sequence[Any]] = [shape]
    for kind, numbers in moves:
        shapes.append([shapes[-1][d] for d in numbers] if kind == "permute" else numbers)
    if len(shapes[-1]) > len(sizes):
        raise Opaque(f"it has {len(shapes[-1])} dimensions")
    index = lifter.into(shapes[-1], sizes, coordinates)
    for (kind, numbers), before, after in reversed(list(zip(moves, shapes[:-1], shapes[1:], strict=True))):
        if kind == "permute":
            own = [integer(0)] * len(before)
            for i, d in enumerate(numbers):
                own[d] = index[i]
            index = tuple(own)
        elif kind == "expand":
            index = lifter.into(before, after, index)
        else:
            index = views.reshaped(lifter, index, after, before)
    return index


def addends(node: Node) -> tuple[Node, ...]:
    """The tensors that a floating mask is the sum of, for reading each alone: a position bias and a mask, say.

    Only sums that keep the dtype are taken apart. Rounding may differ from adding them to each other first.
    """
    given = arguments(node) if node.target is aten.add.Tensor else {}
    parts = [given.get("self"), given.get("other")]
    if not given or not known_equal(given["alpha"], 1) or not val(node).is_floating_point():
        return (node,)
    if not all(isinstance(p, Node) and isinstance(val(p), Tensor) and val(p).dtype == val(node).dtype for p in parts):
        return (node,)
    return tuple(part for p in parts if isinstance(p, Node) for part in addends(p))
