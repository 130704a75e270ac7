"""Computing an index function in plain torch, element by element: what a lifted mask must equal.

`elements` are the tensors that elements are read from, by node and epoch; `sizes` are the numbers that the symbols of
symbolic sizes stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.match.masks.conditions import All, Condition, Constant, Eq, Le
from fxopt.match.masks.forms import Apply, Atom, Coordinate, Form, Max, Quotient, Read, Size
from fxopt.match.masks.values import Cases, Operand, Scalar, Value

Elements = Mapping[tuple[Node, int], Tensor]


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

    `dtype` is that of a numeric value; conditions are boolean. A Form gives int64.
    """
    place: dict[Atom, Tensor] = {}
    for d, (form, n) in enumerate(zip(coordinates, shape, strict=True)):
        if form.atom is not None:
            place[form.atom] = torch.arange(n, device=device).reshape([n if e == d else 1 for e in range(len(shape))])
    evaluator = _Evaluator(place, len(shape), elements, sizes or {}, torch.device(device))
    if isinstance(value, Form):
        found = evaluator.form(value)
    else:
        found = evaluator.value(value, dtype)
    return found.expand(tuple(shape))


class _Evaluator:
    def __init__(
        self, place: dict[Atom, Tensor], rank: int, elements: Elements, sizes: Mapping[str, int], device: torch.device
    ) -> None:
        self.done: dict[Any, Tensor] = dict(place)
        self.rank = rank
        self.elements = elements
        self.sizes = sizes
        self.device = device

    def number(self, value: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=self.device)

    def value(self, value: Value, dtype: torch.dtype) -> Tensor:
        if not isinstance(value, Cases):
            return self.condition(value)
        result = self.scalar(value.pieces[-1][0], dtype)
        for scalar, condition in value.pieces[:-1]:
            result = torch.where(self.condition(condition), self.scalar(scalar, dtype), result)
        return result

    def scalar(self, scalar: Scalar, dtype: torch.dtype) -> Tensor:
        if isinstance(scalar, float):
            return self.number(scalar, dtype)
        return (self.form(scalar) if isinstance(scalar, Form) else self.atom(scalar)).to(dtype)

    def condition(self, condition: Condition) -> Tensor:
        found = self.done.get(condition)
        if found is None:
            found = self.done[condition] = self._condition(condition)
        return found

    def _condition(self, condition: Condition) -> Tensor:
        if isinstance(condition, Constant):
            return self.number(condition.value, torch.bool)
        if isinstance(condition, Le):
            return self.form(condition.form) <= 0
        if isinstance(condition, Eq):
            return self.form(condition.form) == 0
        if hasattr(condition, "form"):
            return self.form(condition.form) != 0
        result = self.condition(condition.parts[0])
        for part in condition.parts[1:]:
            result = result & self.condition(part) if isinstance(condition, All) else result | self.condition(part)
        return result

    def form(self, form: Form) -> Tensor:
        found = self.done.get(form)
        if found is None:
            found = self.number(form.constant, torch.int64)
            for atom, k in form.terms:
                found = found + k * self.atom(atom).to(torch.int64)
            self.done[form] = found
        return found

    def atom(self, atom: Atom) -> Tensor:
        found = self.done.get(atom)
        if found is None:
            found = self.done[atom] = self._atom(atom)
        return found

    def _atom(self, atom: Atom) -> Tensor:
        if isinstance(atom, Coordinate):
            raise ValueError(f"the coordinate {atom.name} has no place in the result")
        if isinstance(atom, Size):
            known = {s: self.sizes[str(s)] for s in atom.expression.free_symbols}
            return self.number(int(atom.expression.xreplace(known)), torch.int64)
        if isinstance(atom, Quotient):
            return torch.div(self.form(atom.numerator), atom.divisor, rounding_mode="floor")
        if isinstance(atom, Max):
            result = self.form(atom.members[0])
            for member in atom.members[1:]:
                result = torch.maximum(result, self.form(member))
            return result
        if isinstance(atom, Apply):
            operands = [self._operand(o) if isinstance(o, Operand) else o for o in atom.operands]
            return atom.target(*operands, **dict(atom.keywords))
        return self._read(atom)

    def _operand(self, operand: Operand) -> Tensor:
        found = self.value(operand.value, operand.dtype).to(operand.dtype)
        return found if operand.is_scalar or found.dim() else found.reshape([1] * self.rank)

    def _read(self, read: Read) -> Tensor:
        tensor = self.elements[read.node, read.epoch]
        if tensor.numel() == 0:  # then nothing that counts reads from it
            return torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        if not read.index:
            return tensor
        # Beyond the end an element is read only where a condition takes another.
        index = [self.form(form).clamp(0, n - 1) for form, n in zip(read.index, tensor.shape, strict=True)]
        return tensor[tuple(index)]
