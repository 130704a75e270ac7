"""Operands of pointwise ops: as numbers, as truth values, and as what an op takes that is not interpreted.

What torch computes is not what algebra says, so a step is taken only if both agree for every value that can occur:

    integers        a result that might not fit its dtype is not interpreted: int8 wraps
    floats          an integer in a floating dtype counts as a linear form up to 2^24 (float32) or 2^8 (bfloat16)
    constants       are folded by the op itself, at its dtypes: finfo.min + finfo.min is -inf
    comparisons     are done in the dtype that torch promotes both sides to; both must fit it

An op that is not interpreted becomes a function of what its operands depend on. `arithmetic` and `logic` hold the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_mutable, val
from fxopt.match.masks.conditions import FALSE, TRUE, Condition, all_of, any_of, constant, ne, negate
from fxopt.match.masks.forms import Apply, Form, integer, single
from fxopt.match.masks.lift import FALLBACKS, Index, Lifter
from fxopt.match.masks.values import Cases, Opaque, Operand, Scalar, Value, combine, exactly, numbers, of_atom

#: the op that an unknown number's truth is written with
NOT_ZERO = aten.ne.Scalar

#: a Python number, or a value with its dtype and whether its tensor has no dimensions
Given = Operand | bool | int | float


def operand(lifter: Lifter, node: Node, argument: Any, index: Index) -> Given:
    """An argument of the pointwise op `node`, for the element of the result at `index`."""
    value = val(argument)
    if isinstance(value, Tensor):
        own = lifter.broadcast(node, argument, index)
        return Operand.of(lifter.value(argument, own, node), value.dtype, value.dim() == 0)
    if isinstance(value, SymInt):
        return Operand.of(exactly(lifter.size(value)), torch.int64, True)
    if isinstance(value, (bool, int, float)) and not isinstance(value, SymFloat):
        return value
    raise Opaque(f"{argument} is neither a tensor nor a known number")


def as_value(given: Given, dtype: torch.dtype) -> Cases:
    """An operand as numbers; Python numbers as they are, not rounded to `dtype`."""
    if isinstance(given, Operand):
        return numbers(given.value, given.dtype)
    if dtype.is_floating_point or isinstance(given, float):
        return exactly(float(given))
    return exactly(integer(int(given)))


@lru_cache(maxsize=4096)
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number as `dtype` holds it."""
    return torch.tensor(value, dtype=torch.float64).to(dtype).item()


@lru_cache(maxsize=4096)
def _promoted(kinds: tuple[Any, ...]) -> torch.dtype:
    """The dtype that torch promotes operands to: each is (dtype, has no dimensions) or a type of Python number."""
    dtype: Any = None
    with torch.utils._python_dispatch._disable_current_modes():
        examples = [torch.empty([] if k[1] else [1], dtype=k[0]) if isinstance(k, tuple) else k(1) for k in kinds]
        dtype = torch.result_type(*examples) if len(examples) > 1 else examples[0].dtype
    return dtype


def common_dtype(operands: Sequence[Given]) -> torch.dtype:
    """The dtype that a binary op computes in."""
    kinds = tuple((o.dtype, o.is_scalar) if isinstance(o, Operand) else type(o) for o in operands)
    if len(kinds) == 2 and kinds[0] == kinds[1] and isinstance(kinds[0], tuple):
        return kinds[0][0]
    return _promoted(kinds)


def as_form(scalar: Scalar) -> Form | None:
    """A case's value as a linear form, if it is an integer."""
    if isinstance(scalar, Form):
        return scalar
    if isinstance(scalar, float) and math.isfinite(scalar) and scalar == int(scalar) and abs(scalar) <= 2**53:
        return integer(int(scalar))
    return None


def as_number(scalar: Scalar) -> bool | int | float | None:
    """A case's value as a plain number."""
    if isinstance(scalar, float):
        return scalar
    return scalar.constant if isinstance(scalar, Form) and scalar.is_number else None


# What is not interpreted


def apply(node: Node, operands: Sequence[Any], dtype: torch.dtype | None = None) -> Value:
    """The op of `node` on operands (Given or any literal), folded where all are numbers, otherwise uninterpreted."""
    dtype = val(node).dtype if dtype is None else dtype
    keywords = tuple(sorted((k, v) for k, v in node.kwargs.items() if v is not None))
    if any(isinstance(v, Node) for _, v in keywords):
        raise Opaque("a keyword argument that is a node")
    plain = [_plain(o) if isinstance(o, Operand) else o for o in operands]
    if not any(p is None and isinstance(o, Operand) for p, o in zip(plain, operands, strict=True)):
        kinds = tuple((o.dtype, o.is_scalar) if isinstance(o, Operand) else None for o in operands)
        return _folded(node.target, tuple(map(_hashable, plain)), kinds, keywords, dtype, repr(plain))
    keyed = tuple((k, _hashable(v)) for k, v in keywords)
    return of_atom(Apply.of(node.target, tuple(map(_hashable, operands)), keyed, dtype))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(given: Operand) -> bool | int | float | None:
    value = given.value
    if value is TRUE or value is FALSE:
        return value is TRUE
    if isinstance(value, Cases) and len(value.pieces) == 1:
        return as_number(value.pieces[0][0])
    return None


@lru_cache(maxsize=4096)
def _folded(
    target: Any, plain: tuple[Any, ...], kinds: tuple[Any, ...], keywords: tuple[Any, ...], dtype: torch.dtype, _: str
) -> Value:
    # The last argument tells apart for the cache what is equal: 0.0 and -0.0, 1 and True.
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        arguments_ = [
            torch.tensor(p, dtype=k[0]).reshape([] if k[1] else [1]) if k is not None else p
            for p, k in zip(plain, kinds, strict=True)
        ]
        result = target(*arguments_, **{k: v for k, v in keywords if k not in ("device", "pin_memory")})
    if not isinstance(result, Tensor) or result.numel() != 1 or result.dtype != dtype:
        raise Opaque("folding gives another dtype")
    value: Any = result.item()
    if dtype == torch.bool:
        return constant(value)
    return exactly(value if dtype.is_floating_point else integer(value))


def _lifted(lifter: Lifter, node: Node, index: Index) -> list[Any]:
    """All positional arguments of a pointwise op: tensors and sizes lifted, literals as they are."""
    given: list[Any] = []
    for argument in node.args:
        value = val(argument)
        if isinstance(value, (Tensor, SymInt)):
            given.append(operand(lifter, node, argument, index))
        elif isinstance(argument, Node) or isinstance(value, (SymFloat, torch.SymBool)):
            raise Opaque("an argument that is no known number")
        else:
            given.append(argument)
    return given


def uninterpreted(lifter: Lifter, node: Node, index: Index) -> Value:
    """The op as a function of its operands that nothing more is known of."""
    return apply(node, _lifted(lifter, node, index))


def _is_plain_pointwise(node: Node) -> bool:
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or is_mutable(node):
        return False
    return isinstance(val(node), Tensor) and any(isinstance(val(a), Tensor) for a in node.args)


FALLBACKS.append((_is_plain_pointwise, uninterpreted))


# Truth


def truth(given: Given) -> Condition:
    """Whether an operand is not zero."""
    if not isinstance(given, Operand):
        return constant(bool(given))
    if not isinstance(given.value, Cases):
        return given.value

    def of(scalar: Scalar) -> Condition:
        form, number = as_form(scalar), as_number(scalar)
        if number is not None:
            return constant(number != 0)
        if form is not None:
            return ne(form)
        unknown = Operand.of(exactly(scalar), given.dtype, given.is_scalar)
        return ne(single(Apply.of(NOT_ZERO, (unknown, 0), (), torch.bool)))

    found = combine([given.value], of, boolean=True)
    assert not isinstance(found, Cases)
    return found


def both(a: Condition, b: Condition) -> Condition:
    """a and b"""
    return all_of([a, b])


def either(a: Condition, b: Condition) -> Condition:
    """a or b"""
    return any_of([a, b])


def differ(a: Condition, b: Condition) -> Condition:
    """Just one of a and b"""
    return any_of([all_of([a, negate(b)]), all_of([negate(a), b])])


def operands_of(lifter: Lifter, node: Node, index: Index) -> list[Given]:
    """The operands `self` and `other` (if it has one) of a pointwise op."""
    given = arguments(node)
    names = [name for name in ("self", "other") if name in given]
    return [operand(lifter, node, given[name], index) for name in names]
