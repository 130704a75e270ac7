"""Following comparisons, logic, choices and casts: exactly, in the dtype that torch does them in."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from fxopt.graph.query import CASTS, arguments, aten, val
from fxopt.match.masks.conditions import Condition, Eq, conjuncts, constant, eq, le, ne, negate
from fxopt.match.masks.forms import Apply, Form, Read, fits, integer
from fxopt.match.masks.lift import Index, Lifter, handles, tensor
from fxopt.match.masks.operands import (
    NOT_ZERO,
    Given,
    apply,
    as_form,
    as_number,
    as_value,
    both,
    common_dtype,
    differ,
    either,
    operand,
    operands_of,
    rounded,
    truth,
    uninterpreted,
)
from fxopt.match.masks.values import (
    Cases,
    Opaque,
    Operand,
    Scalar,
    Value,
    by_cases,
    choose,
    combine,
    exactly,
    numbers,
    of_atom,
)
from fxopt.match.masks.views import constant_value


def _compare_forms(kind: str, a: Form, b: Form) -> Condition:
    if kind == "eq":
        return eq(a - b)
    if kind == "ne":
        return ne(a - b)
    if kind in ("ge", "gt"):
        a, b = b, a
    return le(a - b) if kind in ("le", "ge") else le(a - b + 1)


_MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "eq": "eq", "ne": "ne"}


def _compare_with_number(kind: str, a: Form, number: float, dtype: torch.dtype) -> Condition | None:
    """A form against a number that is no integer, before it is rounded to `dtype` and after; None if that matters."""
    near = rounded(number, dtype)
    if near != number and math.isfinite(number) and (near.is_integer() or near // 1 != number // 1):
        return None
    if math.isnan(number):
        return constant(kind == "ne")
    if kind in ("eq", "ne"):
        return constant(kind == "ne")
    if math.isinf(number):
        return constant((number > 0) == (kind in ("le", "lt")))
    below = math.floor(number)
    return le(a - below) if kind in ("le", "lt") else le(-a + below + 1)


def _comparison(kind: str) -> Callable[..., Value]:
    def handler(lifter: Lifter, node: Node, index: Index) -> Value:
        given = operands_of(lifter, node, index)
        common = common_dtype(given)
        if common == torch.bool:
            conditions = [truth(g) for g in given]
            if kind in ("eq", "ne"):
                unequal = differ(*conditions)
                return unequal if kind == "ne" else negate(unequal)
        operands = [as_value(g, common) for g in given]

        def of(a: Scalar, b: Scalar) -> Condition:
            forms = as_form(a), as_form(b)
            known = all(f is None or fits(f, common) or common == torch.bool for f in forms)
            if known and forms[0] is not None and forms[1] is not None:
                return _compare_forms(kind, forms[0], forms[1])
            found: Condition | None = None
            if known and forms[0] is not None and isinstance(b, float):
                found = _compare_with_number(kind, forms[0], b, common)
            elif known and forms[1] is not None and isinstance(a, float):
                found = _compare_with_number(_MIRRORED[kind], forms[1], a, common)
            if found is not None:
                return found
            operands = [
                Operand.of(exactly(s), g.dtype, g.is_scalar) if isinstance(g, Operand) else g
                for s, g in zip((a, b), given, strict=True)
            ]
            result = apply(node, operands)
            assert not isinstance(result, Cases)
            return result

        return combine(operands, of, boolean=True)

    return handler


for _kind in _MIRRORED:
    handles(getattr(aten, _kind).Tensor, getattr(aten, _kind).Scalar)(_comparison(_kind))


# Logic


def _logical(lifter: Lifter, node: Node, index: Index, rule: Callable[..., Condition]) -> Value:
    conditions = [truth(g) for g in operands_of(lifter, node, index)]
    return rule(*conditions)


def _logic(rule: Callable[..., Condition], *, bitwise: bool) -> Callable[..., Value]:
    def handler(lifter: Lifter, node: Node, index: Index) -> Value:
        if bitwise and val(node).dtype != torch.bool:
            return uninterpreted(lifter, node, index)
        try:
            return _logical(lifter, node, index, rule)
        except Opaque:
            return uninterpreted(lifter, node, index)

    return handler


handles(aten.logical_and.default)(_logic(both, bitwise=False))
handles(aten.logical_or.default)(_logic(either, bitwise=False))
handles(aten.logical_xor.default)(_logic(differ, bitwise=False))
handles(aten.logical_not.default)(_logic(negate, bitwise=False))
handles(aten.bitwise_and, aten.__and__)(_logic(both, bitwise=True))
handles(aten.bitwise_or, aten.__or__)(_logic(either, bitwise=True))
handles(aten.bitwise_xor, aten.__xor__)(_logic(differ, bitwise=True))
handles(aten.bitwise_not.default)(_logic(negate, bitwise=True))


# Choice


def _typed(given: Given, dtype: torch.dtype) -> Value:
    """An operand of `where` as the result's dtype has it."""
    if not isinstance(given, Operand):
        return constant_value(given, dtype)
    return _cast(given.value, given.dtype, dtype)


@handles(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dtype = val(node).dtype
    condition, yes, no = (operand(lifter, node, given[name], index) for name in ("condition", "self", "other"))
    return _known_zeros(choose(truth(condition), _typed(yes, dtype), _typed(no, dtype), dtype))


@handles(aten.masked_fill)
def _masked_fill(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dtype = val(node).dtype
    own, mask, filling = (operand(lifter, node, given[name], index) for name in ("self", "mask", "value"))
    return _known_zeros(choose(truth(mask), _typed(filling, dtype), _typed(own, dtype), dtype))


def _known_zeros(value: Value) -> Value:
    """The value with unknown numbers replaced by 0 where a case asks that they are: x.masked_fill(x.bool(), min)."""
    if not isinstance(value, Cases):
        return value
    pieces: list[tuple[Scalar, Condition]] = []
    for scalar, condition in value.pieces:
        atoms = [part.form.atom for part in conjuncts(condition) if isinstance(part, Eq)]
        asked = [a.operands[0].value for a in atoms if isinstance(a, Apply) and a.target is NOT_ZERO]
        pieces.append((0.0 if isinstance(scalar, (Read, Apply)) and exactly(scalar) in asked else scalar, condition))
    return by_cases(pieces)


# Casts


@handles(*CASTS)
def _to(lifter: Lifter, node: Node, index: Index) -> Value:
    source = tensor(node.args[0])
    before, after = val(source), val(node)
    return _cast(lifter.value(source, index, node), before.dtype, after.dtype)


def _cast(value: Value, before: torch.dtype, after: torch.dtype) -> Value:
    """The value in another dtype, as torch converts it."""
    if before == after:
        return value
    if after == torch.bool:
        return truth(Operand.of(value, before, False))
    if before == torch.bool:
        return numbers(value, after)
    assert isinstance(value, Cases)
    pieces: list[tuple[Scalar, Condition]] = []
    for scalar, condition in value.pieces:
        number, form = as_number(scalar), as_form(scalar)
        if number is not None:
            pieces.append((_converted(number, before, after), condition))
        elif form is not None and fits(form, after):
            pieces.append((form, condition))
        else:
            one = Operand.of(exactly(scalar), before, False)
            pieces.append((_cast_atom(one, after), condition))
    return by_cases(pieces)


def _cast_atom(given: Operand, dtype: torch.dtype) -> Scalar:
    found = of_atom(Apply.of(aten.to.dtype, (given, dtype), (), dtype))
    assert isinstance(found, Cases)
    return found.pieces[0][0]


def _converted(number: bool | int | float, before: torch.dtype, after: torch.dtype) -> Scalar:
    if not after.is_floating_point and isinstance(number, float) and not abs(number) < 2**31:
        raise Opaque("a number that its dtype can't hold")  # what that gives depends on the device
    with torch.utils._python_dispatch._disable_current_modes():
        value = torch.tensor(number, dtype=before).to(after).item()
    return value if after.is_floating_point else integer(int(value))
