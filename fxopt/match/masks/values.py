"""What an element of a tensor can be: a condition (bool), or finitely many cases, each a value and when it is taken.

    where(j <= i, 0.0, -inf)   ->   {0.0: j - i <= 0, -inf: i - j + 1 <= 0}

The conditions of a value's cases are exhaustive and exclude each other. A case's value is a linear form (integers, and
floating-point numbers that are exact integers), a number, or an element that nothing more is known of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxopt.match.masks.conditions import (
    FALSE,
    TRUE,
    Condition,
    all_of,
    any_of,
    condition_atoms,
    ne,
    negate,
    replace,
)
from fxopt.match.masks.forms import Apply, Atom, Form, Read, Term, integer, intern, single, substitute

#: the cases that one value may have
MAX_CASES = 16

Scalar = Form | float | Read | Apply


class Opaque(Exception):
    """What makes a value can't be followed; the message says why."""


@dataclass(frozen=True, eq=False)
class Cases(Term):
    """A number, by cases."""

    pieces: tuple[tuple[Scalar, Condition], ...]

    @classmethod
    def of(cls, pieces: tuple[tuple[Scalar, Condition], ...]) -> Cases:
        """The one object with these cases; 0.0 and -0.0 are two numbers."""
        return intern((cls, tuple((*known(scalar), condition) for scalar, condition in pieces)), cls, pieces)

    @property
    def form(self) -> Form | None:
        """The linear form that the value is in every case."""
        scalar = self.pieces[0][0]
        return scalar if len(self.pieces) == 1 and isinstance(scalar, Form) else None


Value = Condition | Cases


@dataclass(frozen=True, eq=False)
class Operand(Term):
    """A tensor that an uninterpreted op takes; `is_scalar` where it has no dimensions (type promotion asks)."""

    value: Value
    dtype: torch.dtype
    is_scalar: bool

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """All atoms that the operand depends on."""
        return atoms(self.value)

    def substitute(self, replacements: Mapping[Atom, Form]) -> Operand:
        """The operand with atoms replaced."""
        return Operand.of(replaced(self.value, replacements), self.dtype, self.is_scalar)


def known(scalar: Scalar) -> tuple[Scalar, str]:
    """What tells a case's value from others: numbers also by how they are written, which the sign of zero needs."""
    return (0.0, repr(scalar)) if isinstance(scalar, float) else (scalar, "")


def exactly(scalar: Scalar) -> Cases:
    """A value with one case."""
    return Cases.of(((scalar, TRUE),))


def by_cases(pieces: Iterable[tuple[Scalar, Condition]]) -> Cases:
    """A value from cases, equal ones joined. Raises Opaque if they are too many."""
    joined: dict[tuple[Scalar, str], tuple[Scalar, Condition]] = {}
    for scalar, condition in pieces:
        key = known(scalar)
        if condition is not FALSE:
            joined[key] = (scalar, any_of([joined[key][1], condition]) if key in joined else condition)
    if len(joined) > MAX_CASES:
        raise Opaque(f"more than {MAX_CASES} cases")
    return Cases.of(tuple(joined.values()))


def numbers(value: Value, dtype: torch.dtype) -> Cases:
    """A value as numbers of `dtype`: a condition is 1 where it holds and 0 elsewhere."""
    if isinstance(value, Cases):
        return value
    one, zero = (1.0, 0.0) if dtype.is_floating_point else (integer(1), integer(0))
    return by_cases([(one, value), (zero, negate(value))])


def choose(condition: Condition, yes: Value, no: Value, dtype: torch.dtype) -> Value:
    """`yes` where the condition holds, elsewhere `no`."""
    if condition is TRUE:
        return yes
    if condition is FALSE:
        return no
    if not isinstance(yes, Cases) and not isinstance(no, Cases):
        return any_of([all_of([condition, yes]), all_of([negate(condition), no])])
    pieces = [(s, all_of([condition, c])) for s, c in numbers(yes, dtype).pieces]
    pieces += [(s, all_of([negate(condition), c])) for s, c in numbers(no, dtype).pieces]
    return by_cases(pieces)


def combine(operands: Sequence[Cases], function: Callable[..., Scalar | Condition], *, boolean: bool) -> Value:
    """The function of every combination of the operands' cases. Raises Opaque if they are too many."""
    results: list[tuple[Any, Condition]] = []
    for combination in itertools.product(*(operand.pieces for operand in operands)):
        condition = all_of([c for _, c in combination]) if len(operands) > 1 else combination[0][1]
        if condition is FALSE:
            continue
        results.append((function(*(s for s, _ in combination)), condition))
        if len(results) > 4 * MAX_CASES:
            raise Opaque("too many combinations of cases")
    if boolean:
        return any_of([all_of([result, condition]) for result, condition in results])
    return by_cases(results)


def of_atom(atom: Read | Apply) -> Value:
    """An element, or the result of an uninterpreted op, as a value."""
    if atom.dtype == torch.bool:
        return ne(single(atom))
    return exactly(atom if atom.dtype.is_floating_point else single(atom))


def atoms(value: Value) -> frozenset[Atom]:
    """All atoms of a value, at any depth."""
    if not isinstance(value, Cases):
        return condition_atoms(value)
    found: frozenset[Atom] = frozenset()
    for scalar, condition in value.pieces:
        found |= condition_atoms(condition) | scalar_atoms(scalar)
    return found


def scalar_atoms(scalar: Scalar) -> frozenset[Atom]:
    """All atoms of a case's value."""
    if isinstance(scalar, float):
        return frozenset()
    return (scalar if isinstance(scalar, Form) else single(scalar)).atoms


def replaced(value: Value, replacements: Mapping[Atom, Form]) -> Value:
    """The value with atoms replaced by forms."""
    if not isinstance(value, Cases):
        return replace(value, replacements)
    pieces: list[tuple[Scalar, Condition]] = []
    for scalar, condition in value.pieces:
        if isinstance(scalar, Form):
            scalar = substitute(scalar, replacements)
        elif isinstance(scalar, (Read, Apply)):
            atom = substitute(single(scalar), replacements).atom
            if not isinstance(atom, (Read, Apply)):
                raise Opaque("a floating-point element was replaced by an integer")
            scalar = atom
        pieces.append((scalar, replace(condition, replacements)))
    return by_cases(pieces)
