"""Masks in as few dimensions as they depend on: one that is the same for all rows needs no M x N elements.

    mask(b, h, i, j) = f(b, j)   ->   f [B, 1, 1, N]           padding by key, as BERT spreads it over the rows
    mask(b, h, i, j) = f(i, j)   ->   f [1, 1, M, N]           one that is made for each head or sequence anew

The values are those of the model's own mask in its own dtype, whatever they are, computed again from what it is made
of: only their number changes, so rows without a live key and numbers that rule nothing out stay what they were. What a
mask depends on is what its lifted form names, which is proved, never sampled. A mask that is an input is what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.fx import Node

from fxopt.graph.query import SHARED, aten, val
from fxopt.graph.scope import Scope, needs_gradient
from fxopt.graph.symbols import Dim, hint
from fxopt.match.masks import read_values
from fxopt.match.masks.forms import Coordinate, Form, Read, elements
from fxopt.match.masks.values import Opaque, Value, atoms
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._attention_insert import Inserter
from fxopt.passes._attention_mask import Placed
from fxopt.passes._attention_program import Add, Fill

#: sizes, elements and ops that a mask is computed again from; what takes more is not one that models share
MAX_ATOMS = 32


@dataclass(frozen=True)
class Narrow:
    """A step on the mask whose tensor holds `value`, and the nodes whose elements that is computed from."""

    step: Placed
    value: Value
    coordinates: tuple[Form, ...]
    sizes: tuple[Dim, ...]

    @property
    def tensor(self) -> Node:
        """The tensor that isn't needed any more."""
        assert self.step.tensor is not None
        return self.step.tensor

    @property
    def leaves(self) -> list[Node]:
        """The tensors whose elements are needed."""
        return list(dict.fromkeys(read.node for read in elements(atoms(self.value))))

    def make(self, match: Match, sources: Sequence[Node]) -> Placed:
        """Insert the tensor in four dimensions; the step as it is where that can't be spelled out."""
        already = len(match.made)
        inserter = Inserter(match, self.coordinates, self.sizes, [*sources, *self.leaves, self.tensor])
        try:
            small = inserter.insert(self.value, val(self.tensor).dtype)
        except Opaque:
            return self.step
        while val(small).dim() < 4:
            small = match.call(aten.unsqueeze.default, small, 0)
        for node in match.made[already:]:
            node.meta[SHARED] = True
        instruction = self.step.instruction
        if isinstance(instruction, Fill):
            return Placed(replace(instruction, condition=small))
        assert isinstance(instruction, Add)
        return Placed(replace(instruction, term=small))


def narrow_masks(steps: Sequence[Placed], scope: Scope, sizes: Sequence[Dim], at: Node) -> list[Narrow]:
    """The steps whose tensors can be computed in fewer elements; `at` is the node before which they will be."""
    found = [_narrow(step, scope, sizes, at) for step in steps if isinstance(step.instruction, (Add, Fill))]
    return [narrow for narrow in found if narrow is not None]


def _narrow(step: Placed, scope: Scope, sizes: Sequence[Dim], at: Node) -> Narrow | None:
    tensor = step.tensor
    assert tensor is not None
    if tensor.op != "call_function" or (torch.is_grad_enabled() and needs_gradient(tensor)):
        return None
    read = read_values(tensor, scope, sizes, at=at, moves=step.moves)
    if isinstance(read, Miss):
        return None
    value, coordinates = read
    used = atoms(value)
    if any(isinstance(atom, Read) and atom.node is tensor for atom in used) or len(used) > MAX_ATOMS:
        return None
    needed = prod(
        hint(n)
        for n, form in zip(sizes, coordinates, strict=True)
        if isinstance(form.atom, Coordinate) and form.atom in used
    )
    return Narrow(step, value, coordinates, tuple(sizes)) if needed < _stored(tensor) else None


def _stored(tensor: Node) -> int:
    """Of how many elements a tensor is, repeated ones counted once: by the sizes of the first call, for a choice of
    which each is right.
    """
    value = val(tensor)
    return prod(hint(n) for n, stride in zip(value.shape, value.stride(), strict=True) if hint(stride) != 0)
