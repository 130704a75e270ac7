"""What a model does to its attention scores between q kᵀ and the softmax, as a short program of instructions.

    scores = scale · q kᵀ, and then any of: scaled again, capped, added to, filled in, given a sink

Each instruction that reads a tensor is kept with the layout that the scores had there, over the coordinates [batch,
heads, rows, keys] of the fused op, so that a mask added to [batch · heads, rows, keys] can be brought to those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.match.axes import Layout

#: the coordinates of the scores
BATCH, HEADS, ROWS, KEYS = range(4)

#: a fill at least this negative absorbs any score that is added to it, so filling and adding come to the same
ABSORBING = -1e30
#: a fill at least this negative leaves a key no weight beside a live one
NEGLIGIBLE = -9e3


@dataclass(frozen=True)
class Scale:
    """The scores are multiplied (or divided) by a number, a symbolic number or a tensor of one element."""

    by: Any
    divide: bool = False


@dataclass(frozen=True)
class Multiply:
    """The scores are multiplied (or divided) by a tensor; the product has `dtype`."""

    term: Node
    divide: bool
    dtype: torch.dtype
    layout: Layout


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent of the scores; with what is scaled before and after it a soft cap."""

    node: Node


@dataclass(frozen=True)
class Mix:
    """The scores of each head become a combination of all heads' scores (talking heads): `weight` [heads, heads].

    What the linear layer adds besides is the same for a whole row, which the softmax doesn't see.
    """

    weight: Node
    node: Node


@dataclass(frozen=True)
class Shift:
    """The same is added to a whole row: softmax doesn't see that, but what lies between may."""

    node: Node


@dataclass(frozen=True)
class Add:
    """`alpha` times a tensor is added; the sum has `dtype`."""

    term: Node
    alpha: Any
    dtype: torch.dtype
    layout: Layout


@dataclass(frozen=True)
class Fill:
    """Where `condition` is not `keep`, the scores are replaced by `value`."""

    condition: Node
    keep: bool
    value: float
    dtype: torch.dtype
    layout: Layout


@dataclass(frozen=True)
class Cast:
    """The scores take another dtype."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Floor:
    """Scores below `value`, which absorbs any score, are raised to it: -inf becomes finite."""

    value: float


@dataclass(frozen=True)
class Sink:
    """`columns` further scores a row, from the tensor `term`, before the others (`first`) or after them."""

    term: Node
    columns: Any
    first: bool
    layout: Layout


Instruction = Scale | Multiply | Tanh | Mix | Shift | Add | Fill | Cast | Floor | Sink


def tensor_of(step: Instruction) -> Node | None:
    """The tensor of scores' or fewer elements that an instruction reads."""
    if isinstance(step, (Add, Multiply, Sink)):
        return step.term
    return step.condition if isinstance(step, Fill) else None
