"""Reading the roles of attention off a graph: q, k, v, the score program and the product with v.

1. Anchor on a softmax; walk forward through casts and layout ops to the matmul that takes the weights.
2. Walk back to the matmul that makes the scores: the nearest of those with as many elements as the scores.
3. Interpret what lies between as steps of one carried value (`_attention_scores`).
4. Place q, k and v (`_attention_operands`).

`F.scaled_dot_product_attention` names its roles itself and only needs the last step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, val
from fxopt.graph.symbols import Dim, known_equal, same_shape
from fxopt.match.axes import Layout, extent, identity, product, reshape, simplify, through
from fxopt.match.miss import Miss
from fxopt.match.region import Step, back, carried, consumers, passes_on, producers
from fxopt.passes._attention_operands import Frame, Operand, place
from fxopt.passes._attention_scores import (
    ROWS,
    Add,
    Cast,
    Fill,
    Instruction,
    Scale,
    is_keys,
    read_program,
)

MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Roles:
    """An attention site. `sizes` are [batch, heads, rows, keys]; `covered` are the nodes that a rewrite makes dead."""

    q: Operand
    k: Operand
    v: Operand
    program: tuple[Instruction, ...]
    sizes: tuple[Dim, Dim, Dim, Dim]
    output: Node
    covered: frozenset[Node]
    is_causal: bool = False
    empty_rows: str = "nan"


def read_softmax(softmax: Node) -> Roles | Miss | None:
    """The roles around a softmax, a near miss, or None where nothing looks like attention."""
    given = arguments(softmax)
    scores_end = softmax.args[0]
    if not isinstance(scores_end, Node) or not isinstance(val(softmax), Tensor):
        return None
    scores = _score_product(scores_end)
    if scores is None or val(scores).dim() < 2:
        return None
    ahead = _weights_product(softmax)
    if ahead is None:
        return None
    rank = val(softmax).dim()
    if given["dim"] % rank != rank - 1:
        return Miss(f"the softmax is over dimension {given['dim'] % rank} of {rank}, not the last", softmax, 2)
    steps = carried(scores, scores_end) if scores is not scores_end else []
    if isinstance(steps, Miss):
        return replace(steps, progress=2)
    lhs, rhs, start = _factors(scores)
    frame, sizes = _frame(scores, lhs, rhs, steps)
    layout = reshape(identity(sizes), val(scores).shape)
    if layout is None:
        return Miss("the dimensions of the scores can't be told apart", scores, 2)
    start = [replace(i, layout=layout) if isinstance(i, Add) else i for i in start]
    read = read_program(steps, layout)
    if isinstance(read, Miss):
        return replace(read, progress=2 + read.progress)
    program, layout = [*start, *read[0]], read[1]
    progress = 2 + len(steps)
    if val(softmax).dtype != val(scores_end).dtype:  # softmax.int(x, dim, dtype)
        program.append(Cast(val(softmax).dtype))
    if isinstance(ahead, Miss):
        return replace(ahead, progress=progress)
    output, path = ahead
    if not is_keys(layout[-1], layout):
        return Miss("the softmax is not over the keys: the scores were laid out anew before it", softmax, progress)
    for node in path:
        after = through(node, layout)
        if after is None:
            return Miss(f"{node.name} lays the weights out in a way that can't be followed", node, progress)
        layout = after
    lead = _output_lead(layout, output, sizes)
    if isinstance(lead, Miss):
        return replace(lead, progress=progress)

    wide = {i.dtype for i in program if isinstance(i, (Add, Fill, Cast))} | {val(scores).dtype, val(softmax).dtype}
    if torch.float64 in wide and torch.float64 not in {val(lhs).dtype, val(output).dtype}:
        return Miss("the scores are computed in float64, wider than the fused op would", scores, progress)
    region = {scores, softmax, output, *path, *(n for s in steps for n in (*s.inner, s.node))}
    frames = (frame, frame, Frame(lead, frame.batch, frame.heads))
    operands = _operands(lhs, rhs, output.args[1], frames, region, transposed=True, casts=val(output).dtype)
    if isinstance(operands, Miss):
        return replace(operands, progress=progress)
    q, k, v = operands
    covered = frozenset(region.union(q.covered, k.covered, v.covered))
    empty_rows = "zero" if softmax.target is aten._safe_softmax.default else "nan"
    return Roles(q, k, v, tuple(program), sizes, output, covered, False, empty_rows)


def read_sdpa(node: Node) -> Roles | Miss:
    """The roles that a call of `F.scaled_dot_product_attention` names."""
    given = arguments(node)
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if given["dropout_p"] != 0:
        return Miss(f"dropout is active (dropout_p={given['dropout_p']})", node, 1)
    if any(val(x).dim() < 2 for x in (q, k, v)):
        return Miss("the operands have fewer than two dimensions", node, 1)
    if not known_equal(val(k).shape[-2], val(v).shape[-2]):
        return Miss("k and v are not known to be of the same length", node, 1)
    lead = tuple(val(node).shape[:-2])
    frame = _split(lead)
    sizes = (frame.batch, frame.heads, val(q).shape[-2], val(k).shape[-2])
    layout = reshape(identity(sizes), (*lead, *sizes[2:]))
    if layout is None:
        return Miss("the dimensions of the scores can't be told apart", node, 1)
    scale = given["scale"]
    if scale is None:
        width = val(q).shape[-1]
        if not isinstance(width, int) or width == 0:
            return Miss(f"the head size {width} is not a number, so the scale isn't either", node, 1)
        scale = 1 / math.sqrt(width)
    program: list[Instruction] = [Scale(scale)]
    if mask is not None and val(mask).dtype == torch.bool:
        program.append(Fill(mask, True, -math.inf, val(q).dtype, layout))
    elif mask is not None:
        program.append(Add(mask, 1, val(q).dtype, layout))
    own = frame  # of k and v
    if given["enable_gqa"] and not known_equal(val(k).shape[-3], frame.heads):
        if len(lead) != 2:
            return Miss(f"grouped heads in {len(lead) + 2} dimensions", node, 1)
        own = _split((lead[0], val(k).shape[-3]))
    operands = _operands(q, k, v, (frame, own, own), {node}, transposed=False, casts=None)
    if isinstance(operands, Miss):
        return operands
    covered = frozenset({node}.union(*(o.covered for o in operands)))
    return Roles(*operands, tuple(program), sizes, node, covered, bool(given["is_causal"]), "zero")


def _score_product(scores: Node) -> Node | None:
    """The matmul that makes the scores, or None: the nearest with as many elements, else the nearest."""
    found = [n for n in producers(scores, lambda n: is_call(n, *MATMULS, aten.linear.default)) if is_call(n, *MATMULS)]
    wanted = product(val(scores).shape)
    return next((n for n in found if known_equal(product(val(n).shape), wanted)), found[0] if found else None)


def _weights_product(softmax: Node) -> tuple[Node, list[Node]] | Miss | None:
    """The matmul that takes the weights as its left operand and the nodes between; a miss, or None if there is none."""
    used = consumers(softmax)
    products = [(user, path) for user, path in used if is_call(user, *MATMULS)]
    if not products:
        for user, _ in used:  # does some other op stand between the weights and a product?
            if passes_on(user) and any(is_call(u, *MATMULS) for u, _ in consumers(user, passes_on)):
                what = "dropout is active on" if is_call(user, aten.dropout) else f"{user.target} is applied to"
                return Miss(f"{what} the attention weights", user, 2)
        return None
    user, path = products[0]
    others = [u for u, _ in used if u is not user]
    if others:
        return Miss(f"the attention weights are also used by {others[0].name}", others[0], 2)
    weights = path[-1] if path else softmax
    position = 1 if user.target in (aten.baddbmm.default, aten.addmm.default) else 0
    if [i for i, a in enumerate(user.args) if a is weights] != [position]:
        return Miss(f"the attention weights are not the left operand of {user.name}", user, 2)
    if position == 1:
        return Miss(f"{user.name} adds something to the product of weights and values", user, 2)
    return user, list(path)


def _factors(scores: Node) -> tuple[Node, Node, list[Instruction]]:
    """The operands of the score product and what a baddbmm does besides: beta · input + alpha · (lhs rhs)."""
    if scores.target not in (aten.baddbmm.default, aten.addmm.default):
        return scores.args[0], scores.args[1], []  # type: ignore[return-value]
    given = arguments(scores)
    first, lhs, rhs = scores.args[:3]
    program: list[Instruction] = []
    if given["alpha"] != 1:
        program.append(Scale(given["alpha"]))
    if given["beta"] != 0:
        program.append(Add(first, given["beta"], val(scores).dtype, ()))  # type: ignore[arg-type]
    return lhs, rhs, program  # type: ignore[return-value]


def _frame(scores: Node, lhs: Node, rhs: Node, steps: list[Step]) -> tuple[Frame, tuple[Dim, Dim, Dim, Dim]]:
    """The coordinates of the scores, and their sizes.

    A product over [batch · heads, rows, keys] is read with the batch and heads that the scores are viewed with before
    the softmax, or that q was put together from; any split of the leading dimension is right.
    """
    shape = val(scores).shape
    lead, rows, keys = tuple(shape[:-2]), shape[-2], shape[-1]
    frame = _split(lead)
    if len(lead) == 1:
        for step in steps:
            seen = val(step.node).shape
            if len(seen) == 4 and same_shape(seen[2:], (rows, keys)) and known_equal(seen[0] * seen[1], lead[0]):
                return Frame(lead, seen[0], seen[1]), (seen[0], seen[1], rows, keys)
        for operand in (rhs, lhs):
            for base in back(operand):
                seen = val(base).shape
                if len(seen) == 4 and known_equal(seen[0] * seen[1], lead[0]):
                    return Frame(lead, seen[0], seen[1]), (seen[0], seen[1], rows, keys)
    return frame, (frame.batch, frame.heads, rows, keys)


def _split(lead: tuple[Dim, ...]) -> Frame:
    return Frame(lead, lead[0] if lead else 1, product(lead[1:]))


def _output_lead(layout: Layout, output: Node, sizes: tuple[Dim, ...]) -> tuple[Dim, ...] | Miss:
    """The leading dimensions of the product with v, which must be batch and heads in this order."""
    lead = tuple(extent(group) for group in layout[:-2])
    if not is_keys(layout[-1], layout) or not same_shape(val(output).shape[:-2], lead):
        return Miss("the product with v is not over the keys, head by head", output)
    rows = layout[-2]
    flat = simplify(axis for group in layout[:-2] for axis in group)
    expected = simplify(axis for group in identity(sizes)[:ROWS] for axis in group)
    if list(rows) != list(identity(sizes)[ROWS]) or flat != expected:
        return Miss("the weights are laid out anew before the product with v (rows or heads are moved)", output)
    return lead


def _operands(
    lhs: Any,
    rhs: Any,
    values: Any,
    frames: tuple[Frame, Frame, Frame],
    region: set[Node],
    *,
    transposed: bool,
    casts: torch.dtype | None,
) -> tuple[Operand, Operand, Operand] | Miss:
    """q, k and v placed; `casts` is the result's dtype if q and k may be taken before a cast to a wider dtype."""
    scaled = transposed  # SDPA's own operands are taken as they are

    def placed(grouped: bool, widened: bool) -> tuple[Operand | None, Operand | None, Operand | None]:
        return (
            place(lhs, frames[0], region, scaled=scaled, casts=widened),
            place(rhs, frames[1], region, transposed=transposed, grouped=grouped, scaled=scaled, casts=widened),
            place(values, frames[2], region, grouped=grouped),
        )

    for grouped, widened in ((True, True), (True, False), (False, True), (False, False)):
        q, k, v = placed(grouped, widened) if not widened or casts is not None else (None, None, None)
        if q is None or k is None or v is None or not known_equal(k.heads, v.heads):
            continue
        if not widened or {val(q.base).dtype, val(k.base).dtype} == {casts}:
            return q, k, v
    q, k, v = placed(False, False)
    for operand, end, name in ((q, lhs, "q"), (k, rhs, "k"), (v, values, "v")):
        if operand is None:
            return Miss(f"{name} can't be brought to [batch, heads, rows, width]", end)
    return Miss("k and v have different heads", values)
