"""Masks that are read: what a mask's program says in bounds on each row's keys, and what of it must stay a mask.

    j <= i                                is_causal
    lower(i) <= j <= upper(i)             first, last: one number a row (windows, chunks, offsets, lengths of caches)
    segment(i) = segment(j), sorted       first and last of the segment's keys, by bisection
    anything else                         a boolean mask, in as few dimensions as it depends on

A mask that adds 0 or a hard value is as good as the boolean mask of what it leaves live, unless a row may have no live
key: then -inf and a finite number differ, and a finite one is only told apart from others' where it is the only mask
("uniform" empty rows). Where gradients flow an added finite number passes them on, so rows must be proved live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import aten, val, widens
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.masks import MaskProgram, Segment, insert, read_mask
from fxopt.match.masks.bounds import limits
from fxopt.match.masks.conditions import TRUE, Condition, all_of, condition_atoms, conjuncts
from fxopt.match.masks.forms import Coordinate, Form, Read, elements, largest, smallest
from fxopt.match.masks.program import rows_are_live
from fxopt.match.masks.values import Opaque
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import size_source
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

    @property
    def leaves(self) -> list[Node]:
        """The tensors whose elements are needed."""
        atoms = set(condition_atoms(self.rest))
        for form in self._forms():
            atoms |= form.atoms
        read = dict.fromkeys(read.node for read in elements(atoms))
        again = self.numbered
        return list(dict.fromkeys(n for node in read for n in (node.all_input_nodes if node in again else [node])))

    @property
    def numbered(self) -> list[Node]:
        """The sums that number the segments. They are made again, so that verification sees that they never fall."""
        atoms = {atom for segment in self.segments for form in (segment.rows, segment.keys) for atom in form.atoms}
        return list(dict.fromkeys(read.node for read in elements(atoms) if read.node.target is aten.cumsum.default))

    def _forms(self) -> Iterator[Form]:
        yield from (form for form in (self.lower, self.upper) if form is not None)
        for segment in self.segments:
            yield from (segment.rows, segment.keys)

    def make(self, match: Match, sources: Sequence[Node]) -> tuple[Node | None, Node | None, Node | None]:
        """Insert (first, last, mask). Raises Opaque where a part can't be spelled out."""
        maker = _Maker(self, match, [*sources, *self.leaves])
        first, last = (None if form is None else maker.row(form) for form in (self.lower, self.upper))
        for segment in self.segments:
            start, end = maker.segment(segment)
            first = start if first is None else match.call(aten.maximum.default, first, start)
            last = end if last is None else match.call(aten.minimum.default, last, end)
        return first, last, None if self.rest is TRUE else maker.insert(self.rest)


@dataclass(frozen=True)
class _Read:
    """A mask that was read: where it isn't live it holds numbers, infinite or not."""

    step: Placed
    program: MaskProgram
    infinite: bool


def read_bounds(
    arranged: Plan, scope: Scope, sizes: Sequence[Dim], at: Node, empty_rows: str, *, everywhere: bool
) -> Bounds | None:
    """The bounds that the plan's masks amount to, or None where they say no more than the masks themselves.

    `at` is the node before which they will be computed. Unless `everywhere`, only causality and masks that take nothing
    out are looked for: what needs neither first nor last.
    """
    masks = [step for step in arranged.mask if isinstance(step.instruction, (Add, Fill))]
    if not masks or not all(isinstance(step.instruction, (Add, Fill, Cast)) for step in arranged.mask):
        return None
    found = [_read(step, arranged, scope, sizes, at) for step in masks]
    read = [r for r in found if r is not None and (r.infinite or _stands_alone(r, masks, arranged))]
    if not read or (arranged.uniform and len(read) < len(masks)):
        return None
    coordinates, keys = read[0].program.coordinates, read[0].program.keys
    live = all_of(r.program.live for r in read)
    lower = [r.program.lower for r in read if r.program.lower is not None]
    upper = [r.program.upper for r in read if r.program.upper is not None]
    segments = [s for r in read for s in r.program.segments if s.sorted]
    key = coordinates[KEYS].atom
    said = [s.condition for s in segments]
    rest = [p for p in conjuncts(live) if p not in said and (key is None or not limits(p, key).exact)]
    never = rows_are_live(live, coordinates, keys, [*lower, *upper])
    alone = len(read) == len(masks)
    if alone and not never and arranged.sink is None and not all(r.infinite for r in read):
        if not all(_keeps_minima(r.step, arranged) for r in read) or arranged.is_causal:
            return None
        empty_rows = "uniform"
    elif alone and never and not arranged.is_causal and arranged.sink is None:
        empty_rows = "zero"  # which costs nothing to see to
    taken = {id(r.step) for r in read}
    left = replace(
        arranged, mask=tuple(s for s in arranged.mask if id(s) not in taken) if not alone else (), uniform=False
    )
    result = Bounds(
        left, coordinates, tuple(sizes), largest(lower) if lower else None, smallest(upper) if upper else None,
        tuple(dict.fromkeys(segments)), all_of(rest), empty_rows, tuple(r.program.node for r in read),
    )  # fmt: skip
    if result.rest is TRUE and not segments:
        if live is TRUE:
            return result
        rows = coordinates[ROWS]
        causal = isinstance(rows.atom, Coordinate) and result.lower is None and result.upper is rows
        if causal and arranged.sink is None:
            return replace(result, upper=None, plan=replace(left, is_causal=True))
    bounded = result.lower is not None or result.upper is not None or bool(segments)
    return result if bounded and everywhere else None


def _read(step: Placed, arranged: Plan, scope: Scope, sizes: Sequence[Dim], at: Node) -> _Read | None:
    """A mask that only takes positions out, read; None if it does more, or if nothing is known of it."""
    instruction = step.instruction
    tensor = step.tensor
    assert tensor is not None
    keep = instruction.keep if isinstance(instruction, Fill) else True
    program = read_mask(tensor, scope, sizes, at=at, moves=step.moves, keep=keep)
    if isinstance(program, Miss):
        return None
    if isinstance(instruction, Fill):
        return _Read(step, program, instruction.value == -math.inf and not arranged.uniform)
    if not isinstance(instruction, Add) or not known_equal(instruction.alpha, 1):
        return None
    if program.bias is not None or not val(tensor).is_floating_point():
        return None
    if any(value > ABSORBING for value in program.hard):
        return None
    infinite = all(value == -math.inf for value in program.hard)
    if not infinite and program.empty_rows not in ("never", "uniform"):
        return None
    if not infinite and program.empty_rows != "never" and torch.is_grad_enabled():
        return None
    return _Read(step, program, infinite)


def _stands_alone(read: _Read, masks: Sequence[Placed], arranged: Plan) -> bool:
    """Whether what a mask of finite numbers takes out stays out, whatever else there is."""
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


class _Maker:
    """Inserts forms and conditions; sizes are read off `sources`."""

    def __init__(self, bounds: Bounds, match: Match, sources: Sequence[Node]) -> None:
        self.bounds, self.match = bounds, match
        self.sources = [s for s in sources if isinstance(val(s), Tensor)]
        self.device = next(val(s).device for s in self.sources)
        self.sizes: dict[str, Any] = {}
        self.again: dict[Node, Node] = {
            node: match.call(node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]
            for node in bounds.numbered
        }

    def insert(self, value: Form | Condition) -> Node:
        atoms = value.atoms if isinstance(value, Form) else condition_atoms(value)
        lengths = [
            self.size(n) if form.atom in atoms or _reads(form, atoms) else 1
            for form, n in zip(self.bounds.coordinates, self.bounds.sizes, strict=True)
        ]
        return insert(
            value, self.bounds.coordinates, lengths, self.match.call, self.device,
            size=self.of_expression, element=lambda read: self.again.get(read.node, read.node),
        )  # fmt: skip

    def row(self, form: Form) -> Node:
        """One number a row: a form without the key, [batch, heads, rows] or broadcast to it."""
        found = self.insert(form)
        return found if val(found).dim() == 0 else self.match.call(aten.squeeze.dim, found, -1)

    def segment(self, segment: Segment) -> tuple[Node, Node]:
        """The first and the last key of each row's segment, whose numbers never fall along the keys."""
        call = self.match.call
        rows = call(aten.squeeze.dim, self.insert(segment.rows), -1)
        keys = call(aten.squeeze.dim, self.insert(segment.keys), -2)
        first = call(aten.searchsorted.Tensor, keys, rows)
        after = call(aten.searchsorted.Tensor, keys, rows, right=True)
        return first, call(aten.sub.Tensor, after, 1)

    def size(self, n: Dim) -> Any:
        """A size as a number or a node."""
        if not isinstance(n, SymInt):
            return n
        key = str(n.node.expr)
        if key not in self.sizes:
            found = size_source(n, self.sources)
            if found is None:
                raise _unknown(n)
            self.sizes[key] = self.match.call(aten.sym_size.int, *found)
        return self.sizes[key]

    def of_expression(self, expression: Any) -> Any:
        """A size given by its sympy expression, as a number or a node."""
        for source in self.sources:
            for n in val(source).shape:
                if isinstance(n, SymInt) and n.node.expr == expression:
                    return self.size(n)
        raise _unknown(expression)


def _reads(form: Form, atoms: Any) -> bool:
    return any(isinstance(a, Read) and any(form.atom in i.atoms for i in a.index) for a in atoms)


def _unknown(size: Any) -> Opaque:
    return Opaque(f"no tensor of the match has the size {size}")
