"""Following views and tensors without content: a view moves the index, `arange` is the index, `full` is a number.

permute    y[i, j] = x[j, i]            slice      y[i] = x[start + step · i]
expand     y[i, j] = x[0, j]            cat        y[i] = a[i] where i < n, else b[i - n]
reshape    y[i, j] = x[n · i + j]       pad        y[i] = x[i - before] where 0 <= i - before < n, else a number
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import COPIES, PERMUTES, RESHAPES, arguments, aten, permutation, val
from fxopt.match.masks.conditions import FALSE, Condition, all_of, constant, eq, le
from fxopt.match.masks.forms import Form, fits, integer, integer_range, quotient, remainder
from fxopt.match.masks.lift import Index, Lifter, handles, tensor
from fxopt.match.masks.values import Opaque, Value, choose, exactly


@handles(*COPIES, aten.detach.default)
def _copy(lifter: Lifter, node: Node, index: Index) -> Value:
    return lifter.value(tensor(node.args[0]), index, node)


@handles(*PERMUTES)
def _permute(lifter: Lifter, node: Node, index: Index) -> Value:
    order = permutation(node)
    if order is None:
        raise Opaque("the permutation is not known")
    own = [integer(0)] * len(order)
    for i, d in enumerate(order):
        own[d] = index[i]
    return lifter.value(tensor(node.args[0]), tuple(own), node)


@handles(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(lifter: Lifter, node: Node, index: Index) -> Value:
    source = tensor(node.args[0])
    return lifter.value(source, lifter.broadcast(node, source, index), node)


@handles(*RESHAPES)
def _reshape(lifter: Lifter, node: Node, index: Index) -> Value:
    source = tensor(node.args[0])
    return lifter.value(source, reshaped(lifter, index, val(node).shape, val(source).shape), node)


def reshaped(lifter: Lifter, index: Index, shape: Sequence[Any], source: Sequence[Any]) -> Index:
    """The index into a tensor of shape `source` of the element at `index` of it reshaped to `shape`.

    Dimensions that have kept their size keep their index; between those, static sizes are divided and multiplied.
    Raises Opaque where sizes that are not numbers would have to be.
    """
    new = [(n, i) for n, i in zip(shape, index, strict=True) if not lifter.same(n, 1)]
    old = [d for d, n in enumerate(source) if not lifter.same(n, 1)]
    own = [integer(0)] * len(source)
    while new and old:
        if lifter.same(new[0][0], source[old[0]]):
            own[old.pop(0)] = new.pop(0)[1]
            continue
        if lifter.same(new[-1][0], source[old[-1]]):
            own[old.pop()] = new.pop()[1]
            continue
        inner = [n for n, _ in new[1:]] + [source[d] for d in old[1:]]
        if not all(isinstance(n, int) for n in inner):
            raise Opaque("a reshape of symbolic sizes")
        flat = integer(0)
        for at, (_, i) in enumerate(new):
            flat = flat + i * _product([n for n, _ in new[at + 1 :]])
        for at, d in enumerate(old):
            place = quotient(flat, _product([source[e] for e in old[at + 1 :]]))
            own[d] = remainder(place, source[d]) if at else place
        return tuple(own)
    if new or old:
        raise Opaque("a reshape of empty tensors")
    return tuple(own)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total


def at(index: Index, dim: int, form: Form) -> Index:
    """The index with one dimension replaced."""
    dim %= len(index)
    return (*index[:dim], form, *index[dim + 1 :])


def position(lifter: Lifter, given: Any, size: Any, default: int = 0) -> Form:
    """A position in a dimension as slice and select take it: negative counts from the end. Raises Opaque if unknown."""
    form = integer(default) if given is None else lifter.size(given)
    if form.least >= 0:
        return form
    if form.most < 0 and (form + lifter.size(size)).least >= 0:
        return form + lifter.size(size)
    raise Opaque("a position that may be negative")


@handles(aten.slice.Tensor)
def _slice(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    source, dim, step = tensor(given["self"]), given["dim"], given["step"]
    size = val(source).shape[dim]
    start = given["start"]
    if isinstance(start, int) and isinstance(size, int):
        first = integer(max(0, min(size, start + size if start < 0 else start)))
    elif isinstance(start, int) and start < 0 and (lifter.size(size) + start).most < 0:
        first = integer(0)
    else:
        first = position(lifter, start, size)
    if not isinstance(step, int):
        raise Opaque("a step that is no number")
    return lifter.value(source, at(index, dim, first + index[dim % len(index)] * step), node)


@handles(aten.narrow.default)
def _narrow(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    source, dim = tensor(given["self"]), given["dim"]
    first = position(lifter, given["start"], val(source).shape[dim])
    return lifter.value(source, at(index, dim, first + index[dim % len(index)]), node)


@handles(aten.select.int)
def _select(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    source = tensor(given["self"])
    dim = given["dim"] % val(source).dim()
    first = position(lifter, given["index"], val(source).shape[dim])
    return lifter.value(source, (*index[:dim], first, *index[dim:]), node)


@handles(operator.getitem)
def _part(lifter: Lifter, node: Node, index: Index) -> Value:
    """One of the pieces that a dimension was split into."""
    pieces, number = node.args
    if not isinstance(pieces, Node) or not isinstance(number, int):
        raise Opaque("no piece of a tensor")
    given = arguments(pieces)
    source = given.get("self")
    if pieces.target is aten.unbind.int:
        dim = given["dim"] % val(source).dim()
        return lifter.value(source, (*index[:dim], integer(number % len(val(pieces))), *index[dim:]), node)
    if pieces.target not in _SPLITS:
        raise Opaque("no piece of a tensor")
    dim = given["dim"] % len(index)
    before = integer(0)
    for piece in val(pieces)[:number]:
        before = before + lifter.size(piece.shape[dim])
    return lifter.value(source, at(index, dim, index[dim] + before), node)


_SPLITS = frozenset(
    {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections}
)


@handles(aten.flip.default)
def _flip(lifter: Lifter, node: Node, index: Index) -> Value:
    source = tensor(node.args[0])
    for dim in arguments(node)["dims"]:
        index = at(index, dim, lifter.size(val(source).shape[dim]) - 1 - index[dim % len(index)])
    return lifter.value(source, index, node)


@handles(aten.roll.default)
def _roll(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    source = tensor(given["self"])
    shape = val(source).shape
    shifts, dims = ([x] if isinstance(x, int) else list(x) for x in (given["shifts"], given["dims"]))
    dims = dims or ([0] if len(shape) == 1 else [])
    if len(dims) != len(shifts) or not all(isinstance(x, int) for x in shifts):
        raise Opaque("a roll over all dimensions at once")
    for shift, dim in zip(shifts, dims, strict=True):
        if not isinstance(shape[dim], int):
            raise Opaque("a roll of a symbolic size")
        index = at(index, dim, remainder(index[dim % len(index)] - shift, shape[dim]))
    return lifter.value(source, index, node)


@handles(aten.repeat.default)
def _repeat(lifter: Lifter, node: Node, index: Index) -> Value:
    source = tensor(node.args[0])
    shape = val(source).shape
    own = []
    for n, m, i in zip(
        shape, val(node).shape[len(index) - len(shape) :], index[len(index) - len(shape) :], strict=True
    ):
        if lifter.same(n, m):
            own.append(i)
        elif isinstance(n, int) and n > 0:
            own.append(remainder(i, n))
        else:
            raise Opaque("a symbolic size is repeated")
    return lifter.value(source, tuple(own), node)


@handles(aten.repeat_interleave.self_int)
def _repeat_interleave(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    times = given["repeats"]
    dim = 0 if given["dim"] is None and len(val(given["self"]).shape) == 1 else given["dim"]
    if not isinstance(times, int) or times < 1 or dim is None:
        raise Opaque("elements are repeated an unknown number of times")
    return lifter.value(tensor(given["self"]), at(index, dim, quotient(index[dim % len(index)], times)), node)


# Joined tensors


@handles(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _cat(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    parts = [tensor(part) for part in given["tensors"]]
    return concatenated(lifter, node, parts, given["dim"], index)


def concatenated(lifter: Lifter, node: Node, parts: Sequence[Node], dim: int, index: Index) -> Value:
    """The element at `index` of `parts` one after the other along `dim`, as `node` reads them."""
    dim %= len(index)
    dtype = val(node).dtype
    if any(val(part).dtype != dtype or val(part).dim() != len(index) for part in parts):
        raise Opaque("parts of several dtypes or ranks")
    ends, end = [], integer(0)
    for part in parts:
        end = end + lifter.size(val(part).shape[dim])
        ends.append(end)
    result: Value | None = None
    for part, end in reversed(list(zip(parts, ends, strict=True))):
        inside = le(index[dim] - end + 1)  # before the end of this part: it or one before
        if inside is FALSE:
            continue
        start = end - lifter.size(val(part).shape[dim])
        own = lifter.value(part, at(index, dim, index[dim] - start), node)
        result = own if result is None else choose(inside, own, result, dtype)
    if result is None:
        raise Opaque("an index beyond the end")
    return result


@handles(aten.stack.default)
def _stack(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    dim = given["dim"] % len(index)
    parts = [tensor(part) for part in given["tensors"]]
    dtype = val(node).dtype
    if any(val(part).dtype != dtype for part in parts):
        raise Opaque("parts of several dtypes")
    rest = (*index[:dim], *index[dim + 1 :])
    result = lifter.value(parts[-1], rest, node)
    for number, part in reversed(list(enumerate(parts[:-1]))):
        result = choose(eq(index[dim] - number), lifter.value(part, rest, node), result, dtype)
    return result


@handles(aten.constant_pad_nd.default, aten.pad.default)
def _pad(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    source, pads = tensor(given["self"]), list(given["pad"])
    if given.get("mode", "constant") != "constant":
        raise Opaque("padding with what is there")
    shape = val(source).shape
    inside: list[Condition] = []
    for k in range(len(pads) // 2):
        dim = len(index) - 1 - k
        before = lifter.size(pads[2 * k])
        moved = index[dim] - before
        inside += [le(-moved), le(moved - lifter.size(shape[dim]) + 1)]
        index = at(index, dim, moved)
    condition = all_of(inside)
    outside = constant_value(given["value"] or 0, val(node).dtype)
    return choose(condition, lifter.value(source, index, node), outside, val(node).dtype)


# Tensors without content


def constant_value(value: Any, dtype: torch.dtype) -> Value:
    """A number as `dtype` holds it."""
    value = val(value)
    if not isinstance(value, (bool, int, float)):
        raise Opaque(f"{value} is no number")
    if dtype == torch.bool:
        return constant(bool(value))
    if dtype.is_floating_point:
        return exactly(torch.tensor(float(value), dtype=torch.float64).to(dtype).item())
    least, most = integer_range(dtype)
    if value != value or not least <= value <= most or int(value) != value:
        raise Opaque(f"{value} does not fit {dtype}")
    return exactly(integer(int(value)))


def _symbolic(lifter: Lifter, value: Any, dtype: torch.dtype) -> Value:
    if isinstance(val(value), torch.SymInt) and dtype == torch.int64:
        return exactly(lifter.size(value))
    return constant_value(value, dtype)


@handles(aten.zeros, aten.zeros_like, aten.new_zeros)
def _zeros(lifter: Lifter, node: Node, index: Index) -> Value:
    return constant_value(0, val(node).dtype)


@handles(aten.ones, aten.ones_like, aten.new_ones)
def _ones(lifter: Lifter, node: Node, index: Index) -> Value:
    return constant_value(1, val(node).dtype)


@handles(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(lifter: Lifter, node: Node, index: Index) -> Value:
    return _symbolic(lifter, arguments(node)["fill_value"], val(node).dtype)


@handles(aten.scalar_tensor.default)
def _scalar_tensor(lifter: Lifter, node: Node, index: Index) -> Value:
    return _symbolic(lifter, arguments(node)["s"], val(node).dtype)


def _whole(number: Any) -> Any:
    """A float that is an integer as one: arange(1.0, 5.0) holds integers too."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(lifter: Lifter, node: Node, index: Index) -> Value:
    given = arguments(node)
    step, first = _whole(given.get("step", 1)), _whole(given.get("start", 0))
    start = lifter.size(first)
    if not isinstance(step, int):
        raise Opaque("steps that are no integer")
    form = start + index[0] * step
    dtype = val(node).dtype
    # The first and last element tell whether all fit; the index itself may be moved beyond by a slice.
    last = start + (lifter.size(val(node).shape[0]) - 1) * step
    if not fits(start, dtype) or not fits(last, dtype):
        raise Opaque("integers that the dtype may not hold")
    return exactly(float(form.constant) if dtype.is_floating_point and form.is_number else form)


@handles(aten.eye.default, aten.eye.m)
def _eye(lifter: Lifter, node: Node, index: Index) -> Value:
    dtype = val(node).dtype
    return choose(eq(index[0] - index[1]), constant_value(1, dtype), constant_value(0, dtype), dtype)


def _triangle(lifter: Lifter, node: Node, index: Index, kept: Condition) -> Value:
    source, dtype = tensor(node.args[0]), val(node).dtype
    own = lifter.value(source, index, node) if kept is not FALSE else constant_value(0, dtype)
    return choose(kept, own, constant_value(0, dtype), dtype)


@handles(aten.tril.default)
def _tril(lifter: Lifter, node: Node, index: Index) -> Value:
    diagonal = lifter.size(arguments(node)["diagonal"])
    return _triangle(lifter, node, index, le(index[-1] - index[-2] - diagonal))


@handles(aten.triu.default)
def _triu(lifter: Lifter, node: Node, index: Index) -> Value:
    diagonal = lifter.size(arguments(node)["diagonal"])
    return _triangle(lifter, node, index, le(index[-2] - index[-1] + diagonal))
