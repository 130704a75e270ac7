"""Reading the score program: the steps between q kᵀ and the softmax as instructions (`_attention_program`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, is_cast, is_copy, val
from fxopt.graph.symbols import known_equal, same_shape
from fxopt.match.axes import Group, Layout, is_layout, through
from fxopt.match.miss import Miss
from fxopt.match.region import Step, constant_value, number
from fxopt.passes._attention_program import (
    ABSORBING,
    HEADS,
    KEYS,
    NEGLIGIBLE,
    Add,
    Cast,
    Fill,
    Floor,
    Instruction,
    Mix,
    Multiply,
    Scale,
    Shift,
    Sink,
    Tanh,
)

_ADDS = frozenset({aten.add.Tensor, aten.add.Scalar})
_SUBS = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_MULS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVS = frozenset({aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor})
_RESHAPING = (aten.cat.default, aten.linear.default)  # read on their own
_WHERES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor})
_CLAMPS = frozenset(
    {
        aten.clamp.default,
        aten.clamp.Tensor,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.max.other,
        aten.min.other,
    }
)


def read_program(steps: Iterable[Step], layout: Layout) -> tuple[list[Instruction], Layout] | Miss:
    """The instructions that `steps` amount to and the layout of the scores after them, or why they can't be read."""
    program: list[Instruction] = []
    for count, step in enumerate(steps):
        node = step.node
        if is_cast(node):
            program.append(Cast(val(node).dtype))
        elif is_layout(node) and not step.inner:
            after = through(node, layout)
            if after is None:
                return Miss(f"{node.name} lays the scores out in a way that can't be followed", node, count)
            layout = after
        elif not is_call(node, *_RESHAPING) and not same_shape(val(node).shape, val(step.before).shape):
            return Miss(f"{node.name} changes the shape of the scores ({_name(node)})", node, count)
        elif _is_row_shift(step) and is_keys(layout[-1], layout):
            program.append(Shift(node))
        elif step.inner:
            return Miss(f"the scores enter {node.name} in more than one way", node, count)
        else:
            read = _instructions(step, layout)
            if isinstance(read, str):
                return Miss(read, node, count)
            program += read
    return program, layout


def is_keys(group: Group, layout: Layout) -> bool:
    """Whether a dimension of the scores is the keys: all of them, in order, and nothing else."""
    axes = [axis for g in layout for axis in g if axis.dim == KEYS]
    return list(group) == axes and len(axes) <= 1


def scalar(value: Any) -> Any:
    """A factor that is the same for all scores: number, symbolic number, or node of a one-element tensor; or None."""
    plain = number(value)
    if plain is not None:
        return plain
    tensor = val(value)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return None
    if not all(known_equal(n, 1) for n in tensor.shape):
        return None
    constant = constant_value(value, promoted=True)
    return value if constant is None else constant.item()


def scaling(node: Node) -> Scale | None:
    """The scale that `node` applies to its first argument, if that is all it does."""
    if node.target not in _MULS and node.target not in _DIVS:
        return None
    before, after = val(node.args[0]), val(node)
    if not isinstance(before, Tensor) or before.dtype != after.dtype or not same_shape(before.shape, after.shape):
        return None
    by = scalar(node.args[1])
    return None if by is None else Scale(by, node.target in _DIVS)


def _instructions(step: Step, layout: Layout) -> list[Instruction] | str:
    """The instructions of one plain step, or in words why it can't be read."""
    node, before = step.node, step.before
    dtype = val(node).dtype
    if node.target is aten.cat.default:
        return _sink(step, layout)
    if node.target is aten.linear.default:
        return _mixed(step, layout)
    positions = [i for i, a in enumerate(node.args) if a is before]
    if len(positions) != 1:
        return f"the scores enter {node.name} {len(positions)} times"
    position = positions[0]
    if node.target in _ADDS or node.target in _SUBS:
        return _added(node, position, dtype, layout)
    if node.target in _MULS or (node.target in _DIVS and position == 0):
        other = node.args[1 - position]
        by = scalar(other)
        if by is None:
            if not isinstance(val(other), Tensor) or not val(other).is_floating_point():
                return f"the scores are scaled by {other}, which is no floating-point tensor or number"
            return [Multiply(other, node.target in _DIVS, dtype, layout)]  # type: ignore[arg-type]
        if by == 0 and node.target in _DIVS:
            return f"{node.name} divides the scores by zero"
        return [Scale(by, node.target in _DIVS)]
    if node.target is aten.neg.default:
        return [Scale(-1.0)]
    if node.target in _WHERES or node.target in _FILLS:
        return _filled(node, position, dtype, layout)
    if node.target is aten.tanh.default:
        return [Tanh(node)]
    if node.target in _CLAMPS:
        floor = _floor(node, position)
        if floor is not None and floor <= ABSORBING:
            return [Floor(floor)]
        return f"the scores are clamped ({_name(node)})"
    if node.target is aten.dropout.default:
        return "dropout is active on the scores"
    return f"the scores go through {_name(node)}"


def _added(node: Node, position: int, dtype: torch.dtype, layout: Layout) -> list[Instruction] | str:
    given = list(arguments(node).values())
    other, sign = given[1 - position], -1 if node.target in _SUBS else 1
    alpha = number(given[2])
    if alpha is None:
        return f"{node.name} has an alpha that is not a number"
    program: list[Instruction] = []
    if position == 1:  # other ± alpha · scores
        if sign * alpha != 1:
            program.append(Scale(sign * alpha))
        factor = 1
    else:
        factor = sign * alpha
    plain = number(other)
    if plain is not None:
        if not isinstance(plain, Node) and not math.isfinite(plain):
            return f"{node.name} adds {plain}"
        return [*program, Shift(node)] if plain != 0 else program
    if not isinstance(val(other), Tensor) or val(other).is_complex():
        return f"{node.name} adds something that is no real tensor"
    return [*program, Add(other, factor, dtype, layout)]


def _sink(step: Step, layout: Layout) -> list[Instruction] | str:
    """Columns concatenated to the scores: with their weights dropped later, scores of keys without a value."""
    node = step.node
    parts, dim = list(node.args[0]), arguments(node)["dim"]  # type: ignore[arg-type]
    at = [i for i, part in enumerate(parts) if part is step.before]
    if step.inner or len(at) != 1 or dim % val(node).dim() != val(node).dim() - 1 or not is_keys(layout[-1], layout):
        return "blocks of scores are concatenated"
    others = [part for i, part in enumerate(parts) if i != at[0]]
    if len(others) != 1 or not val(others[0]).is_floating_point():
        return "columns are concatenated to the scores on both sides"
    return [Sink(others[0], val(others[0]).shape[-1], at[0] == 1, layout)]


def _mixed(step: Step, layout: Layout) -> list[Instruction] | str:
    """A linear layer over the heads."""
    node = step.node
    weight = node.args[1]
    heads = [axis for group in layout for axis in group if axis.dim == HEADS]
    square = isinstance(weight, Node) and known_equal(val(weight).shape[0], val(weight).shape[1])
    if node.args[0] is not step.before or step.inner or not square or list(layout[-1]) != heads or len(heads) != 1:
        return "the scores go through a linear layer"
    return [Mix(weight, node)]  # type: ignore[arg-type]


def _filled(node: Node, position: int, dtype: torch.dtype, layout: Layout) -> list[Instruction] | str:
    if node.target in _FILLS:
        condition, filling, keep = node.args[1], node.args[2], False
        if position != 0:
            return f"the scores are an operand of {node.name} other than its first"
    elif position == 0:
        return f"the scores are the condition of {node.name}"
    else:
        condition, filling, keep = node.args[0], node.args[3 - position], position == 1
    value = number(filling)
    if value is None or isinstance(value, Node):
        return f"{node.name} fills with {filling}, whose value is not known"
    if not isinstance(condition, Node) or val(condition).dtype != torch.bool:
        return f"the condition of {node.name} is not a boolean tensor"
    value = torch.tensor(float(value), dtype=torch.float64).to(dtype).item()
    if not value <= NEGLIGIBLE:
        return f"{node.name} fills masked scores with {value}, which leaves them weight"
    return [Fill(condition, keep, value, dtype, layout)]


def _floor(node: Node, position: int) -> float | None:
    """The number below which the node lets no value fall, if that is all it does."""
    if node.target in (aten.maximum.default, aten.max.other):
        value = number(node.args[1 - position])
    elif node.target in (aten.clamp.default, aten.clamp_min.default) and position == 0:
        given = arguments(node)
        value = number(given["min"]) if given.get("max") is None else None
    else:
        return None
    return float(value) if isinstance(value, (int, float)) else None


def _is_row_shift(step: Step) -> bool:
    """Whether the step subtracts each row's own maximum (over the keys, kept as a dimension)."""
    node = step.node
    if node.target not in _SUBS or not step.inner or node.args[0] is not step.before:
        return False
    if arguments(node).get("alpha", 1) != 1 or step.others:
        return False
    shift = node.args[1]
    last = val(step.before).dim() - 1
    kept = False
    while isinstance(shift, Node) and (is_copy(shift) or shift.target in (aten.detach.default, aten.unsqueeze.default)):
        if shift.target is aten.unsqueeze.default:
            if kept or shift.args[1] not in (-1, last):
                return False
            kept = True
        shift = shift.args[0]
    if not isinstance(shift, Node):
        return False
    reduction = shift
    if isinstance(shift.args[0], Node) and shift.args[0].target is aten.max.dim and shift.args[1] == 0:
        reduction = shift.args[0]
    elif shift.target is not aten.amax.default:
        return False
    given = arguments(reduction)
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    return (
        reduction.args[0] is step.before and bool(given["keepdim"]) != kept and [d % (last + 1) for d in dims] == [last]
    )


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
