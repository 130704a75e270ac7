"""Linear forms over coordinates, sizes and elements of tensors: the integers that masks are made of.

    form  =  c0 + c1 · atom1 + c2 · atom2 + ...          coefficients are plain integers

    atom  =  coordinate (0 <= i < M)  |  size (a symbolic dimension)  |  element of a tensor, read at forms
          |  form // d, rounded down  |  max(form, form, ...)  |  a pointwise op that is not interpreted

Everything is hash-consed: equal things are one object, so comparing costs an `is` and results are kept on the object.
A remainder is `n - d · (n // d)` and min(a, b) is `-max(-a, -b)`, so that neither needs an atom of its own.

Bounds are what the decisions rest on. A coordinate is replaced by its limits, which may hold sizes (j <= N - 1), a
quotient by the fraction that it rounds down; what is left has numbers as limits: the ShapeEnv's for sizes, the dtype's
for elements. `j - N + 1 <= 0` is certain that way for every N. Integers are those of mathematics; that int64 arithmetic
does not wrap is the one thing taken for granted (narrower dtypes are checked where they occur).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch.fx import Node

T = TypeVar("T")
Limit = int | float  # an integer, or an infinity

_KNOWN: WeakValueDictionary[Any, Any] = WeakValueDictionary()
_serial = itertools.count()


class Term:
    """Something hash-consed. Make one with `of`, never with the class."""

    serial: int

    @classmethod
    def of(cls: type[T], *fields: Any) -> T:
        """The one object of this class with these fields."""
        return intern((cls, *fields), cls, *fields)


def intern(key: Any, kind: type[T], *fields: Any) -> T:
    """The one object known by `key`: made of the fields where it is not there yet."""
    found: T | None = _KNOWN.get(key)
    if found is None:
        found = kind(*fields)
        object.__setattr__(found, "serial", next(_serial))
        _KNOWN[key] = found
    return found


@dataclass(frozen=True, eq=False)
class Coordinate(Term):
    """A coordinate of the mask: 0 <= coordinate < size."""

    name: str
    size: Form


@dataclass(frozen=True, eq=False)
class Size(Term):
    """A symbolic size (a sympy expression that is no linear form of others), within [least, most]."""

    expression: Any
    least: Limit
    most: Limit


@dataclass(frozen=True, eq=False)
class Read(Term):
    """The element of a node's tensor at an index. `epoch` counts the writes to its memory before it was read."""

    node: Node
    index: tuple[Form, ...]
    epoch: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.node.meta["val"].dtype


@dataclass(frozen=True, eq=False)
class Quotient(Term):
    """numerator // divisor, rounded down; the divisor is positive."""

    numerator: Form
    divisor: int


@dataclass(frozen=True, eq=False)
class Max(Term):
    """The largest of some forms."""

    members: tuple[Form, ...]


@dataclass(frozen=True, eq=False)
class Apply(Term):
    """A pointwise op that is not interpreted, on values that are: it depends on what they depend on.

    `operands` are `values.Operand`s and literals, `keywords` literals by name.
    """

    target: Any
    operands: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, *fields: Any) -> Apply:
        """The one object with these fields; literals that are only equal (0.0 and -0.0) are two."""
        literals = repr([o for o in fields[1] if not isinstance(o, Term)]) + repr(fields[2])
        return intern((cls, literals, *fields), cls, *fields)


Atom = Coordinate | Size | Read | Quotient | Max | Apply


@dataclass(frozen=True, eq=False)
class Form(Term):
    """A linear form: `terms` are (atom, coefficient), ordered by the atoms' age, none with coefficient 0."""

    terms: tuple[tuple[Atom, int], ...]
    constant: int

    def __add__(self, other: Form | int) -> Form:
        if isinstance(other, int):
            return Form.of(self.terms, self.constant + other) if other else self
        if not other.terms:
            return self + other.constant
        if not self.terms:
            return other + self.constant
        return linear(itertools.chain(self.terms, other.terms), self.constant + other.constant)

    def __mul__(self, factor: int) -> Form:
        if factor == 1:
            return self
        if factor == 0:
            return integer(0)
        return Form.of(tuple((atom, k * factor) for atom, k in self.terms), self.constant * factor)

    def __neg__(self) -> Form:
        return self * -1

    def __sub__(self, other: Form | int) -> Form:
        return self + (-other)

    @property
    def is_number(self) -> bool:
        """Whether the form is a plain integer, its `constant`."""
        return not self.terms

    @property
    def atom(self) -> Atom | None:
        """The atom that the form is, if it is one."""
        return self.terms[0][0] if len(self.terms) == 1 and self.constant == 0 and self.terms[0][1] == 1 else None

    def coefficient(self, atom: Any) -> int:
        """The coefficient of an atom; 0 where it does not occur."""
        return next((k for a, k in self.terms if a is atom), 0)

    @cached_property
    def most(self) -> Limit:
        """A number that the form never exceeds (perhaps infinity)."""
        return -_least(-self)

    @cached_property
    def least(self) -> Limit:
        """A number that the form is never below (perhaps minus infinity)."""
        return _least(self)

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        """All atoms within the form, at any depth."""
        return frozenset(_atoms(self))


def linear(terms: Iterable[tuple[Atom, int]], constant: int) -> Form:
    """The sum of the terms and a constant."""
    total: dict[Atom, int] = {}
    for atom, k in terms:
        total[atom] = total.get(atom, 0) + k
    ordered = sorted(((a, k) for a, k in total.items() if k), key=lambda term: term[0].serial)
    return Form.of(tuple(ordered), constant)


_SMALL: dict[int, Form] = {}


def integer(value: int) -> Form:
    """A plain integer as a form."""
    found = _SMALL.get(value)
    if found is None:
        found = Form.of((), value)
        if -64 <= value <= 64:
            _SMALL[value] = found
    return found


def single(atom: Atom) -> Form:
    """An atom as a form."""
    return Form.of(((atom, 1),), 0)


def coordinate(name: str, size: Form) -> Form:
    """The coordinate `name` of a dimension: 0 where there is only one element."""
    return integer(0) if size is integer(1) else single(Coordinate.of(name, size))


def quotient(numerator: Form, divisor: int) -> Form:
    """numerator // divisor, rounded down; `divisor` is positive. What it divides evenly is taken out."""
    if divisor == 1:
        return numerator
    whole = [(atom, k // divisor) for atom, k in numerator.terms if k % divisor == 0]
    rest = Form.of(tuple((a, k) for a, k in numerator.terms if k % divisor), numerator.constant % divisor)
    outside = linear(whole, numerator.constant // divisor)
    if rest.least >= 0 and rest.most < divisor:
        return outside
    inner = rest.atom
    if isinstance(inner, Quotient):  # (n // c) // d = n // (c · d)
        return outside + quotient(inner.numerator, inner.divisor * divisor)
    return outside + single(Quotient.of(rest, divisor))


def remainder(numerator: Form, divisor: int) -> Form:
    """The remainder of that division: within [0, divisor)."""
    return numerator - quotient(numerator, divisor) * divisor


def largest(forms: Iterable[Form]) -> Form:
    """The largest of the forms. Those that another one is never below are left out."""
    flat: list[Form] = []
    for form in forms:
        atom = form.atom
        flat += atom.members if isinstance(atom, Max) else (form,)
    members: list[Form] = []
    for form in dict.fromkeys(flat):
        if any((form - other).most <= 0 for other in members):
            continue
        members = [m for m in members if (m - form).most > 0] + [form]
    if len(members) == 1:
        return members[0]
    return single(Max.of(tuple(sorted(members, key=lambda form: form.serial))))


def smallest(forms: Iterable[Form]) -> Form:
    """The smallest of the forms."""
    return -largest(-form for form in forms)


def substitute(form: Form, replacements: Mapping[Atom, Form]) -> Form:
    """The form with atoms replaced, also inside of quotients, maxima and indices (but not of uninterpreted ops)."""
    if not replacements or form.atoms.isdisjoint(replacements):
        return form
    total = integer(form.constant)
    for atom, k in form.terms:
        total = total + _replaced(atom, replacements) * k
    return total


def _replaced(atom: Atom, replacements: Mapping[Atom, Form]) -> Form:
    if atom in replacements:
        return replacements[atom]
    if isinstance(atom, Quotient):
        return quotient(substitute(atom.numerator, replacements), atom.divisor)
    if isinstance(atom, Max):
        return largest(substitute(m, replacements) for m in atom.members)
    if isinstance(atom, Read):
        return single(Read.of(atom.node, tuple(substitute(i, replacements) for i in atom.index), atom.epoch))
    if isinstance(atom, Apply):
        operands = tuple(a.substitute(replacements) if hasattr(a, "substitute") else a for a in atom.operands)
        return single(Apply.of(atom.target, operands, atom.keywords, atom.dtype))
    return single(atom)


def _atoms(form: Form) -> Iterator[Atom]:
    for atom, _ in form.terms:
        yield from atoms_of(atom)


def atoms_of(atom: Atom) -> Iterator[Atom]:
    """An atom and those within it."""
    yield atom
    if isinstance(atom, Quotient):
        yield from atom.numerator.atoms
    elif isinstance(atom, (Max, Read)):
        for part in atom.members if isinstance(atom, Max) else atom.index:
            yield from part.atoms
    elif isinstance(atom, Apply):
        for operand in atom.operands:
            yield from getattr(operand, "atoms", ())


def _least(form: Form) -> Limit:
    """A lower bound: quotients and maxima by what they are made of, then coordinates at their limits, then numbers."""
    for atom, k in form.terms:
        if isinstance(atom, (Max, Quotient)):
            rest = Form.of(tuple(t for t in form.terms if t[0] is not atom), form.constant)
            if isinstance(atom, Max):  # at least each member; where subtracted, as bad as the worst
                limits = [(rest + member * k).least for member in atom.members]
                return max(limits) if k > 0 else min(limits)
            limit = rest.least + k * _range(atom)[k < 0]
            if k % atom.divisor == 0:  # d · (n // d) lies within [n - d + 1, n]
                fraction = atom.numerator if k < 0 else atom.numerator - (atom.divisor - 1)
                limit = max(limit, (rest + fraction * (k // atom.divisor)).least)
            return limit
    total: Limit = form.constant
    at_limits: list[Form] = []
    for atom, k in form.terms:
        if isinstance(atom, Coordinate):
            if k < 0:
                at_limits.append((atom.size - 1) * k)
        else:
            at_limits.append(Form.of(((atom, k),), 0))
    for atom, k in linear(itertools.chain(*(f.terms for f in at_limits)), 0).terms:
        total += k * _range(atom)[k < 0]
    return total + sum(f.constant for f in at_limits)


def _range(atom: Atom) -> tuple[Limit, Limit]:
    if isinstance(atom, Size):
        return atom.least, atom.most
    if isinstance(atom, Coordinate):
        return 0, atom.size.most - 1
    if isinstance(atom, Quotient):
        return _floor(atom.numerator.least, atom.divisor), _floor(atom.numerator.most, atom.divisor)
    if isinstance(atom, Max):
        return max(m.least for m in atom.members), max(m.most for m in atom.members)
    return integer_range(atom.dtype)


def _floor(limit: Limit, divisor: int) -> Limit:
    return limit if isinstance(limit, float) else limit // divisor


def integer_range(dtype: torch.dtype) -> tuple[Limit, Limit]:
    """The smallest and largest value of an integer or boolean dtype; those of int64 count as infinite."""
    if dtype == torch.bool:
        return 0, 1
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.int64:
        return -math.inf, math.inf
    info = torch.iinfo(dtype)
    return info.min, info.max


def fits(form: Form, dtype: torch.dtype) -> bool:
    """Whether every value of the form is exact in `dtype` (integers in a floating dtype, up to its precision)."""
    if dtype.is_floating_point:
        most = exact_integers(dtype)
        return -most <= form.least and form.most <= most
    least, most_ = integer_range(dtype)
    return least <= form.least and form.most <= most_


def exact_integers(dtype: torch.dtype) -> int:
    """The number up to which a floating dtype holds all integers: 2^24 for float32, 2^8 for bfloat16."""
    return int(2 / torch.finfo(dtype).eps)


def elements(atoms: Iterable[Atom], wanted: Callable[[Read], bool] = lambda _: True) -> list[Read]:
    """The tensor elements among the atoms, oldest first."""
    found = {atom for atom in atoms if isinstance(atom, Read) and wanted(atom)}
    return sorted(found, key=lambda atom: atom.serial)
