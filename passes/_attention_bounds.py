"""Masks that are read: what a mask's program says in bounds on each row's keys, and what of it must stay a mask.

    j <= i                                is_causal
    lower(i) <= j <= upper(i)             first, last: one number a row (windows, chunks, offsets, lengths of caches)
    segment(i) = segment(j), sorted       first and last of the segment's keys, by bisection
    f(i) = f(j), in any order             first and last key of that number, and whether all between have it: if not,
                                          first is -1, and the kernel compares the numbers themselves
    anything else                         a boolean mask, in as few dimensions as it depends on
    a bias by distance, or by key         a slope, a table, or a vector (`_attention_bias`)

A mask that adds 0 or a hard value is as good as the boolean mask of what it leaves live, unless a row may have no live
key: then -inf and a finite number differ, and a finite one is only told apart from others' where it is the only mask
("uniform" empty rows), beside biases of moderate size. Where gradients flow an added finite number passes them on, so
rows must be proved live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxopt.graph.query import SHARED, aten, val, widens
from fxopt.graph.scope import Scope, needs_gradient
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.masks import MaskProgram, Segment, read_mask
from fxopt.match.masks.bounds import limits
from fxopt.match.masks.conditions import TRUE, Condition, all_of, condition_atoms, conjuncts
from fxopt.match.masks.forms import Coordinate, Form, elements, largest, smallest
from fxopt.match.masks.program import rows_are_live
from fxopt.match.masks.values import atoms as value_atoms
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._attention_bias import Bias, apart, is_bias, make_bias, read_bias, split
from fxopt.passes._attention_insert import Inserter
from fxopt.passes._attention_mask import Placed
from fxopt.passes._attention_plan import Plan
from fxopt.passes._attention_program import ABSORBING, KEYS, ROWS, Add, Cast, Fill


@dataclass(frozen=True)
class Bounds:
    """What masks say of the keys of each row: `lower` <= j <= `upper`, sorted segments, and `rest`.

    `plan` is the site's plan without these masks, `empty_rows` what rows without a live key give then; `read` are the
    masks that are not needed any more.
    """

    plan: Plan
    coordinates: tuple[Form, ...]
    sizes: tuple[Dim, ...]
    lower: Form | None
    upper: Form | None
    segments: tuple[Segment, ...]
    rest: Condition
    empty_rows: str
    read: tuple[Node, ...]
    before: tuple[Placed, ...] = ()  # steps that are a bias by key
    biases: tuple[Bias, ...] = ()
    scattered: Segment | None = None  # segments whose keys may lie anywhere

    @property
    def leaves(self) -> list[Node]:
        """The tensors whose elements are needed."""
        atoms = set(condition_atoms(self.rest))
        for form in self._forms():
            atoms |= form.atoms
        for bias in self.biases:
            atoms |= frozenset() if bias.own else value_atoms(bias.slope or bias.value)
        read = dict.fromkeys(read.node for read in elements(atoms))
        again = self.numbered
        return list(dict.fromkeys(n for node in read for n in (node.all_input_nodes if node in again else [node])))

    @property
    def moderate(self) -> frozenset[Node]:
        """The biases of moderate size."""
        steps = [*self.before, *(bias.step for bias in self.biases if bias.moderate)]
        return frozenset(step.tensor for step in steps if step.tensor is not None)

    @property
    def numbered(self) -> list[Node]:
        """The sums that number the segments. They are made again, so that verification sees that they never fall."""
        atoms = {atom for segment in self.segments for form in (segment.rows, segment.keys) for atom in form.atoms}
        return list(dict.fromkeys(read.node for read in elements(atoms) if read.node.target is aten.cumsum.default))

    def _forms(self) -> Iterator[Form]:
        yield from (form for form in (self.lower, self.upper) if form is not None)
        for segment in (*self.segments, *([self.scattered] if self.scattered is not None else [])):
            yield from (segment.rows, segment.keys)

    def make(self, match: Match, sources: Sequence[Node]) -> tuple[Node | None, Node | None, Node | None, Node | None]:
        """Insert (first, last, mask, bias). Raises Opaque where a part can't be spelled out.

        The mask may be numbers of segments, as the op takes them.
        """
        maker = _Maker(self, match, [*sources, *self.leaves])
        rest = None if self.rest is TRUE else maker.insert(self.rest)
        first, last = (None if form is None else maker.row(form) for form in (self.lower, self.upper))
        for segment in self.segments:
            start, end = maker.segment(segment)
            first = start if first is None else match.call(aten.maximum.default, first, start)
            last = end if last is None else match.call(aten.minimum.default, last, end)
        if self.scattered is not None:
            first, end, rest = maker.scattered(self.scattered)
            last = end if last is None else match.call(aten.minimum.default, last, end)
        bias = make_bias(
            match,
            self.before,
            self.biases,
            self.coordinates,
            sources,
            maker.insert,
            lambda d: maker.size(self.sizes[d]),
        )
        return first, last, rest, bias


@dataclass(frozen=True)
class _Read:
    """A mask that was read: where it isn't live it holds numbers, infinite or not."""

    step: Placed
    program: MaskProgram
    infinite: bool
    bias: Bias | None = None

    @property
    def moderate(self) -> bool:
        """Whether what it leaves live stays live, and what other masks take out stays out."""
        return self.bias is None or self.bias.moderate

    @property
    def only_bias(self) -> bool:
        """Whether it takes nothing out."""
        return self.bias is not None and self.program.live is TRUE


def read_bounds(
    arranged: Plan,
    scope: Scope,
    sizes: Sequence[Dim],
    at: Node,
    empty_rows: str,
    *,
    everywhere: bool,
    tables: bool = False,
    slopes: bool = False,
    scattered: bool = False,
    learned: bool = True,
) -> Bounds | None:
    """The bounds that the plan's masks amount to, or None where they say no more than the masks themselves.

    `at` is the node before which they will be computed. Unless `everywhere`, only causality and masks that take nothing
    out are looked for: what needs neither first nor last. With `tables` biases are read too, unless gradients flow to
    them and they may not be `learned`; with `slopes` those that are a slope times the distance, if none flow to them.
    With `scattered` segments in any order are numbers, not a mask.
    """
    if torch.is_grad_enabled() and any(s.tensor is not None and needs_gradient(s.tensor) for s in arranged.mask):
        tables, slopes = tables and learned, False
    wanted = _Wanted(everywhere, tables, slopes, scattered)
    if (tables or slopes) and (parts := apart(arranged.mask, sizes)) != arranged.mask:
        found = _read_bounds(replace(arranged, mask=parts), scope, sizes, at, empty_rows, wanted)
        if found is not None and not found.plan.mask:
            return found
    return _read_bounds(arranged, scope, sizes, at, empty_rows, wanted)


@dataclass(frozen=True)
class _Wanted:
    """What is looked for: bounds of rows, biases by distance or key, slopes, segments in any order."""

    everywhere: bool
    tables: bool
    slopes: bool
    scattered: bool


def _read_bounds(
    arranged: Plan, scope: Scope, sizes: Sequence[Dim], at: Node, empty_rows: str, wanted: _Wanted
) -> Bounds | None:
    before, steps = split(arranged.mask)
    masks = [step for step in steps if isinstance(step.instruction, (Add, Fill))]
    if not masks or (before and not (wanted.tables and is_bias(before, scope, sizes, at))):
        return None
    found = [_read(step, arranged, scope, sizes, at, wanted) for step in masks]
    if wanted.slopes and (before or sum(r is not None and r.bias is not None for r in found) > 1):
        return _read_bounds(arranged, scope, sizes, at, empty_rows, replace(wanted, slopes=False))  # of one kind
    read = [r for r in found if r is not None and _counts(r, found, masks, arranged, before)]
    by_distance = any(r.bias.by_distance for r in read if r.bias is not None)
    if by_distance:  # what is by key stays a mask then
        if before or any(not r.bias.by_distance and not r.only_bias for r in read if r.bias is not None):
            return None
        read = [r for r in read if r.bias is None or r.bias.by_distance]
    if not read or (arranged.uniform and len(read) < len(masks)) or all(r.bias and r.bias.own for r in read):
        return None
    coordinates, keys = read[0].program.coordinates, read[0].program.keys
    live = all_of(r.program.live for r in read)
    lower = [r.program.lower for r in read if r.program.lower is not None]
    upper = [r.program.upper for r in read if r.program.upper is not None]
    segments = [s for r in read for s in r.program.segments if s.sorted]
    key = coordinates[KEYS].atom
    said = [s.condition for s in segments]
    rest = [p for p in conjuncts(live) if p not in said and (key is None or not limits(p, key).exact)]
    unsorted = [s for r in read for s in r.program.segments if not s.sorted]
    scattered = None
    bare = len(read) == len(masks) and not (lower or segments)
    if wanted.scattered and bare and [s.condition for s in unsorted] == rest:
        scattered = unsorted[0] if len(unsorted) == 1 and known_equal(*sizes[ROWS:]) else None
    rest = [] if scattered is not None else rest
    never = rows_are_live(live, coordinates, keys, [*lower, *upper])
    alone = len(read) == len(masks) and all(r.moderate for r in read)
    if alone and not never and arranged.sink is None and not all(r.infinite for r in read):
        if not all(_keeps_minima(r.step, arranged) for r in read) or arranged.is_causal:
            return None
        empty_rows = "uniform"
    elif alone and never and not arranged.is_causal and arranged.sink is None:
        empty_rows = "zero"  # which costs nothing to see to
    if len(read) < len(masks) and not all(r.moderate for r in read):
        return None  # the mask that is left may count on what the bias rules out
    taken = {id(r.step) for r in read}
    left = replace(
        arranged, mask=tuple(s for s in steps if id(s) not in taken) if len(read) < len(masks) else (), uniform=False
    )
    result = Bounds(
        left, coordinates, tuple(sizes), largest(lower) if lower else None, smallest(upper) if upper else None,
        tuple(dict.fromkeys(segments)), all_of(rest), empty_rows, tuple(r.program.node for r in read), before,
        tuple(r.bias for r in read if r.bias is not None), scattered,
    )  # fmt: skip
    if result.rest is TRUE and not segments and scattered is None:
        if live is TRUE:
            return result
        rows = coordinates[ROWS]
        causal = isinstance(rows.atom, Coordinate) and result.lower is None and result.upper is rows
        if causal and arranged.sink is None:
            return replace(result, upper=None, plan=replace(left, is_causal=True))
    bounded = result.lower is not None or result.upper is not None or bool(segments) or scattered is not None
    return result if result.biases or before or (bounded and (wanted.everywhere or wanted.tables)) else None


def _read(step: Placed, arranged: Plan, scope: Scope, sizes: Sequence[Dim], at: Node, wanted: _Wanted) -> _Read | None:
    """A mask that takes positions out and adds a bias that is wanted, read; None if it does more, or is not known."""
    instruction = step.instruction
    tensor = step.tensor
    assert tensor is not None
    keep = instruction.keep if isinstance(instruction, Fill) else True
    program = read_mask(tensor, scope, sizes, at=at, moves=step.moves, keep=keep)
    if isinstance(program, Miss):
        return None
    if isinstance(instruction, Fill):
        return _Read(step, program, instruction.value == -math.inf and not arranged.uniform)
    if not isinstance(instruction, Add):
        return None
    if not val(tensor).is_floating_point():
        return None
    bias = None
    if program.bias is not None:
        sink = arranged.sink is not None
        bias = read_bias(step, program, sizes, tables=wanted.tables, slopes=wanted.slopes, sink=sink)
        if bias is None:
            return None
    if not known_equal(instruction.alpha, 1) and not (bias is not None and bias.own):
        return None
    if any(value > ABSORBING for value in program.hard):
        return None
    infinite = all(value == -math.inf for value in program.hard)
    if not infinite and program.empty_rows not in ("never", "uniform"):
        return None
    if not infinite and program.empty_rows != "never" and torch.is_grad_enabled():
        return None
    return _Read(step, program, infinite, bias)


def _counts(
    read: _Read, found: Sequence[_Read | None], masks: Sequence[Placed], arranged: Plan, before: Sequence[Placed]
) -> bool:
    """Whether what a mask takes out stays out, whatever else there is. Of finite numbers that must be proved."""
    if read.infinite:
        return True
    others = [r for r in found if r is not read]
    if all(r is not None and r.only_bias and r.moderate for r in others):
        return read.moderate
    return not before and read.bias is None and _stands_alone(masks, arranged)


def _stands_alone(masks: Sequence[Placed], arranged: Plan) -> bool:
    """Whether a mask of finite numbers is the only one, stands beside a sink, or does just what the others do."""
    if len(masks) == 1 or arranged.sink is not None:
        return True
    fills = [m.instruction for m in masks if isinstance(m.instruction, Fill)]
    return len(fills) == len(masks) and len({fill.value for fill in fills}) == 1


def _keeps_minima(step: Placed, arranged: Plan) -> bool:
    """Whether the number that a mask holds stays finite until the softmax."""
    instruction = step.instruction
    if isinstance(instruction, Fill):
        return True  # its dtype holds it, and what is narrower makes it no other row's
    assert step.tensor is not None
    dtype = val(step.tensor).dtype
    after = arranged.mask[arranged.mask.index(step) :]
    dtypes = [s.instruction.dtype for s in after if isinstance(s.instruction, (Add, Cast))]
    return all(d == dtype or widens(dtype, d) for d in dtypes)


class _Maker(Inserter):
    """Inserts bounds. The sums that number segments are made again."""

    def __init__(self, bounds: Bounds, match: Match, sources: Sequence[Node]) -> None:
        again: dict[Node, Node] = {
            node: match.call(node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]
            for node in bounds.numbered
        }
        super().__init__(match, bounds.coordinates, bounds.sizes, sources, again)

    def segment(self, segment: Segment) -> tuple[Node, Node]:
        """The first and the last key of each row's segment, whose numbers never fall along the keys."""
        call = self.match.call
        rows = call(aten.squeeze.dim, self.insert(segment.rows), -1)
        keys = call(aten.squeeze.dim, self.insert(segment.keys), -2)
        first = call(aten.searchsorted.Tensor, keys, rows)
        after = call(aten.searchsorted.Tensor, keys, rows, right=True)
        return first, call(aten.sub.Tensor, after, 1)

    def scattered(self, segment: Segment) -> tuple[Node, Node, Node]:
        """(first, last, numbers) of segments in any order; as many rows as there are keys.

        First is -1 where keys of other segments lie between. Layers that ask for the same share it.
        """
        call, already = self.match.call, len(self.match.made)
        numbers = call(aten.squeeze.dim, self.insert(segment.rows), -1)
        same = call(aten.eq.Tensor, *(call(aten.unsqueeze.default, numbers, d) for d in (-1, -2)))
        key = call(aten.arange.default, self.size(self.lengths[KEYS]), dtype=torch.int32, device=self.device)
        first = call(aten.amin.default, call(aten.where.ScalarOther, same, key, torch.iinfo(torch.int32).max), [-1])
        last = call(aten.amax.default, call(aten.where.ScalarOther, same, key, -1), [-1])
        count = call(aten.sum.dim_IntList, same, [-1], dtype=torch.int32)
        together = call(aten.eq.Tensor, call(aten.sub.Tensor, last, first), call(aten.sub.Tensor, count, 1))
        result = call(aten.where.ScalarOther, together, first, -1), last, first
        for node in self.match.made[already:]:
            node.meta[SHARED] = True
        return result
