"""Following reads at computed indices, and sums along a dimension.

    index, gather, embedding      x[f(i)]: the indices are lifted, then x is at those forms, if they can't be negative
    diff                          x[i] - x[i - 1]
    cumsum                        c · (i + 1) where every summand is the number c; otherwise an element of its own

What other reductions give (sum, any, all) is read as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, val
from fxopt.match.masks.conditions import Condition, all_of
from fxopt.match.masks.forms import Form, coordinate, fits
from fxopt.match.masks.lift import Index, Lifter, handles, tensor
from fxopt.match.masks.operands import as_number
from fxopt.match.masks.values import Cases, Opaque, Scalar, Value, by_cases, choose, combine, exactly, numbers
from fxopt.match.masks.views import at, concatenated

#: the coordinate that summands are looked at with
SUMMAND = "k"


def _look_up(lifter: Lifter, node: Node, source: Node, place: list[Form | Cases]) -> Value:
    """The element of `source` at indices that may go by cases."""
    result: Value | None = None
    dtype = val(source).dtype
    choices = [p.pieces if isinstance(p, Cases) else exactly(p).pieces for p in place]
    for combination in itertools.product(*choices):
        condition: Condition = all_of([c for _, c in combination])
        forms = [s for s, _ in combination]
        if not all(isinstance(f, Form) for f in forms):
            raise Opaque("an index that is not known")
        own = lifter.value(source, tuple(forms), node)  # type: ignore[arg-type]
        result = own if result is None else choose(condition, own, result, dtype)
    assert result is not None
    return result


def _indices(lifter: Lifter, node: Node, indices: Node, index: Index, *, wraps: bool = True) -> Cases:
    """The lifted elements of a tensor of indices. Those that might count from the end raise Opaque."""
    if val(indices).dtype not in (torch.int64, torch.int32):
        raise Opaque("a mask in place of indices")
    found = lifter.value(indices, index, node)
    assert isinstance(found, Cases)
    for scalar, _ in found.pieces:
        if wraps and not (isinstance(scalar, Form) and scalar.least >= 0):
            raise Opaque("an index that may be negative")
    return found


@handles(aten.index.Tensor)
def _index(lifter: Lifter, node: Node, index: Index) -> Value:
    source, indices = tensor(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    rank = val(source).dim()
    indices += [None] * (rank - len(indices))
    used = [d for d, given in enumerate(indices) if given is not None]
    if not used or any(val(indices[d]).dtype in (torch.bool, torch.uint8) for d in used):
        raise Opaque("a mask in place of indices")
    shape = lifter.joined(val(indices[d]).shape for d in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0
    own, rest = index[first : first + len(shape)], [*index[:first], *index[first + len(shape) :]]
    place: list[Form | Cases] = []
    for given in indices:
        if given is None:
            place.append(rest.pop(0))
        else:
            place.append(_indices(lifter, node, given, lifter.into(val(given).shape, shape, own)))
    return _look_up(lifter, node, source, place)


@handles(aten.index_select.default)
def _index_select(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dim = given["dim"] % len(index)
    place: list[Form | Cases] = list(index)
    own = () if val(given["index"]).dim() == 0 else (index[dim],)
    place[dim] = _indices(lifter, node, given["index"], own)
    return _look_up(lifter, node, tensor(given["self"]), place)


@handles(aten.gather.default)
def _gather(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    if val(given["index"]).dim() == 0:
        raise Opaque("a gather without dimensions")
    place: list[Form | Cases] = list(index)
    place[given["dim"] % len(index)] = _indices(lifter, node, given["index"], index, wraps=False)
    return _look_up(lifter, node, tensor(given["self"]), place)


@handles(aten.embedding.default)
def _embedding(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    row = _indices(lifter, node, tensor(given["indices"]), index[:-1], wraps=False)
    return _look_up(lifter, node, tensor(given["weight"]), [row, index[-1]])


@handles(aten.diff.default)
def _diff(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dtype = val(node).dtype
    if given["n"] != 1 or dtype == torch.bool or dtype.is_floating_point:
        raise Opaque("a diff of order two, or of floats")
    parts = [given[name] for name in ("prepend", "self", "append") if given[name] is not None]
    dim = given["dim"] % len(index)
    if any(not isinstance(val(p), Tensor) or val(p).dtype != dtype for p in parts):
        raise Opaque("parts of several dtypes")
    after = concatenated(lifter, node, parts, dim, at(index, dim, index[dim] + 1))
    before = concatenated(lifter, node, parts, dim, index)
    return combine([numbers(after, dtype), numbers(before, dtype)], _difference(dtype), boolean=False)


def _difference(dtype: torch.dtype) -> Any:
    def of(a: Scalar, b: Scalar) -> Scalar:
        if not isinstance(a, Form) or not isinstance(b, Form) or not fits(a - b, dtype):
            raise Opaque("differences that may wrap")
        return a - b

    return of


def summand(lifter: Lifter, node: Node, index: Sequence[Form], form: Form) -> Value:
    """What a cumulative sum adds at position `form` of its dimension, elsewhere at `index`."""
    given = arguments(node)
    return lifter.value(tensor(given["self"]), at(tuple(index), given["dim"], form), node)


@handles(aten.cumsum.default)
def _cumsum(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dtype = val(node).dtype
    if dtype.is_floating_point or val(given["self"]).dtype.is_floating_point or dtype.is_complex or not index:
        raise Opaque("a cumulative sum of floats")
    dim = given["dim"] % len(index)
    k = coordinate(SUMMAND, lifter.size(val(node).shape[dim]))
    pieces = numbers(summand(lifter, node, index, k), dtype).pieces
    number = as_number(pieces[0][0]) if len(pieces) == 1 else None
    if number is None or number != int(number):
        raise Opaque("summands that vary, or are no integers")
    total = (index[dim] + 1) * int(number)
    if not fits(total, dtype):
        raise Opaque("a sum that may wrap")
    return by_cases([(total, pieces[0][1])])
