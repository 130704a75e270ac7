"""What a program does to the last dimension of a tensor, lane by lane: slices, cats, signs, and tables multiplied on.

A value that is computed from x is described by where each of its lanes comes from:

    value[..., i] = Σ over tables t of   sign_t[i] · x[..., lane_t[i]] · t[..., place_t[i]]

and a table of None stands for 1. The leading dimensions stay as they are throughout; the last one may be split into
several, whose lanes can be reordered, selected and joined again. All spellings of a rotary embedding have the same
description, so they are compared by it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_cast, is_permute, is_reshape, is_tensor, permutation, val
from fxopt.graph.symbols import is_static, same_shape
from fxopt.match.spelling import source

aten = torch.ops.aten

Lanes = Any  # an array of numpy integers

#: how deep a value is looked into
_DEPTH = 16

#: ops with several results, which are lanes of their argument
PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


@dataclass(frozen=True)
class Term:
    """One summand: for each lane its sign (0: not there), the lane of x, and the table's lane."""

    sign: Lanes
    lane: Lanes
    place: Lanes

    def each(self, move: Any) -> Term:
        """The term with its lanes moved: `move` acts on each array alike."""
        return Term(move(self.sign), move(self.lane), move(self.place))


Value = dict["Node | None", Term]


class Reader:
    """Describes values as lanes of `x`, whose last dimension must be static. Remembers what it has read."""

    def __init__(self, x: Node) -> None:
        self.x = x
        self.leading = val(x).shape[:-1]
        lanes = np.arange(int(val(x).shape[-1]))
        self._known: dict[Node, Value | None] = {x: {None: Term(np.ones_like(lanes), lanes, np.zeros_like(lanes))}}
        self.dtypes: dict[Node, torch.dtype] = {}  # of the sums and products
        self.rounded: dict[Node, torch.dtype] = {}  # of the casts that round a finished rotation

    def read(self, node: Any, depth: int = 0) -> Value | None:
        """The lanes of `node`, or None where it is no such value (it may be a table)."""
        if not isinstance(node, Node) or node.op != "call_function" or depth > _DEPTH:
            return self._known.get(node) if isinstance(node, Node) else None
        if node not in self._known:
            twin = _twins(node, self.x)  # a model that casts q for each of the two products casts it twice
            found = self._known[self.x] if twin else self._read(node, depth + 1) if is_tensor(node) else None
            self._known[node] = found
        return self._known[node]

    def nodes(self, root: Node) -> set[Node]:
        """`root` and all below it that are lanes of x, x itself left out."""
        found, work = {root}, [root]
        while work:
            for before in work.pop().all_input_nodes:
                inside = self._known.get(before) is not None or is_call(before, *PARTS)
                if inside and before is not self.x and before not in found:
                    found.add(before)
                    work.append(before)
        # A twin is computed from what x is computed from: only with that does anybody see that they are equal.
        return found.union(*(_own(node, self.x) for node in found if _twins(node, self.x)))

    def _read(self, node: Node, depth: int) -> Value | None:
        before = source(node)
        if before is not None and same_shape(val(before).shape, val(node).shape):
            return self.read(before, depth)
        if is_call(node, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default):
            return self._arithmetic(node, depth)
        if is_call(node, aten.cat.default, aten.stack.default):
            return self._joined(node, depth)
        if is_call(node, operator.getitem) and is_call(node.args[0], *PARTS):
            parts: Any = node.args[0]
            return self._part(node, parts, depth)
        value = self.read(node.args[0], depth) if node.args else None
        if value is None:
            return None
        if is_cast(node) and len(set(value) - {None}) == 2:
            self.rounded[node] = val(node).dtype
            return value
        if is_call(node, aten.slice.Tensor, aten.select.int):
            return self._sliced(node, value)
        if is_permute(node):
            return self._permuted(node, value)
        if is_reshape(node):
            return self._reshaped(node, value)
        return None

    def _arithmetic(self, node: Node, depth: int) -> Value | None:
        operands = [self.read(a, depth) for a in node.args[:2]]
        self.dtypes[node] = val(node).dtype
        if is_call(node, aten.neg.default):
            return _negated(operands[0])
        if is_call(node, aten.mul.Tensor):
            a, b = node.args
            if operands[0] is not None and operands[1] is None:
                return self._times(node, operands[0], b)
            return self._times(node, operands[1], a) if operands[0] is None else None
        left, right = operands
        right = _negated(right) if is_call(node, aten.sub.Tensor) else right
        if left is None or right is None or set(left) & set(right) or arguments(node)["alpha"] != 1:
            return None
        return left | right if _shape(left) == _shape(right) else None

    def _times(self, node: Node, value: Value | None, table: Any) -> Value | None:
        """`value` times one number a lane; a table over several trailing dimensions is none."""
        if value is None or set(value) != {None} or len(_shape(value)) != 1 or not is_tensor(table):
            return None
        if not same_shape(val(node).shape[:-1], self.leading) or val(table).dim() == 0:
            return None
        width, lanes = val(table).shape[-1], _shape(value)[0]
        if not is_static(width) or width != lanes:
            return None
        return {table: Term(value[None].sign, value[None].lane, np.arange(lanes))}

    def _joined(self, node: Node, depth: int) -> Value | None:
        values = [self.read(part, depth) for part in node.args[0]]  # type: ignore[union-attr]
        axis = self._axis(node, arguments(node)["dim"])
        if axis is None or any(value is None for value in values):
            return None
        join = np.concatenate if is_call(node, aten.cat.default) else np.stack
        tables = {table: None for value in values if value is not None for table in value}
        joined: Value = {}
        for table in tables:
            terms = [_term(value, table) for value in values if value is not None]
            try:
                joined[table] = Term(*(join([getattr(t, n) for t in terms], axis) for n in ("sign", "lane", "place")))
            except ValueError:  # of shapes that broadcast to one another outside of the lanes only
                return None
        return joined

    def _part(self, node: Node, parts: Node, depth: int) -> Value | None:
        value = self.read(parts.args[0], depth)
        rank = val(parts.args[0]).dim()
        axis = self._axis(parts.args[0], arguments(parts)["dim"], rank)
        if value is None or axis is None:
            return None
        index: Any = node.args[1]
        if is_call(parts, aten.unbind.int):
            return {table: term.each(lambda a: np.take(a, index, axis)) for table, term in value.items()}
        sizes = [part.shape[axis + len(self.leading)] for part in val(parts)]
        if not all(map(is_static, sizes)):
            return None
        begin, size = sum(sizes[:index]), sizes[index]
        return {t: term.each(lambda a: np.take(a, range(begin, begin + size), axis)) for t, term in value.items()}

    def _sliced(self, node: Node, value: Value) -> Value | None:
        given = arguments(node)
        axis = self._axis(node.args[0], given["dim"])
        if axis is None:
            return None
        if is_call(node, aten.select.int):
            index: Any = given["index"]
        else:
            index = [given[name] for name in ("start", "end", "step")]
            if not all(i is None or isinstance(i, int) for i in index):
                return None
            index = slice(*index)
        if not isinstance(index, (int, slice)):
            return None
        where = (*(slice(None),) * axis, index)
        return {table: term.each(lambda a: a[where]) for table, term in value.items()}

    def _permuted(self, node: Node, value: Value) -> Value | None:
        order, leading = permutation(node), len(self.leading)
        if order is None or order[:leading] != tuple(range(leading)):
            return None
        trailing = [d - leading for d in order[leading:]]
        return {table: term.each(lambda a: np.transpose(a, trailing)) for table, term in value.items()}

    def _reshaped(self, node: Node, value: Value) -> Value | None:
        shape, leading = val(node).shape, len(self.leading)
        if not same_shape(shape[:leading], self.leading) or not all(map(is_static, shape[leading:])):
            return None
        return {table: term.each(lambda a: a.reshape(tuple(shape[leading:]))) for table, term in value.items()}

    def _axis(self, node: Any, dim: int, rank: int | None = None) -> int | None:
        """Dimension `dim` of `node` among those that x's last one was split into, or None."""
        rank = val(node).dim() if rank is None else rank
        axis = dim % rank - len(self.leading)
        return axis if axis >= 0 else None


def _negated(value: Value | None) -> Value | None:
    if value is None:
        return None
    return {table: Term(-term.sign, term.lane, term.place) for table, term in value.items()}


def _shape(value: Value) -> tuple[int, ...]:
    return next(iter(value.values())).sign.shape


def _term(value: Value, table: Node | None) -> Term:
    nothing = np.zeros(_shape(value), dtype=np.int64)
    return value.get(table, Term(nothing, nothing, nothing))


def _twins(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two nodes are the same casts and changes of layout of one value."""
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return bool(a == b)
    if depth == 0 or a.target is not b.target or a.kwargs != b.kwargs or len(a.args) != len(b.args):
        return False
    moved = is_cast(a) or is_permute(a) or is_reshape(a)
    return moved and all(_twins(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def _own(a: Node, b: Node) -> set[Node]:
    """What of the twin `a` is not part of `b`, `a` included."""
    pairs: Any = zip(a.args, b.args, strict=True)
    return {a}.union(*(_own(x, y) for x, y in pairs if isinstance(x, Node) and x is not y))
