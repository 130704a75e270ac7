"""Conditions on linear forms, in negation normal form: atoms `form <= 0`, `form = 0`, `form != 0`, flat and/or sets.

Hash-consed like forms. What the constructors know is enough for the masks that models make, and each step is exact:

    bounds              j - N <= 0 holds, j - N = 0 doesn't
    divisibility        2 i + 1 = 0 can't hold; 2 j - 3 <= 0 is j - 1 <= 0
    pairs               f <= 0 and f <= 3 is f <= 0;  f <= 0 and f >= 1 is false;  f <= 0 and f >= 0 is f = 0
    maxima              max(a, b) <= c is a <= c and b <= c
    complements         x and not x is false;  x and (x or y) is x;  x and (not x or y) is x and y;
                        (x or y) and (x or not y) is x
    known coordinates   i = 0 and c(i) is i = 0 and c(0)

Disjunctions are simplified as the negated conjunction of the negations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd

from fxopt.match.masks.forms import (
    Atom,
    Coordinate,
    Form,
    Max,
    Term,
    integer,
    integer_range,
    substitute,
)

#: the parts that one conjunction or disjunction may have before it is left as it was written
MAX_PARTS = 24


@dataclass(frozen=True, eq=False)
class Constant(Term):
    """True or false everywhere."""

    value: bool


@dataclass(frozen=True, eq=False)
class Le(Term):
    """form <= 0"""

    form: Form


@dataclass(frozen=True, eq=False)
class Eq(Term):
    """form = 0"""

    form: Form


@dataclass(frozen=True, eq=False)
class Ne(Term):
    """form != 0"""

    form: Form


@dataclass(frozen=True, eq=False)
class All(Term):
    """All of the parts hold; there are at least two, none of them an All or a constant."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, eq=False)
class Any(Term):
    """Some of the parts hold; there are at least two, none of them an Any or a constant."""

    parts: tuple[Condition, ...]


Condition = Constant | Le | Eq | Ne | All | Any

TRUE = Constant.of(True)
FALSE = Constant.of(False)


def constant(value: bool) -> Condition:
    """TRUE or FALSE."""
    return TRUE if value else FALSE


def le(form: Form) -> Condition:
    """form <= 0"""
    if form.is_number:
        return constant(form.constant <= 0)
    for atom, k in form.terms:
        if isinstance(atom, Max):
            rest = Form.of(tuple(t for t in form.terms if t[0] is not atom), form.constant)
            parts = [le(rest + member * k) for member in atom.members]
            return all_of(parts) if k > 0 else any_of(parts)
    divisor = gcd(*(k for _, k in form.terms))
    if divisor > 1:
        form = Form.of(tuple((a, k // divisor) for a, k in form.terms), -(-form.constant // divisor))
    if form.most <= 0:
        return TRUE
    if form.least > 0:
        return FALSE
    if form.least == 0:
        return eq(form)
    return Le.of(form)


def eq(form: Form) -> Condition:
    """form = 0"""
    if form.is_number:
        return constant(form.constant == 0)
    if any(isinstance(atom, Max) for atom, _ in form.terms):
        return all_of([le(form), le(-form)])
    divisor = gcd(*(k for _, k in form.terms))
    if form.constant % divisor:
        return FALSE
    if divisor > 1:
        form = Form.of(tuple((a, k // divisor) for a, k in form.terms), form.constant // divisor)
    if form.terms[0][1] < 0:
        form = -form
    if form.least > 0 or form.most < 0:
        return FALSE
    if form.least == 0 == form.most:
        return TRUE
    if len(form.terms) == 1 and form.constant == -1 and _is_flag(form.terms[0][0]):
        return Ne.of(form + 1)
    return Eq.of(form)


def ne(form: Form) -> Condition:
    """form != 0"""
    return negate(eq(form))


def negate(condition: Condition) -> Condition:
    """The opposite."""
    found = condition.__dict__.get("_negation")
    if found is None:
        found = _negation(condition)
        condition.__dict__["_negation"] = found
    return found


def _negation(condition: Condition) -> Condition:
    if isinstance(condition, Constant):
        return constant(not condition.value)
    if isinstance(condition, Le):
        return le(-condition.form + 1)
    if isinstance(condition, Eq):
        return Ne.of(condition.form)
    if isinstance(condition, Ne):
        return Eq.of(condition.form)
    parts = tuple(sorted((negate(p) for p in condition.parts), key=lambda p: p.serial))
    return Any.of(parts) if isinstance(condition, All) else All.of(parts)


def any_of(parts: Iterable[Condition]) -> Condition:
    """Some of the parts hold."""
    return negate(all_of([negate(part) for part in parts]))


def all_of(parts: Iterable[Condition]) -> Condition:
    """All of the parts hold."""
    found: dict[Condition, None] = {}
    for part in parts:
        found.update(dict.fromkeys(part.parts if isinstance(part, All) else (part,)))
    found.pop(TRUE, None)
    if FALSE in found:
        return FALSE
    if 1 < len(found) <= MAX_PARTS:
        simpler = _simplify(list(found))
        if simpler is None:
            return FALSE
        found = dict.fromkeys(simpler)
    if not found:
        return TRUE
    if len(found) == 1:
        return next(iter(found))
    return All.of(tuple(sorted(found, key=lambda part: part.serial)))


def _simplify(parts: list[Condition]) -> list[Condition] | None:
    """Fewer parts that say the same together; None where they contradict each other."""
    for _ in range(8):
        before = parts
        for rule in (_tightest, _known_coordinates, _absorb, _resolve):
            flat: dict[Condition, None] = {}
            for part in rule(parts):
                flat.update(dict.fromkeys(part.parts if isinstance(part, All) else (part,)))
            flat.pop(TRUE, None)
            if FALSE in flat:
                return None
            parts = list(flat)
        if parts == before:
            break
    return parts


def _tightest(parts: list[Condition]) -> list[Condition]:
    """Of inequalities that differ by a constant only the tightest; two that meet become an equation."""
    limits: dict[Form, int] = {}  # form without its constant -> form + constant <= 0
    kept: list[Condition] = []
    for part in parts:
        if isinstance(part, Le):
            slope = Form.of(part.form.terms, 0)
            limits[slope] = max(part.form.constant, limits.get(slope, part.form.constant))
        else:
            kept.append(part)
    for slope, limit in limits.items():
        opposite = limits.get(-slope)
        if opposite is None:
            kept.append(le(slope + limit))
        elif limit + opposite > 0:
            return [FALSE]
        elif limit + opposite == 0:
            kept.append(eq(slope + limit))
        else:
            kept.append(Le.of(slope + limit))
    return kept


def _known_coordinates(parts: list[Condition]) -> list[Condition]:
    """A coordinate that an equation makes a number is that number in the other parts."""
    known: dict[Atom, Form] = {}
    for part in parts:
        if isinstance(part, Eq) and len(part.form.terms) == 1 and isinstance(part.form.terms[0][0], Coordinate):
            known[part.form.terms[0][0]] = integer(-part.form.constant)
    if not known:
        return parts
    return [p if isinstance(p, Eq) and len(p.form.terms) == 1 else replace(p, known) for p in parts]


def _absorb(parts: list[Condition]) -> list[Condition]:
    """Each part in the light of the others that hold with it."""
    kept = []
    for part in parts:
        if negate(part) in parts:
            return [FALSE]
        if isinstance(part, Any):
            others = [other for other in parts if other is not part]
            if any(_implies(other, choice) for choice in part.parts for other in others):
                continue
            choices = [c for c in part.parts if not any(_implies(other, negate(c)) for other in others)]
            if not choices:
                return [FALSE]
            if len(choices) < len(part.parts):
                part = choices[0] if len(choices) == 1 else Any.of(tuple(choices))
        elif isinstance(part, Ne) and any(_rules_out(other, part) for other in parts if other is not part):
            continue
        kept.append(part)
    return kept


def _rules_out(known: Condition, part: Ne) -> bool:
    """Whether `part` certainly holds where `known` does; a coordinate is tried at the number that it must not be."""
    form = part.form
    if len(form.terms) == 1 and isinstance(form.terms[0][0], Coordinate) and isinstance(known, (Le, Eq)):
        return replace(known, {form.terms[0][0]: integer(-form.constant * form.terms[0][1])}) is FALSE
    return _implies(known, part)


def _resolve(parts: list[Condition]) -> list[Condition]:
    """Two disjunctions that differ in a choice and its opposite, as what they share."""
    choices = {frozenset(part.parts) for part in parts if isinstance(part, Any)}
    if len(choices) < 2:
        return parts
    for some in choices:
        for choice in some:
            rest = some - {choice}
            if rest | {negate(choice)} in choices:
                kept = [p for p in parts if not isinstance(p, Any) or not rest <= frozenset(p.parts)]
                return [*kept, any_of(rest)]
    return parts


def _implies(known: Condition, part: Condition) -> bool:
    """Whether a part certainly holds where another does; compares single inequalities and equations."""
    if known is part:
        return True
    if isinstance(part, All):
        return all(_implies(known, p) for p in part.parts)
    if isinstance(known, Le) and isinstance(part, Le):
        return known.form.terms == part.form.terms and part.form.constant <= known.form.constant
    if isinstance(known, Le) and isinstance(part, Ne):  # f + c <= 0 rules out f + c' = 0 for c' < c
        form = known.form
        return (form.terms == part.form.terms and part.form.constant < form.constant) or (
            form.terms == (-part.form).terms and -part.form.constant < form.constant
        )
    if isinstance(known, Eq) and isinstance(part, (Le, Ne)):
        if known.form.terms == part.form.terms:
            value = part.form.constant - known.form.constant
        elif (-known.form).terms == part.form.terms:
            value = part.form.constant + known.form.constant
        else:
            return False
        return value <= 0 if isinstance(part, Le) else value != 0
    return False


def replace(condition: Condition, replacements: Mapping[Atom, Form]) -> Condition:
    """The condition with atoms replaced by forms."""
    if isinstance(condition, Constant) or condition_atoms(condition).isdisjoint(replacements):
        return condition
    if isinstance(condition, (Le, Eq, Ne)):
        form = substitute(condition.form, replacements)
        return le(form) if isinstance(condition, Le) else eq(form) if isinstance(condition, Eq) else ne(form)
    parts = [replace(part, replacements) for part in condition.parts]
    return all_of(parts) if isinstance(condition, All) else any_of(parts)


def condition_atoms(condition: Condition) -> frozenset[Atom]:
    """All atoms of the condition, at any depth."""
    found: frozenset[Atom] | None = condition.__dict__.get("_atoms")
    if found is None:
        if isinstance(condition, Constant):
            found = frozenset()
        elif isinstance(condition, (Le, Eq, Ne)):
            found = condition.form.atoms
        else:
            found = frozenset().union(*(condition_atoms(part) for part in condition.parts))
        condition.__dict__["_atoms"] = found
    return found


def conjuncts(condition: Condition) -> tuple[Condition, ...]:
    """The parts that must all hold; none for TRUE."""
    if condition is TRUE:
        return ()
    return condition.parts if isinstance(condition, All) else (condition,)


def _is_flag(atom: Atom) -> bool:
    """Whether the atom is an element of a boolean tensor: 0 or 1."""
    dtype = getattr(atom, "dtype", None)
    return dtype is not None and integer_range(dtype) == (0, 1)
