"""A mask as a program: bounds on the keys of each row, segments, chunks, padding, and what is left.

    live(b, h, i, j)  =  lower(i) <= j <= upper(i)                 causal, window, prefix, a cache's length
                         and segment(i) = segment(j)               packed sequences
                         and (i + offset) // size = (j + offset) // size      chunks
                         and key_padding(b, j)
                         and residual                              whatever else, exactly

Bounds skip tiles, and they are sound even where the rest is not understood; nothing is assumed. Rows are proved to have
a live key by a witness: some j, as j = i, for which the condition holds for every row.

Floating masks have hard values where they are <= finfo.min of their dtype, or the sum of such a number and one of
moderate size, which it absorbs; those positions are not live. What live positions hold is the bias. In a row with no
live key finfo.min makes weights uniform over all keys, -inf makes them NaN, and two finfo.min that were added are -inf:
`empty_rows` says which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch.fx import Node

from fxopt.match.masks.bounds import Limits, limits
from fxopt.match.masks.conditions import (
    FALSE,
    TRUE,
    Condition,
    Eq,
    all_of,
    any_of,
    condition_atoms,
    conjuncts,
    eq,
    le,
    negate,
    replace,
)
from fxopt.match.masks.forms import (
    Apply,
    Atom,
    Coordinate,
    Form,
    Quotient,
    Read,
    elements,
    integer,
    largest,
    linear,
    single,
    smallest,
    substitute,
)
from fxopt.match.masks.magnitude import MODERATE, is_moderate
from fxopt.match.masks.values import Cases, Operand, Scalar, Value, atoms, by_cases, exactly, replaced

#: what a row without a live key gives: it can't happen, a mean over all keys, NaN, not the same for all such rows,
#: or whatever the op does that takes the boolean mask
EmptyRows = Literal["never", "uniform", "nan", "mixed", "boolean"]


@dataclass(frozen=True)
class Segment:
    """Rows see the keys of their own segment: `rows` is its number at i, `keys` at j.

    `sorted` where the numbers never fall along the sequence, so that the keys of a segment lie together.
    """

    rows: Form
    keys: Form
    sorted: bool = False

    @property
    def condition(self) -> Condition:
        """That row and key are in the same segment."""
        return eq(self.rows - self.keys)


@dataclass(frozen=True)
class Chunk:
    """Rows see the keys of their own chunk: (i + offset) // size is the same for row and key."""

    size: int
    rows: Form
    keys: Form

    @property
    def condition(self) -> Condition:
        """That row and key are in the same chunk."""
        return eq(self.rows - self.keys)


@dataclass(frozen=True)
class MaskProgram:
    """A mask [batch, heads, rows, keys], read. `live` is exact; the other parts together say the same.

    `lower` and `upper` are the first and the last key that a row may see, as forms without j (None: no limit); they may
    lie outside of [0, keys). `hard` are the values that take positions out, empty for a boolean mask; `bias` is what
    live positions hold, None for zero. `leaves` are the tensor elements that are needed to compute it.
    """

    node: Node
    coordinates: tuple[Form, ...]  # batch, heads, rows, keys: a dimension of one element has the coordinate 0
    live: Condition
    lower: Form | None
    upper: Form | None
    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    key_padding: Condition
    residual: Condition
    empty_rows: EmptyRows
    hard: tuple[float, ...] = ()
    bias: Cases | None = None
    keys: Form = field(default_factory=lambda: integer(0))  # how many there are

    @cached_property
    def leaves(self) -> tuple[Read, ...]:
        """The elements of tensors that the mask depends on."""
        found = condition_atoms(self.live)
        for part in (self.lower, self.upper):
            found |= part.atoms if part is not None else frozenset()
        return tuple(elements(found | (atoms(self.bias) if self.bias is not None else frozenset())))

    @property
    def is_causal(self) -> bool:
        """Whether the mask is j <= i and nothing else."""
        if not isinstance(self.coordinates[-1].atom, Coordinate):
            return False
        return self.upper is self.coordinates[-2] and self.lower is None and self.is_bounds and self.bias is None

    @property
    def beside_causal(self) -> Condition | None:
        """What the mask asks besides j <= i, exactly; None if j <= i is not among what it asks.

        A row without a live key has the same result with its part beyond the diagonal masked by -inf only if it is NaN
        or 0: taking causality out of a mask is right where `empty_rows` is neither "uniform" nor "mixed".
        """
        causal = le(self.coordinates[-1] - self.coordinates[-2])
        parts = conjuncts(self.live)
        if causal not in parts:
            return None
        return all_of([part for part in parts if part is not causal])

    @property
    def is_bounds(self) -> bool:
        """Whether the bounds say all that there is to the mask (but for a bias)."""
        return not self.segments and not self.chunks and self.key_padding is TRUE and self.residual is TRUE

    @property
    def is_everything(self) -> bool:
        """Whether every key is live in every row."""
        return self.live is TRUE

    @cached_property
    def bias_depends(self) -> frozenset[str]:
        """What the bias depends on, of "b", "h", "i" and "j"; "j-i" in place of the last two if only on that."""
        return frozenset() if self.bias is None else depends(self.bias, self.coordinates)

    def with_live(self, live: Condition, ordered: frozenset[Read]) -> MaskProgram:
        """The program of a condition that is as true as this one's; segments numbered by `ordered` are sorted."""
        return _program(self.node, live, self.coordinates, self.keys, self.hard, self.bias, ordered)

    def together(self) -> Condition:
        """The parts put together again: as true as `live`."""
        key = self.coordinates[-1].atom
        bounds = Limits(self.lower, self.upper).condition(key) if key is not None else TRUE
        grouped = [*(s.condition for s in self.segments), *(c.condition for c in self.chunks)]
        return all_of([bounds, *grouped, self.key_padding, self.residual])


def depends(value: Value, coordinates: tuple[Form, ...]) -> frozenset[str]:
    """The names of the coordinates that a value depends on; "j-i" where it only does on the distance of key and row.

    Whether moving both by one changes anything is seen at once, as equal values are one object.
    """
    names = {atom.name for atom in atoms(value) if isinstance(atom, Coordinate)}
    row, key = coordinates[-2].atom, coordinates[-1].atom
    if row is not None and key is not None and {"i", "j"} <= names:
        moved = replaced(value, {row: coordinates[-2] + 1, key: coordinates[-1] + 1})
        if moved is value:
            names = names - {"i", "j"} | {"j-i"}
    return frozenset(names)


def read_value(
    node: Node,
    value: Value,
    coordinates: tuple[Form, ...],
    keys: Form,
    *,
    keep: bool = True,
    hard: float | None = None,
) -> MaskProgram:
    """The program of a lifted mask. `keep` False: a boolean mask is true where positions are taken out.

    Values of a floating mask take positions out where they are at most `hard` (None: finfo.min of its dtype).
    """
    masked: dict[float, Condition] = {}
    bias: Cases | None = None
    if isinstance(value, Cases):
        dtype = node.meta["val"].dtype
        limit = hard if hard is not None else torch.finfo(dtype).min if dtype.is_floating_point else -math.inf
        rest: list[tuple[Scalar, Condition]] = []
        for scalar, condition in value.pieces:
            number = _hard(scalar, limit, absorbs=coordinates[-1].atom is not None)
            if number is None:
                rest.append((scalar, condition))
            else:
                masked[number] = any_of([masked[number], condition]) if number in masked else condition
        live = rest[0][1] if len(rest) == 1 else negate(any_of(masked.values()))
        bias = _beside(rest, live) if rest else None
        if bias is not None and all(s == 0.0 or (isinstance(s, Form) and s is integer(0)) for s, _ in bias.pieces):
            bias = None
    else:
        live = value if keep else negate(value)
    return _program(node, live, coordinates, keys, tuple(masked), bias)


def _hard(scalar: Scalar, limit: float, *, absorbs: bool) -> float | None:
    """The hard value that a case's value is, or that `absorbs` what else it is the sum of; None if there is none.

    Of one key alone nothing is told apart: what can't rule out some keys of a row can rule out all.
    """
    if isinstance(scalar, float):
        return scalar if scalar <= limit else None
    if (
        not absorbs
        or not isinstance(scalar, Apply)
        or getattr(scalar.target, "overloadpacket", None) is not torch.ops.aten.add
    ):
        return None
    terms = [o.value for o in scalar.operands if isinstance(o, Operand)]
    if scalar.keywords or len(terms) != 2 or len(scalar.operands) != 2:
        return None
    for one, other in (terms, terms[::-1]):
        number = one.pieces[0][0] if isinstance(one, Cases) and len(one.pieces) == 1 else None
        if isinstance(number, float) and number <= min(limit, -MODERATE) and is_moderate(other):
            return number
    return None


def _beside(pieces: list[tuple[Scalar, Condition]], live: Condition) -> Cases:
    """What live positions hold: cases that needn't ask again whether a position is live."""
    if len(pieces) == 1:
        return exactly(pieces[0][0])
    known = conjuncts(live)
    return by_cases((scalar, all_of(p for p in conjuncts(condition) if p not in known)) for scalar, condition in pieces)


def _program(
    node: Node,
    live: Condition,
    coordinates: tuple[Form, ...],
    keys: Form,
    hard: tuple[float, ...],
    bias: Cases | None,
    ordered: frozenset[Read] = frozenset(),
) -> MaskProgram:
    row, key = coordinates[-2].atom, coordinates[-1].atom
    bounds: list[Limits] = []
    segments: list[Segment] = []
    chunks: list[Chunk] = []
    padding: list[Condition] = []
    residual: list[Condition] = []
    for part in conjuncts(live):
        found = limits(part, key) if key is not None else Limits()
        group = _group(part, row, key, ordered)
        if isinstance(group, Chunk):
            chunks.append(group)
        elif group is not None:
            segments.append(group)
        elif not found.exact:
            used = condition_atoms(part)
            (padding if key in used and row not in used else residual).append(part)
        bounds.append(found)
    # What no key is beyond is no limit.
    lower = [b.lower for b in bounds if b.lower is not None and b.lower.most > 0]
    upper = [b.upper for b in bounds if b.upper is not None and (b.upper - keys + 1).least < 0]
    empty: EmptyRows = "never"
    if not rows_are_live(live, coordinates, keys, [*lower, *upper]):
        infinite = [value for value in hard if value == -math.inf]
        empty = "boolean" if not hard else "nan" if infinite == [*hard] else "mixed" if len(hard) > 1 else "uniform"
    return MaskProgram(
        node=node,
        coordinates=coordinates,
        live=live,
        lower=largest(lower) if lower else None,
        upper=smallest(upper) if upper else None,
        segments=tuple(segments),
        chunks=tuple(chunks),
        key_padding=all_of(padding),
        residual=all_of(residual),
        empty_rows=empty,
        hard=hard,
        bias=bias,
        keys=keys,
    )


def _group(part: Condition, row: Atom | None, key: Atom | None, ordered: frozenset[Read]) -> Segment | Chunk | None:
    """An equation g(i) = g(j) as the segment or chunk that it is."""
    if not isinstance(part, Eq) or row is None or key is None:
        return None
    of_row = [t for t in part.form.terms if row in single(t[0]).atoms]
    of_key = [t for t in part.form.terms if key in single(t[0]).atoms]
    if len(of_row) != 1 or len(of_key) != 1 or len(part.form.terms) != 2 or part.form.constant or of_row == of_key:
        return None
    (a, k), (other, _) = of_row[0], of_key[0]
    rows, keys = linear(of_row, 0), -linear(of_key, 0)
    if k < 0:
        rows, keys = -rows, -keys
    if a is row or substitute(rows, {row: single(key)}) is not keys:
        return None
    if isinstance(a, Quotient):
        return Chunk(a.divisor, rows, keys)
    return Segment(rows, keys, a in ordered and other in ordered)


def rows_are_live(live: Condition, coordinates: tuple[Form, ...], keys: Form, candidates: Sequence[Form]) -> bool:
    """Whether every row certainly has a live key: there is a j within the keys for which the condition always holds."""
    key = coordinates[-1].atom
    if live is TRUE:
        return keys.least >= 1
    if live is FALSE:
        return False
    if key is None:
        return keys.least >= 1 and live is TRUE
    for witness in (coordinates[-2], *candidates, integer(0), keys - 1):
        inside = witness.least >= 0 and (witness - keys + 1).most <= 0
        if inside and replace(live, {key: witness}) is TRUE:
            return True
    return False
