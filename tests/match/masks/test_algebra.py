"""Linear forms and conditions: simplification changes no value, and one thing is one object."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxopt.match.masks.bounds import limits
from fxopt.match.masks.conditions import (
    FALSE,
    TRUE,
    All,
    Constant,
    Eq,
    Le,
    all_of,
    any_of,
    eq,
    le,
    ne,
    negate,
    replace,
)
from fxopt.match.masks.forms import (
    Coordinate,
    Max,
    Quotient,
    Size,
    coordinate,
    integer,
    largest,
    quotient,
    remainder,
    single,
    smallest,
    substitute,
)

N = single(Size.of("N", 2, float("inf")))
i, j = coordinate("i", integer(5)), coordinate("j", integer(7))
si, sj = coordinate("i", N), coordinate("j", N)
LIMITS = {i.atom: 5, j.atom: 7}


def number(form, at):
    total = form.constant
    for atom, k in form.terms:
        if isinstance(atom, Coordinate):
            value = at[atom]
        elif isinstance(atom, Quotient):
            value = number(atom.numerator, at) // atom.divisor
        else:
            assert isinstance(atom, Max)
            value = max(number(m, at) for m in atom.members)
        total += k * value
    return total


def truth(condition, at):
    if isinstance(condition, Constant):
        return condition.value
    if hasattr(condition, "form"):
        value = number(condition.form, at)
        return value <= 0 if isinstance(condition, Le) else (value == 0) == isinstance(condition, Eq)
    parts = [truth(p, at) for p in condition.parts]
    return all(parts) if isinstance(condition, All) else any(parts)


def everywhere():
    for values in itertools.product(*(range(n) for n in LIMITS.values())):
        yield dict(zip(LIMITS, values, strict=True))


# A form beside the function of (i, j) that it should be; a condition likewise.
small = st.integers(-6, 6)
forms = st.recursive(
    st.one_of(
        st.just((i, lambda a, b: a)),
        st.just((j, lambda a, b: b)),
        small.map(lambda k: (integer(k), lambda a, b, k=k: k)),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: (p[0][0] + p[1][0], lambda a, b: p[0][1](a, b) + p[1][1](a, b))),
        st.tuples(inner, small).map(lambda p: (p[0][0] * p[1], lambda a, b: p[0][1](a, b) * p[1])),
        st.tuples(inner, st.integers(1, 5)).map(
            lambda p: (quotient(p[0][0], p[1]), lambda a, b: p[0][1](a, b) // p[1])
        ),
        st.tuples(inner, st.integers(1, 5)).map(
            lambda p: (remainder(p[0][0], p[1]), lambda a, b: p[0][1](a, b) % p[1])
        ),
        st.tuples(inner, inner).map(
            lambda p: (largest([p[0][0], p[1][0]]), lambda a, b: max(p[0][1](a, b), p[1][1](a, b)))
        ),
        st.tuples(inner, inner).map(
            lambda p: (smallest([p[0][0], p[1][0]]), lambda a, b: min(p[0][1](a, b), p[1][1](a, b)))
        ),
    ),
    max_leaves=5,
)
conditions = st.recursive(
    forms.flatmap(
        lambda f: st.sampled_from(
            [
                (le(f[0]), lambda a, b: f[1](a, b) <= 0),
                (eq(f[0]), lambda a, b: f[1](a, b) == 0),
                (ne(f[0]), lambda a, b: f[1](a, b) != 0),
            ]
        )
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(
            lambda ps: (all_of([p[0] for p in ps]), lambda a, b: all(p[1](a, b) for p in ps))
        ),
        st.lists(inner, min_size=1, max_size=4).map(
            lambda ps: (any_of([p[0] for p in ps]), lambda a, b: any(p[1](a, b) for p in ps))
        ),
        inner.map(lambda p: (negate(p[0]), lambda a, b: not p[1](a, b))),
    ),
    max_leaves=6,
)
quick = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@quick
@given(forms)
def test_forms_keep_their_value_and_their_bounds_hold(pair):
    form, function = pair
    for at in everywhere():
        value = function(*at.values())
        assert number(form, at) == value
        assert form.least <= value <= form.most


@quick
@given(conditions)
def test_conditions_keep_their_truth(pair):
    condition, function = pair
    for at in everywhere():
        expected = function(*at.values())
        assert truth(condition, at) == expected
        assert truth(negate(condition), at) != expected
        assert truth(replace(condition, {j.atom: i}), {**at, j.atom: at[i.atom]}) == function(at[i.atom], at[i.atom])


@quick
@given(conditions)
def test_no_live_key_lies_outside_of_the_limits(pair):
    condition, _ = pair
    found = limits(condition, j.atom)
    for at in everywhere():
        inside = (found.lower is None or number(found.lower, at) <= at[j.atom]) and (
            found.upper is None or at[j.atom] <= number(found.upper, at)
        )
        assert inside or not truth(condition, at)
        assert truth(condition, at) == inside or not found.exact


def test_equal_things_are_one_object():
    assert si + sj is sj + si
    assert (si + 1) * 2 - 2 is si * 2
    assert all_of([le(si - 3), le(sj - 3)]) is all_of([le(sj - 3), le(si - 3)])
    assert negate(negate(any_of([le(si - 3), eq(sj - 3)]))) is any_of([le(si - 3), eq(sj - 3)])


@pytest.mark.parametrize(
    "condition, expected",
    [
        (le(sj - N + 1), TRUE),
        (le(N - sj), FALSE),
        (eq(sj * 2 - 3), FALSE),
        (le(si), eq(si)),
        (all_of([le(sj - si), le(si - sj)]), eq(si - sj)),
        (all_of([le(sj - si), le(si - sj + 1)]), FALSE),
        (all_of([le(sj - si), le(sj - si + 3)]), le(sj - si + 3)),
        (any_of([le(sj - si), le(si - sj)]), TRUE),
        (any_of([le(sj - si), le(sj - si + 3)]), le(sj - si)),
        (all_of([eq(si - 2), le(sj - si)]), all_of([eq(si - 2), le(sj - 2)])),
        (le(largest([si, sj]) - 4), all_of([le(si - 4), le(sj - 4)])),
        (le(smallest([si, sj]) - 4), any_of([le(si - 4), le(sj - 4)])),
        (all_of([any_of([le(si - 3), eq(sj - 1)]), any_of([le(si - 3), ne(sj - 1)])]), le(si - 3)),
        (le(quotient(sj, 4) * 4 - sj), TRUE),
        (le(sj - quotient(sj, 4) * 4 - 3), TRUE),
    ],
)
def test_what_is_certain_is_seen(condition, expected):
    assert condition is expected


def test_quotients_take_out_what_divides():
    assert quotient(si * 4 + 6, 2) is si * 2 + 3
    assert quotient(quotient(si, 3), 2) is quotient(si, 6)
    assert remainder(i, 5) is i
    assert substitute(quotient(si + 1, 2), {si.atom: sj * 2 - 1}) is sj
