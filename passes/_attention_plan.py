"""The score program as the fused op's arguments: scale, factor, soft cap, mask and sink.

    s·c·d           scale c·d                       s / t          divide q by t (a number known only at run time)
    s·t             the op's factor; q·t where t is the same for a whole row, k·t where it is for a whole column
    a·tanh(b·s)     soft cap a, scale a·b           [s, t]         sink t (of several columns their logsumexp)
    heads mixed     Σ_h W[g, h] q_h k_hᵀ = [W[g, 0] q_0, W[g, 1] q_1, ...] [k_0, k_1, ...]ᵀ: wider heads, one of keys

What is added to a whole row vanishes in the softmax, unless the scores are capped, multiplied key by key or given a
sink in between. Masks: `_attention_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import val
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.miss import Miss
from fxopt.passes._attention_mask import Placed, differentiable, place_step, placed_shape, take_triangle
from fxopt.passes._attention_program import (
    ABSORBING,
    KEYS,
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


@dataclass(frozen=True)
class Plan:
    """`scale` is a number; `factors` (known at run time only) go to q; `mask` is what makes the mask, in order.

    `on_q` and `on_k` multiply operands, `factor` the scores; `cap` is a number or the node of a symbolic one.
    """

    scale: float
    factors: tuple[Scale, ...]
    mask: tuple[Placed, ...]
    is_causal: bool
    covered: frozenset[Node] = frozenset()  # what took its shape from the scores
    uniform: bool = False  # the mask is boolean and stands for filling in a huge finite number, not -inf
    cap: Any = None
    on_q: tuple[Placed, ...] = ()
    on_k: tuple[Placed, ...] = ()
    factor: tuple[Placed, ...] = ()
    sink: Placed | None = None
    mix: Node | None = None

    @property
    def placed(self) -> list[Placed]:
        """All tensors that are read besides q, k and v."""
        every = [*self.mask, *self.on_q, *self.on_k, *self.factor, *([self.sink] if self.sink else [])]
        return [p for p in every if p.tensor is not None]


def plan(
    program: Sequence[Instruction],
    sizes: Sequence[Dim],
    scales: Sequence[Scale],
    region: Collection[Node],
    is_causal: bool,
    grouped: bool = False,
) -> Plan | Miss:
    """What the program amounts to, or why the op can't be told. `region` are the nodes matched."""
    before: list[Scale] = list(scales)  # scales before a soft cap, or all of them
    after: list[Scale] = []
    steps: list[Placed] = []
    covered: set[Node] = set()
    products: list[Placed] = []
    shift: Shift | None = None
    tanh: Tanh | None = None
    sink: Placed | None = None
    mix: Mix | None = None
    for index, step in enumerate(program):
        if sink is not None and not isinstance(step, (Cast, Shift)):
            return Miss("the scores are changed after extra columns were concatenated", sink.tensor)
        if isinstance(step, Shift):
            shift = shift if sink is not None else step
        elif isinstance(step, Scale):
            (before if tanh is None else after).append(step)
            steps += [Placed(step)] if steps else []
        elif isinstance(step, (Cast, Floor)):
            steps += [Placed(step)] if steps else []  # before the first mask there is nothing to cast
        elif isinstance(step, Mix):
            if mix is not None or steps or products or shift or tanh:
                return Miss("heads are mixed after the scores were masked, capped or multiplied", step.node)
            mix = step
        elif isinstance(step, Tanh):
            if tanh is not None or steps:
                return Miss("the scores are capped after they were masked, or twice", step.node)
            if shift is not None:
                return Miss("something is added to whole rows before the scores are capped", shift.node)
            tanh = step
        else:
            later = [s for s in program[index + 1 :] if not isinstance(s, (Cast, Fill, Shift, Sink))]
            if isinstance(step, Fill) and step.value > ABSORBING:
                if later:
                    what = f"masked scores are filled with {step.value} and then changed further"
                    return Miss(what, step.condition)
                step = replace(step, value=ABSORBING, dtype=torch.promote_types(step.dtype, torch.float32))
            placed = place_step(step, sizes, region, covered)
            if isinstance(placed, Miss):
                return placed
            if isinstance(step, Sink):
                if shift is not None:
                    return Miss("something is added to whole rows before a sink is put beside them", shift.node)
                sink = placed
            elif isinstance(step, Multiply):
                if tanh is not None:
                    return Miss(f"capped scores are multiplied by the tensor {step.term.name}", step.term)
                products.append(placed)
                steps += [placed] if steps else []
                if shift is not None and not known_equal(placed_shape(placed)[KEYS], 1):
                    return Miss("something is added to whole rows before they are multiplied key by key", shift.node)
            else:
                steps.append(placed)
    if sink is not None and any(isinstance(s.instruction, Floor) for s in steps):
        return Miss("scores are raised to a finite number before a sink is put beside them", sink.tensor)
    capped = _cap(before, after, tanh)
    if isinstance(capped, Miss):
        return capped
    scale, factors, cap = capped
    kept = Plan(
        scale, factors, tuple(steps), is_causal, frozenset(covered), cap=cap, sink=sink, mix=mix.weight if mix else None
    )
    kept = _distribute(kept, products, grouped)
    if steps and not is_causal and sink is None:
        causal, steps = take_triangle(steps, sizes)
        kept = replace(kept, is_causal=causal, mask=tuple(steps))
    if steps and torch.is_grad_enabled() and not is_causal and sink is None:  # beside a sink masked keys weigh 0
        found = differentiable(steps)
        if isinstance(found, Miss):
            return found
        kept = replace(kept, uniform=found[0], mask=tuple(found[1]))
    return kept


def _cap(before: list[Scale], after: list[Scale], tanh: Tanh | None) -> tuple[float, tuple[Scale, ...], Any] | Miss:
    """(scale, factors on q, soft cap): after · tanh(before · s) = cap · tanh(cap · before · s / cap)."""
    outer, symbolic = _product(after)
    if tanh is None:
        scale, factors = _product(before)
        return scale, tuple(factors), None
    if symbolic:
        if len(symbolic) > 1 or symbolic[0].divide or outer != 1 or isinstance(val(symbolic[0].by), torch.Tensor):
            return Miss("the soft cap is not one number", tanh.node)
    elif outer == 0 or not math.isfinite(outer):
        return Miss(f"the soft cap is {outer}", tanh.node)
    scale, factors = _product([*before, *after])
    return scale, tuple(factors), symbolic[0].by if symbolic else outer


def _product(scales: Sequence[Scale]) -> tuple[float, list[Scale]]:
    """The numbers multiplied, and what is known only at run time without what is multiplied and divided by."""
    number = 1.0
    rest: list[Scale] = []
    for factor in scales:
        if not isinstance(factor.by, Node):
            number = number / factor.by if factor.divide else number * factor.by
        elif (inverse := replace(factor, divide=not factor.divide)) in rest:
            rest.remove(inverse)
        else:
            rest.append(factor)
    return number, rest


def _distribute(kept: Plan, products: Sequence[Placed], grouped: bool) -> Plan:
    """Products that are the same for a whole row on q, for a whole column on k, others as the factor."""
    on_q, on_k, factor = [], [], []
    for placed in products:
        _, heads, rows, keys = placed_shape(placed)
        if known_equal(keys, 1):
            on_q.append(placed)
        elif known_equal(rows, 1) and (known_equal(heads, 1) or not grouped):
            on_k.append(placed)
        else:
            factor.append(placed)
    return replace(kept, on_q=tuple(on_q), on_k=tuple(on_k), factor=tuple(factor))
