"""What a condition says of the keys alone: for a row i, the live j lie within [lower(i), upper(i)].

A linear inequality in j is solved for it, with the rounding that integers need; `j // c <= r` is `j <= c r + c - 1`. Of
a conjunction the tightest limits hold, of a disjunction the loosest. Limits are always sound: no live key lies outside
them. They are exact where they say all that the condition does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxopt.match.masks.conditions import Any, Condition, Constant, Eq, Le, Ne, all_of, constant, le
from fxopt.match.masks.forms import Atom, Form, Quotient, largest, quotient, single, smallest


@dataclass(frozen=True)
class Limits:
    """lower <= j <= upper, None where there is no limit; whether that is all that the condition says."""

    lower: Form | None = None
    upper: Form | None = None
    exact: bool = False

    def condition(self, j: Atom) -> Condition:
        """The limits as a condition."""
        parts = [] if self.lower is None else [le(self.lower - single(j))]
        return all_of(parts if self.upper is None else [*parts, le(single(j) - self.upper)])


def limits(condition: Condition, j: Atom) -> Limits:
    """The limits that `condition` puts on the key j."""
    if isinstance(condition, Constant):
        return Limits(exact=condition is constant(True))
    if isinstance(condition, Ne):
        return Limits()
    if isinstance(condition, Le):
        return _solved(condition.form, j)
    if isinstance(condition, Eq):
        above, below = _solved(condition.form, j), _solved(-condition.form, j)
        return _within([above, below])
    parts = [limits(part, j) for part in condition.parts]
    return _around(parts) if isinstance(condition, Any) else _within(parts)


def _within(parts: Iterable[Limits]) -> Limits:
    parts = list(parts)
    lower = [p.lower for p in parts if p.lower is not None]
    upper = [p.upper for p in parts if p.upper is not None]
    return Limits(
        largest(lower) if lower else None, smallest(upper) if upper else None, all(part.exact for part in parts)
    )


def _around(parts: list[Limits]) -> Limits:
    lower = [p.lower for p in parts if p.lower is not None]
    upper = [p.upper for p in parts if p.upper is not None]
    return Limits(
        smallest(lower) if len(lower) == len(parts) else None,
        largest(upper) if len(upper) == len(parts) else None,
        not (lower and upper) and all(part.exact for part in parts),
    )


def _solved(form: Form, j: Atom) -> Limits:
    """form <= 0, solved for j."""
    holders = [(atom, k) for atom, k in form.terms if j in single(atom).atoms]
    if len(holders) != 1:
        return Limits()
    (atom, k), rest = holders[0], Form.of(tuple(t for t in form.terms if t[0] is not holders[0][0]), form.constant)
    if k > 0:
        limit, above = quotient(-rest, k), True  # atom <= -rest / k
    else:
        limit, above = -quotient(-rest, -k), False  # atom >= rest / -k, rounded up
    if atom is j:
        return Limits(upper=limit, exact=True) if above else Limits(lower=limit, exact=True)
    if not isinstance(atom, Quotient):
        return Limits()
    # n // d <= limit is n <= d · limit + d - 1;  n // d >= limit is n >= d · limit
    inner = (
        (atom.numerator - limit * atom.divisor) - (atom.divisor - 1) if above else limit * atom.divisor - atom.numerator
    )
    return _solved(inner, j)
