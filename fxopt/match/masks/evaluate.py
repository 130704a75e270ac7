"""Computing an index function in plain torch: what a lifted mask must equal, and what can be put in its place.

`Builder` spells a form, condition or value out in ATen ops, through a `call` that is handed each op. Called at once,
that computes the dense tensor, the oracle (`evaluate`); inserting nodes instead, it puts a part of a mask into the
graph (`insert`), with dimensions of one element where it does not depend on a coordinate: padding as [B, 1, 1, N].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import aten, val
from fxopt.graph.symbols import known_equal
from fxopt.match.masks.conditions import All, Condition, Constant, Eq, Le
from fxopt.match.masks.forms import Apply, Atom, Coordinate, Form, Max, Quotient, Read, Size
from fxopt.match.masks.lift import size_form
from fxopt.match.masks.values import Cases, Opaque, Operand, Scalar, Value

Elements = Mapping[tuple[Node, int], Tensor]
Call = Callable[..., Any]


class Builder:
    """Spells index functions out. Tensors are whatever `call` returns: tensors or nodes.

    `coordinates` and their `lengths` are the dimensions of the result; `element` gives the tensor that elements are
    read from, `size` the number for a symbolic size, `extent` the size of a dimension of such a tensor.
    """

    def __init__(
        self,
        call: Call,
        coordinates: Sequence[Form],
        lengths: Sequence[Any],
        element: Callable[[Read], Any],
        size: Callable[[Size], Any],
        extent: Callable[[Read, int], Any],
        device: torch.device,
    ) -> None:
        self.call = call
        self.lengths = {c.atom: (d, n) for d, (c, n) in enumerate(zip(coordinates, lengths, strict=True)) if c.atom}
        self.rank = len(coordinates)
        self.element, self.size, self.extent = element, size, extent
        self.device = device
        self.done: dict[Any, Any] = {}

    def value(self, value: Value, dtype: torch.dtype) -> Any:
        """A value in `dtype`; a condition is boolean."""
        if not isinstance(value, Cases):
            return self.condition(value)
        result = self._scalar(value.pieces[-1][0], dtype)
        for scalar, condition in value.pieces[:-1]:
            result = self.call(aten.where.self, self.condition(condition), self._scalar(scalar, dtype), result)
        return result

    def condition(self, condition: Condition) -> Any:
        """A condition as a boolean tensor."""
        return self._once(condition, self._condition)

    def form(self, form: Form) -> Any:
        """A form as an int64 tensor."""
        return self._once(form, self._form)

    def _once(self, key: Any, make: Callable[[Any], Any]) -> Any:
        if key not in self.done:
            self.done[key] = make(key)
        return self.done[key]

    def _number(self, value: Any, dtype: torch.dtype) -> Any:
        return self.call(aten.full.default, [], value, dtype=dtype, device=self.device)

    def _scalar(self, scalar: Scalar, dtype: torch.dtype) -> Any:
        if isinstance(scalar, float):
            return self._number(scalar, dtype)
        found = self.form(scalar) if isinstance(scalar, Form) else self._once(scalar, self._atom)
        return self.call(aten.to.dtype, found, dtype)

    def _condition(self, condition: Condition) -> Any:
        if isinstance(condition, Constant):
            return self._number(condition.value, torch.bool)
        if isinstance(condition, (Le, Eq)):
            op = aten.le.Scalar if isinstance(condition, Le) else aten.eq.Scalar
            return self.call(op, self.form(condition.form), 0)
        if hasattr(condition, "form"):
            return self.call(aten.ne.Scalar, self.form(condition.form), 0)
        result = self.condition(condition.parts[0])
        for part in condition.parts[1:]:
            op = aten.logical_and.default if isinstance(condition, All) else aten.logical_or.default
            result = self.call(op, result, self.condition(part))
        return result

    def _form(self, form: Form) -> Any:
        total: Any = None
        for atom, k in form.terms:
            term = self.call(aten.to.dtype, self._once(atom, self._atom), torch.int64)
            term = term if k == 1 else self.call(aten.mul.Tensor, term, k)
            total = term if total is None else self.call(aten.add.Tensor, total, term)
        if total is None:
            return self._number(form.constant, torch.int64)
        return self.call(aten.add.Tensor, total, form.constant) if form.constant else total

    def _atom(self, atom: Atom) -> Any:
        if isinstance(atom, Coordinate):
            if atom not in self.lengths:
                raise ValueError(f"the coordinate {atom.name} has no place in the result")
            d, n = self.lengths[atom]
            line = self.call(aten.arange.default, n, dtype=torch.int64, device=self.device)
            return self._spread(line, [d])
        if isinstance(atom, Size):
            return self._number(self.size(atom), torch.int64)
        if isinstance(atom, Quotient):
            return self.call(aten.div.Tensor_mode, self.form(atom.numerator), atom.divisor, rounding_mode="floor")
        if isinstance(atom, Max):
            result = self.form(atom.members[0])
            for member in atom.members[1:]:
                result = self.call(aten.maximum.default, result, self.form(member))
            return result
        if isinstance(atom, Apply):
            operands = [self._operand(o) if isinstance(o, Operand) else o for o in atom.operands]
            return self.call(atom.target, *operands, **dict(atom.keywords))
        return self._read(atom)

    def _operand(self, operand: Operand) -> Any:
        found = self.call(aten.to.dtype, self.value(operand.value, operand.dtype), operand.dtype)
        # Promotion tells tensors without dimensions apart.
        return found if operand.is_scalar or val(found).dim() else self._spread(found, [])

    def _spread(self, tensor: Any, dims: Sequence[int]) -> Any:
        """A tensor whose dimensions are these of the result, with the others of one element."""
        for d in range(self.rank):
            if d not in dims:
                tensor = self.call(aten.unsqueeze.default, tensor, d)
        return tensor

    def _read(self, read: Read) -> Any:
        tensor = self.element(read)
        if not read.index:
            return tensor
        dims = [self._whole(read, d) for d, form in enumerate(read.index) if not form.is_number]
        numbers_inside = all(self._inside(read, d) for d, form in enumerate(read.index) if form.is_number)
        if numbers_inside and None not in dims and dims == sorted(set(dims)):  # type: ignore[type-var]
            for d in reversed(range(len(read.index))):
                if read.index[d].is_number:
                    tensor = self.call(aten.select.int, tensor, d, read.index[d].constant)
            return self._spread(tensor, [d for d in dims if d is not None]) if dims else tensor
        return self.call(aten.index.Tensor, tensor, [self._place(read, d) for d in range(len(read.index))])

    def _whole(self, read: Read, d: int) -> int | None:
        """The dimension of the result along which the tensor is read from its first to its last element."""
        atom, n = read.index[d].atom, self.extent(read, d)
        found = None if atom is None else self.lengths.get(atom)
        return found[0] if found is not None and known_equal(val(found[1]), n) else None

    def _inside(self, read: Read, d: int) -> bool:
        """Whether the index along a dimension is certainly within it."""
        form = read.index[d]
        return form.least >= 0 and (form - size_form(self.extent(read, d))).most < 0

    def _place(self, read: Read, d: int) -> Any:
        """The index along a dimension. Beyond the end an element is read only where a condition takes another."""
        form, n = read.index[d], self.extent(read, d)
        place = self.form(form)
        if self._inside(read, d):
            return place
        if not isinstance(n, int):
            raise Opaque(f"an index of {read.node.name} may be beyond its end")
        return self.call(aten.clamp.default, place, 0, n - 1)


def evaluate(
    value: Value | Form,
    coordinates: Sequence[Form],
    shape: Sequence[int],
    elements: Elements,
    sizes: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype = torch.bool,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The dense tensor of `shape` whose element at an index is `value` at these coordinates.

    `elements` are the tensors that elements are read from, by node and epoch; `sizes` are the numbers that the symbols
    of symbolic sizes stand for. `dtype` is that of a numeric value; conditions are boolean. A Form gives int64.
    """

    def element(read: Read) -> Tensor:
        tensor = elements[read.node, read.epoch]
        # Of an empty tensor nothing that counts is read.
        return tensor if tensor.numel() else tensor.new_zeros([1] * tensor.dim())

    def size(atom: Size) -> int:
        known = {s: (sizes or {})[str(s)] for s in atom.expression.free_symbols}
        return int(atom.expression.xreplace(known))

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def extent(read: Read, d: int) -> int:
        return element(read).shape[d]

    builder = Builder(call, coordinates, shape, element, size, extent, torch.device(device))
    found = builder.form(value) if isinstance(value, Form) else builder.value(value, dtype)
    return found.expand(tuple(shape))


def insert(
    value: Value | Form,
    coordinates: Sequence[Form],
    lengths: Sequence[Any],
    call: Call,
    device: torch.device,
    *,
    size: Callable[[Any], Any] | None = None,
    element: Callable[[Read], Node] | None = None,
    dtype: torch.dtype = torch.bool,
) -> Node:
    """Insert the nodes that compute a part of a program; the result broadcasts to the coordinates' dimensions.

    `call` inserts one call and returns its node, as Match.call does; `lengths` are the coordinates' sizes, as numbers
    or nodes; `size` gives the number or node of a sympy expression, `element` the node to read elements from, where it
    isn't their own. The program must have been read `at` the place
    where the call is inserted. Raises Opaque where a size is needed that isn't given, or an index may be beyond.
    """

    def number(atom: Size) -> Any:
        if size is None:
            raise Opaque(f"the size {atom.expression} is not given")
        return size(atom.expression)

    def extent(read: Read, d: int) -> Any:
        return val(read.node).shape[d]

    builder = Builder(call, coordinates, lengths, element or (lambda read: read.node), number, extent, device)
    found = builder.form(value) if isinstance(value, Form) else builder.value(value, dtype)
    assert isinstance(found, Node)
    return found
