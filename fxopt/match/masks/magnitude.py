"""How large a number can be that is added to scores: is it a bias, or can it take keys out?

A mask of {0, finfo.min} may be told apart from what else is added only if that leaves the live keys of a row live, and
masked ones masked. An infinite number does neither, nor does one near finfo.min; so what is added must be bounded:

    integers      by their dtype: int64 holds none beyond 2^63
    arithmetic    by intervals
    parameters    are taken for moderate, as the weights are that scores are made of
    numbers       that are the same for all batches, rows and keys (a slope a head) can't take out some of the keys

An element of any other tensor may be a mask's, and the result of an op that isn't known may be anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import aten
from fxopt.match.masks.forms import Apply, Coordinate, Form, Read
from fxopt.match.masks.values import Cases, Operand, Scalar, Value

#: beside scores of this size finfo.min stays what it is, in float32, bfloat16 and float64
MODERATE = 1e30
#: what a parameter's element, or a number a head, is taken to be below
WEIGHT = 1e9

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)


def is_moderate(value: Value, factor: float = 1.0) -> bool:
    """Whether every element, times a positive factor, is certainly a number (not NaN) within +-MODERATE."""
    low, high = _of_value(value)
    return -MODERATE <= low * factor <= high * factor <= MODERATE


def is_parameter(node: Node) -> bool:
    """Whether the node is an input of the graph that a module holds as its parameter."""
    source = getattr(node, "_dynamo_source", None) if node.op == "placeholder" else None
    while source is not None:
        if getattr(source, "member", None) == "_parameters":
            return True
        source = getattr(source, "base", None)
    return False


def _of_value(value: Value) -> Interval:
    if not isinstance(value, Cases):
        return 0.0, 1.0
    found = [_of_scalar(scalar) for scalar, _ in value.pieces]
    return min(low for low, _ in found), max(high for _, high in found)


def _of_scalar(scalar: Scalar) -> Interval:
    if isinstance(scalar, float):
        return ANY if math.isnan(scalar) else (scalar, scalar)
    if isinstance(scalar, Form):
        return max(float(scalar.least), -(2.0**63)), min(float(scalar.most), 2.0**63)
    if isinstance(scalar, Read):
        return _of_read(scalar)
    rule = _RULES.get(getattr(scalar.target, "overloadpacket", None))
    if rule is None or any(name != "alpha" and value is not None for name, value in scalar.keywords):
        return ANY
    operands = [_of_operand(o) for o in scalar.operands if not isinstance(o, torch.dtype)]
    try:
        low, high = rule(scalar, operands)
    except (OverflowError, ValueError, ZeroDivisionError):
        return ANY
    return _held(low, high, scalar.dtype)


def _of_read(read: Read) -> Interval:
    if not read.dtype.is_floating_point:
        return _held(-(2.0**63), 2.0**63, read.dtype)
    places = {atom.name for form in read.index for atom in form.atoms if isinstance(atom, Coordinate)}
    if not is_parameter(read.node) and not places <= {"h"}:
        return ANY
    return -WEIGHT, WEIGHT


def _of_operand(operand: Any) -> Interval:
    if isinstance(operand, Operand):
        return _of_value(operand.value)
    if isinstance(operand, (bool, int, float)):
        return float(operand), float(operand)
    return ANY


def _held(low: float, high: float, dtype: torch.dtype) -> Interval:
    """The interval as a dtype holds it: a float that is beyond it becomes infinite, an integer wraps."""
    if math.isnan(low) or math.isnan(high):
        return ANY
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max
        return ANY if low < -most or high > most else (low, high)
    if dtype == torch.bool:
        return 0.0, 1.0
    info = torch.iinfo(dtype)
    return (low, high) if info.min <= low and high <= info.max else (float(info.min), float(info.max))


def _corners(function: Callable[..., float], operands: Sequence[Interval]) -> Interval:
    """What a function that is monotonic in each of two operands, whatever the other, is between."""
    (a, b), (c, d) = operands
    found = [function(x, y) for x in (a, b) for y in (c, d)]
    return (math.nan, math.nan) if any(map(math.isnan, found)) else (min(found), max(found))


def _scaled(apply: Apply, operands: Sequence[Interval]) -> list[Interval]:
    """Two operands, the second one times `alpha`."""
    alpha = dict(apply.keywords).get("alpha", 1)
    first, (low, high) = operands[:2]
    return [first, (min(low * alpha, high * alpha), max(low * alpha, high * alpha))]


def _add(apply: Apply, operands: Sequence[Interval]) -> Interval:
    return _corners(lambda x, y: x + y, _scaled(apply, operands))


def _sub(apply: Apply, operands: Sequence[Interval]) -> Interval:
    return _corners(lambda x, y: x - y, _scaled(apply, operands))


def _mul(apply: Apply, operands: Sequence[Interval]) -> Interval:
    return _corners(lambda x, y: x * y, operands)


def _div(apply: Apply, operands: Sequence[Interval]) -> Interval:
    low, high = operands[1]
    if len(operands) > 2 or low <= 0.0 <= high:
        return ANY
    return _corners(lambda x, y: x / y, operands)


def _pow(apply: Apply, operands: Sequence[Interval]) -> Interval:
    return _corners(lambda x, y: x**y, operands) if operands[0][0] > 0.0 else ANY


def _reciprocal(apply: Apply, operands: Sequence[Interval]) -> Interval:
    return _div(apply, [(1.0, 1.0), operands[0]])


def _rising(function: Callable[[float], float]) -> Callable[[Apply, Sequence[Interval]], Interval]:
    return lambda apply, operands: (function(operands[0][0]), function(operands[0][1]))


def _abs(apply: Apply, operands: Sequence[Interval]) -> Interval:
    low, high = operands[0]
    return 0.0, max(abs(low), abs(high))


_RULES: dict[Any, Callable[[Apply, Sequence[Interval]], Interval]] = {
    aten.add: _add,
    aten.sub: _sub,
    aten.mul: _mul,
    aten.div: _div,
    aten.pow: _pow,
    aten.reciprocal: _reciprocal,
    aten.neg: lambda apply, operands: (-operands[0][1], -operands[0][0]),
    aten.abs: _abs,
    aten.to: _rising(lambda x: x),
    aten.exp: _rising(math.exp),
    aten.exp2: _rising(lambda x: 2.0**x),
    aten.sqrt: _rising(math.sqrt),
    aten.sigmoid: lambda apply, operands: (0.0, 1.0) if operands[0] != ANY else ANY,
    aten.tanh: lambda apply, operands: (-1.0, 1.0) if operands[0] != ANY else ANY,
}
