"""What is added to the scores and filled in, as one mask of the fused op, and whether it is causal.

    s + a + b     mask a + b, in the scores' dtype, so that two finfo.min overflow as they did
    (s + a) · c   scale c, mask a · c              where(p, s, -inf)   boolean mask p, or where(p, a, -inf)
    max(s + a, f)   mask max(a, f), where f absorbs any score
    where(p, s, f)  mask where(p, 0, f): f absorbs any score that is added to it, so rows without a live key stay
                  uniform. A finite f that would not (as -1e4, or finfo(float16).min) is made more negative, which
                  changes no weight unless something is added afterwards. Where gradients flow it becomes the boolean
                  mask p with "uniform" empty rows.

Causality is never guessed: only a mask that reads no input is evaluated, and it must be exactly the lower triangle.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import aten, val, widens
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.axes import Move
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import constant_value
from fxopt.passes._attention_operands import emit, place_term
from fxopt.passes._attention_program import (
    ABSORBING,
    ROWS,
    Add,
    Cast,
    Fill,
    Floor,
    Instruction,
    Multiply,
    Scale,
    Sink,
    tensor_of,
)

_SHAPED_LIKE = frozenset({aten.expand_as.default, aten.reshape_as.default, aten.view_as.default})


@dataclass(frozen=True)
class Placed:
    """A step on the mask: an instruction and the moves that bring its tensor to the coordinates of the scores."""

    instruction: Instruction
    moves: tuple[Move, ...] = ()

    @property
    def tensor(self) -> Node | None:
        """The tensor that the step adds or fills by."""
        return tensor_of(self.instruction)


def place_step(
    step: Add | Fill | Multiply | Sink, sizes: Sequence[Dim], region: Collection[Node], covered: set[Node]
) -> Placed | Miss:
    """The instruction with its tensor brought to the coordinates; what took its shape from the scores is `covered`."""
    tensor = tensor_of(step)
    assert tensor is not None
    shape: Sequence[Dim] = val(tensor).shape
    before: list[Move] = []
    base = tensor.args[0] if tensor.args else None
    if tensor.target in _SHAPED_LIKE and tensor.args[1] in region:  # it must not keep the scores alive
        covered.add(tensor)
        assert isinstance(base, Node)
        step = _reading(step, base)
        if tensor.target is aten.expand_as.default:
            shape = val(base).shape
        else:
            before = [("reshape", tuple(shape))]
    elif tensor.target is aten.expand.default and isinstance(base, Node) and _has_columns(step, base):
        step, shape = _reading(step, base), val(base).shape  # broadcasting will do
    if isinstance(step, Sink):
        shape = (*shape[:-1], 1)
    moved = place_term(shape, step.layout, sizes)
    if moved is None:
        return Miss(f"the mask {tensor.name} can't be brought to [batch, heads, rows, keys]", tensor)
    return Placed(step, (*before, *moved))


def _has_columns(step: Instruction, base: Node) -> bool:
    return not isinstance(step, Sink) or (val(base).dim() > 0 and known_equal(val(base).shape[-1], step.columns))


def _reading(step: Any, tensor: Node) -> Any:
    return replace(step, condition=tensor) if isinstance(step, Fill) else replace(step, term=tensor)


def placed_shape(step: Placed) -> tuple[Dim, ...]:
    """The shape of a step's tensor in the four coordinates."""
    shape: list[Dim] = list(val(step.tensor).shape)
    for kind, numbers in step.moves:
        shape = [shape[d] for d in numbers] if kind == "permute" else list(numbers)
    return (*[1] * (4 - len(shape)), *shape)


def take_triangle(steps: list[Placed], sizes: Sequence[Dim]) -> tuple[bool, list[Placed]]:
    """Whether one of the masks is the causal one, and the others."""
    alone = sum(s.tensor is not None for s in steps) == 1
    if any(isinstance(s.instruction, (Scale, Multiply, Floor)) for s in steps):
        return False, steps
    triangle = next((s for s in steps if _is_triangle(s, sizes, alone=alone)), None)
    return triangle is not None, [s for s in steps if s is not triangle]


def differentiable(steps: list[Placed]) -> tuple[bool, list[Placed]] | Miss:
    """The steps as a mask whose gradients are the model's own, and whether it is "uniform"; or why there is none.

    Rows masked throughout by finite numbers pass gradients on to q and k where those were added, not where they were
    filled in. One additive mask can't say that of some of its positions.
    """
    for step in steps:
        if isinstance(step.instruction, Floor):
            return Miss(f"scores raised to {step.instruction.value} pass no gradients on, masked ones do", step.tensor)
    masks = [s.instruction for s in steps if isinstance(s.instruction, (Add, Fill))]
    finite = {i.value for i in masks if isinstance(i, Fill) and i.value > -math.inf}
    if not finite:
        return False, steps
    if len(finite) > 1 or not all(isinstance(i, Fill) and i.value in finite for i in masks):
        return Miss("scores are filled in and masked in another way too: two kinds of gradients", tensor_of(masks[0]))
    fills = [(s, s.instruction) for s in steps if isinstance(s.instruction, Fill)]
    return True, [replace(s, instruction=replace(fill, value=-math.inf)) for s, fill in fills]


def make_mask(match: Match, steps: Sequence[Placed], sources: Sequence[Node]) -> Node | None:
    """Insert the nodes that make the mask; None if there is none."""
    mask: Node | None = None
    summed = sum(isinstance(s.instruction, (Add, Fill, Multiply)) for s in steps) > 1
    last = max((i for i, s in enumerate(steps) if not isinstance(s.instruction, Cast)), default=-1)
    for i, step in enumerate(steps):
        at = step.instruction
        if isinstance(at, Fill):
            mask = _fill(match, mask, at, emit(match, at.condition, step.moves, sources))
        elif isinstance(at, Add):
            term = emit(match, at.term, step.moves, sources)
            if not val(term).is_floating_point() or (summed and val(term).dtype != at.dtype):
                term = match.call(aten.to.dtype, term, at.dtype)
            if isinstance(at.alpha, Node) or at.alpha != 1:
                term = match.call(aten.mul.Tensor, term, at.alpha)
            mask = term if mask is None else match.call(aten.add.Tensor, _additive(match, mask, at.dtype), term)
        elif isinstance(at, Cast) and mask is not None and val(mask).dtype not in (torch.bool, at.dtype):
            if i < last or not widens(val(mask).dtype, at.dtype):  # at the end it would only take more room
                mask = match.call(aten.to.dtype, mask, at.dtype)
        elif isinstance(at, Scale) and mask is not None:
            mask = multiply(match, _additive(match, mask, torch.float32), at)
        elif isinstance(at, Multiply) and mask is not None:
            by = emit(match, at.term, step.moves, sources)
            mask = match.call(aten.div.Tensor if at.divide else aten.mul.Tensor, _additive(match, mask, at.dtype), by)
        elif isinstance(at, Floor) and mask is not None:
            mask = match.call(aten.clamp_min.default, _additive(match, mask, torch.float32), at.value)
    return mask


def join_masks(match: Match, mask: Node | None, live: Node | None) -> Node | None:
    """Insert what makes a mask and a boolean one into one mask."""
    if mask is None or live is None:
        return live if mask is None else mask
    if val(mask).dtype == torch.bool:
        return match.call(aten.logical_and.default, mask, live)
    return match.call(aten.where.ScalarOther, live, mask, -math.inf)


def multiply(match: Match, node: Node, scale: Scale) -> Node:
    """Insert the multiplication of a tensor by a scale; the tensor keeps its dtype."""
    by = scale.by
    if isinstance(val(by), Tensor) and val(by).dim() > 0:
        by = match.call(aten.reshape.default, by, [])
    return match.call(aten.div.Tensor if scale.divide else aten.mul.Tensor, node, by)


def _fill(match: Match, mask: Node | None, fill: Fill, condition: Node) -> Node:
    """The mask with positions filled. Stays boolean for as long as nothing but -inf was filled in."""
    boolean = mask is None or val(mask).dtype == torch.bool
    if boolean and fill.value == -math.inf:
        kept = condition if fill.keep else match.call(aten.logical_not.default, condition)
        return kept if mask is None else match.call(aten.logical_and.default, mask, kept)
    before: Any = None
    if mask is not None:
        before = _additive(match, mask, fill.dtype)
    else:
        device = val(condition).device
        before = match.call(aten.zeros.default, [], dtype=fill.dtype, device=device)
    if val(before).dtype != fill.dtype:
        before = match.call(aten.to.dtype, before, fill.dtype)
    if fill.keep:
        return match.call(aten.where.ScalarOther, condition, before, fill.value)
    return match.call(aten.where.ScalarSelf, condition, fill.value, before)


def _additive(match: Match, mask: Node, dtype: torch.dtype) -> Node:
    """A boolean mask as one that is added."""
    if val(mask).dtype != torch.bool:
        return mask
    zero = match.call(aten.zeros.default, [], dtype=dtype, device=val(mask).device)
    return match.call(aten.where.ScalarOther, mask, zero, -math.inf)


def _is_triangle(step: Placed, sizes: Sequence[Dim], *, alone: bool) -> bool:
    """Whether a mask is a constant that lets row i attend to keys 0 to i and to no other.

    A finite fill is as good as -inf only where no other mask can leave a row without a live key.
    """
    at, tensor = step.instruction, step.tensor
    rows, keys = sizes[ROWS], sizes[ROWS + 1]
    if tensor is None or step.moves or not (isinstance(rows, int) and isinstance(keys, int) and rows > 0 and keys > 0):
        return False
    if val(tensor).dim() < 2 or tuple(val(tensor).shape[-2:]) != (rows, keys):
        return False
    if tensor not in _SEEN:
        _SEEN[tensor] = _triangle(tensor)
    found = _SEEN[tensor]
    limit = ABSORBING if alone else -math.inf
    if isinstance(at, Fill):
        return found is at.keep and at.value <= limit
    if not isinstance(at, Add) or isinstance(found, bool):
        return False
    return known_equal(at.alpha, 1) and found is not None and found <= limit


#: what layers share is evaluated once
_SEEN: WeakKeyDictionary[Node, bool | float | None] = WeakKeyDictionary()


def _triangle(tensor: Node) -> bool | float | None:
    """For a constant [..., rows, keys]: True or False if it has this value just in the lower triangle (bool), the
    largest value above it if it is 0 within (float), or None.
    """
    value = constant_value(tensor)
    if value is None:
        return None
    lower = torch.ones(value.shape[-2:], dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return True if bool((value == lower).all()) else False if bool((value != lower).all()) else None
    if not value.is_floating_point() or bool((value.masked_select(lower) != 0).any()):
        return None
    above = value.masked_select(~lower)
    return above.max().item() if above.numel() else -math.inf
