"""Following arithmetic: linear where the result is a linear form that fits its dtype, elsewhere uninterpreted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt
from torch.fx import Node

from fxopt.graph.query import arguments, aten, val
from fxopt.match.masks.conditions import Condition
from fxopt.match.masks.forms import Form, fits, integer, largest, quotient, smallest
from fxopt.match.masks.lift import Index, Lifter, handles
from fxopt.match.masks.operands import (
    Given,
    apply,
    as_form,
    as_number,
    as_value,
    both,
    either,
    operand,
    operands_of,
    truth,
    uninterpreted,
)
from fxopt.match.masks.values import Cases, Opaque, Operand, Scalar, Value, combine, exactly

#: a function of linear forms; None where its result is none
_Linear = Callable[..., Form | None]


def _times(a: Form, b: Form) -> Form | None:
    if b.is_number:
        return a * b.constant
    return b * a.constant if a.is_number else None


def _floor_divide(a: Form, b: Form) -> Form | None:
    return quotient(a, b.constant) if b.is_number and b.constant > 0 else None


def _truncate_divide(a: Form, b: Form) -> Form | None:
    return _floor_divide(a, b) if a.least >= 0 else None


def _remainder(a: Form, b: Form) -> Form | None:
    whole = _floor_divide(a, b)
    return None if whole is None else a - whole * b.constant


def _shift_right(a: Form, b: Form) -> Form | None:
    return quotient(a, 1 << b.constant) if b.is_number and 0 <= b.constant < 63 else None


def _shift_left(a: Form, b: Form) -> Form | None:
    return a * (1 << b.constant) if b.is_number and 0 <= b.constant < 63 else None


def _bounded(a: Form, low: Form | None, high: Form | None) -> Form:
    raised = a if low is None else largest([a, low])
    return raised if high is None else smallest([raised, high])


def arithmetic(lifter: Lifter, node: Node, index: Index, function: _Linear, given: Sequence[Given]) -> Value:
    """A pointwise op that is `function` on integers: linear where that gives a form that fits, else uninterpreted."""
    dtype = val(node).dtype
    if dtype.is_complex:
        raise Opaque("complex numbers")
    operands = [as_value(g, dtype) for g in given]

    def of(*scalars: Scalar) -> Scalar:
        forms = [as_form(s) for s in scalars]
        if any(as_number(s) is None for s in scalars) and None not in forms and all(fits(f, dtype) for f in forms):  # type: ignore[arg-type]
            form = function(*forms)
            if form is not None and fits(form, dtype):
                return float(form.constant) if dtype.is_floating_point and form.is_number else form
        elif dtype.is_floating_point and len(scalars) == 2:
            same = _unchanged(node, given, scalars, dtype)
            if same is not None:
                return same
        single_operands = [
            Operand.of(exactly(s), g.dtype, g.is_scalar) if isinstance(g, Operand) else g
            for s, g in zip(scalars, given, strict=True)
        ]
        result = apply(node, _filled(node, single_operands), dtype)
        assert isinstance(result, Cases)
        return result.pieces[0][0]

    return combine(operands, of, boolean=False)


def _filled(node: Node, operands: Sequence[Any]) -> list[Any]:
    """The op's positional arguments with those that are tensors or numbers replaced by `operands`, in order."""
    rest = iter(operands)
    return [next(rest, argument) if i < len(operands) else argument for i, argument in enumerate(node.args)]


def _unchanged(node: Node, given: Sequence[Given], scalars: Sequence[Scalar], dtype: torch.dtype) -> Scalar | None:
    """x + 0, x - 0, x · 1 and x / 1 are x, at the same dtype."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    neutral = {aten.add: 0.0, aten.sub: 0.0, aten.mul: 1.0, aten.div: 1.0}.get(packet)
    if neutral is None:
        return None
    for x, other, kind in ((0, 1, given[0]), (1, 0, given[1])):
        if x == 1 and packet in (aten.sub, aten.div):
            break
        if as_number(scalars[other]) == neutral and isinstance(kind, Operand) and kind.dtype == dtype:
            return scalars[x]
    return None


def _binary(function: _Linear, boolean: Callable[..., Condition] | None = None) -> Callable[..., Value]:
    def handler(lifter: Lifter, node: Node, index: Index) -> Value:
        given = operands_of(lifter, node, index)
        if val(node).dtype == torch.bool:
            if boolean is None:
                raise Opaque("arithmetic on booleans")
            return boolean(*(truth(g) for g in given))
        return arithmetic(lifter, node, index, function, given)

    return handler


@handles(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add(lifter: Lifter, node: Node, index: Index) -> Value:
    given = operands_of(lifter, node, index)
    alpha = arguments(node)["alpha"]
    sign = 1 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1
    if val(node).dtype == torch.bool:
        if alpha != 1 or sign < 0:
            raise Opaque("arithmetic on booleans")
        return either(*(truth(g) for g in given))
    if alpha != 1 and (not isinstance(alpha, int) or not all(_scaled_fits(g, alpha, val(node).dtype) for g in given)):
        return uninterpreted(lifter, node, index)
    return arithmetic(lifter, node, index, lambda a, b: a + b * (sign * int(alpha)), given)


def _scaled_fits(given: Given, alpha: int, dtype: torch.dtype) -> bool:
    pieces = as_value(given, dtype).pieces
    return all((form := as_form(s)) is None or fits(form * alpha, dtype) for s, _ in pieces)


@handles(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(lifter: Lifter, node: Node, index: Index) -> Value:
    if arguments(node)["alpha"] != 1:
        return uninterpreted(lifter, node, index)
    return arithmetic(lifter, node, index, lambda a, b: b - a, operands_of(lifter, node, index))


handles(aten.mul.Tensor, aten.mul.Scalar)(_binary(_times, both))
handles(aten.floor_divide.default, aten.floor_divide.Scalar)(_binary(_floor_divide))
handles(aten.remainder.Tensor, aten.remainder.Scalar)(_binary(_remainder))
handles(aten.fmod.Tensor, aten.fmod.Scalar)(_binary(lambda a, b: _remainder(a, b) if a.least >= 0 else None))
handles(aten.maximum.default, aten.max.other)(_binary(lambda a, b: largest([a, b]), either))
handles(aten.minimum.default, aten.min.other)(_binary(lambda a, b: smallest([a, b]), both))
handles(aten.neg.default)(_binary(lambda a: -a))
handles(aten.abs.default)(_binary(lambda a: largest([a, -a])))
handles(aten.relu.default)(_binary(lambda a: largest([a, integer(0)])))
handles(aten.bitwise_right_shift, aten.__rshift__.Scalar, aten.__rshift__.Tensor)(_binary(_shift_right))
handles(aten.bitwise_left_shift, aten.__lshift__.Scalar, aten.__lshift__.Tensor)(_binary(_shift_left))


@handles(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _divide(lifter: Lifter, node: Node, index: Index) -> Value:
    mode = arguments(node)["rounding_mode"]
    if mode not in ("floor", "trunc") or val(node).dtype.is_floating_point:
        return uninterpreted(lifter, node, index)
    rule = _floor_divide if mode == "floor" else _truncate_divide
    return arithmetic(lifter, node, index, rule, operands_of(lifter, node, index))


@handles(aten.div.Tensor, aten.div.Scalar)
def _true_divide(lifter: Lifter, node: Node, index: Index) -> Value:
    return arithmetic(
        lifter, node, index, lambda a, b: a if b is integer(1) else None, operands_of(lifter, node, index)
    )


@handles(aten.clamp, aten.clamp_min, aten.clamp_max)
def _clamp(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    if val(node).dtype.is_floating_point:
        return uninterpreted(lifter, node, index)
    names = [name for name in ("self", "min", "max") if given.get(name) is not None]
    if names == ["self", "min", "max"] and not all(isinstance(val(given[n]), (int, SymInt)) for n in names[1:]):
        return uninterpreted(lifter, node, index)  # min and max are tensors

    def bounded(a: Form, *limits: Form) -> Form:
        at = dict(zip(names[1:], limits, strict=True))
        return _bounded(a, at.get("min"), at.get("max"))

    operands = [operand(lifter, node, given[name], index) for name in names]
    try:
        forms = [as_value(g, val(node).dtype) for g in operands]
        return combine(forms, lambda *s: _all_forms(bounded, s, val(node).dtype), boolean=False)
    except Opaque:
        return uninterpreted(lifter, node, index)


def _all_forms(function: Callable[..., Form], scalars: Sequence[Scalar], dtype: torch.dtype) -> Form:
    forms = [as_form(s) for s in scalars]
    if any(f is None or not fits(f, dtype) for f in forms):
        raise Opaque("numbers that are not known to fit")
    return function(*forms)
