"""Reading the roles of attention off a graph: q, k, v, the score program and the product with v.

1. Anchor on a softmax; walk forward to the matmul that takes the weights, whatever is done to them on the way
   (`_attention_weights`).
2. Walk back to the matmuls that might make the scores: those with as many elements, nearest first. The first that works
   out is q kᵀ, others are terms. Where there is none, the scores are given: a bias without q and k.
3. Interpret what lies between as steps of one carried value (`_attention_scores`).
4. Place q, k and v (`_attention_operands`).

`F.scaled_dot_product_attention` names its roles itself and only needs the last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, val
from fxopt.graph.symbols import Dim, known_equal, same_shape
from fxopt.match import hints
from fxopt.match.axes import Layout, extent, identity, product, reshape, simplify
from fxopt.match.miss import Miss
from fxopt.match.region import Step, back, carried, producers
from fxopt.passes._attention_operands import Frame, Operand, place
from fxopt.passes._attention_program import ROWS, Add, Cast, Fill, Instruction, Scale
from fxopt.passes._attention_scores import is_keys, read_program
from fxopt.passes._attention_weights import MATMULS, Plus, Weights, read_weights, takes_weights

SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default)
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Roles:
    """An attention site. `sizes` are [batch, heads, rows, keys]; `covered` are the nodes that a rewrite makes dead.

    Where the scores are given, not made from q and k, those two are None. `weights` says what is done to the attention
    weights before the product (None for SDPA, which doesn't show them).
    """

    q: Operand | None
    k: Operand | None
    v: Operand
    program: tuple[Instruction, ...]
    sizes: tuple[Dim, Dim, Dim, Dim]
    output: Node
    covered: frozenset[Node]
    is_causal: bool = False
    empty_rows: str = "nan"
    weights: Weights | None = None
    width: Dim = 0  # of q and k

    @property
    def operands(self) -> list[Operand]:
        """Those of q, k and v that are there."""
        return [operand for operand in (self.q, self.k, self.v) if operand is not None]


def read_softmax(softmax: Node) -> Iterator[Roles | Miss]:
    """What the roles around a softmax may be, the likeliest first, near misses among them; nothing if not attention."""
    given = arguments(softmax)
    end = softmax.args[0]
    if not isinstance(end, Node) or not isinstance(val(softmax), Tensor) or val(softmax).dim() < 2:
        return
    rank = val(softmax).dim()
    products, made = _score_products(end)
    if not made or not takes_weights(softmax):
        return
    dim = given["dim"] % rank
    other = f"the softmax is over dimension {dim} of {rank}, not the last"
    if dim < rank - 2:
        yield Miss(other, softmax, 2)
        return
    for found in [_read(softmax, end, scores, dim - rank) for scores in products] or [_read_given(softmax, end, dim)]:
        if isinstance(found, Miss) and dim != rank - 1:
            found = replace(found, reason=f"{other}: {found.reason}")
        yield found


def _read(softmax: Node, end: Node, scores: Node, dim: int) -> Roles | Miss:
    """The roles if `scores` is the product of q and k; of k and q if the softmax is over the last dimension but one."""
    turned = dim == -2
    steps = carried(scores, end) if scores is not end else []
    if isinstance(steps, Miss):
        return replace(steps, progress=2)
    lhs, rhs, start = _factors(scores)
    frame, sizes = _frame(scores, lhs, rhs, steps)
    sizes, laid_out = _turned(sizes) if turned else (sizes, identity(sizes))
    layout = reshape(laid_out, val(scores).shape)
    if layout is None:
        return Miss("the dimensions of the scores can't be told apart", scores, 2)
    start = [replace(i, layout=layout) if isinstance(i, Add) else i for i in start]
    read = read_program(steps, layout)
    if isinstance(read, Miss):
        return replace(read, progress=2 + read.progress)
    program, layout = [*start, *read[0]], read[1]
    progress = 2 + len(steps)
    if val(softmax).dtype != val(end).dtype:  # softmax.int(x, dim, dtype)
        program.append(Cast(val(softmax).dtype))
    if not is_keys(layout[dim], layout):
        return Miss("the softmax is not over the keys: the scores were laid out anew before it", softmax, progress)
    weights = _weights(softmax, layout, program, sizes)
    if isinstance(weights, Miss):
        return replace(weights, progress=progress)
    output, lead = weights.output, weights.lead
    wide = {i.dtype for i in program if isinstance(i, (Add, Fill, Cast))} | {val(scores).dtype, val(softmax).dtype}
    if torch.float64 in wide and torch.float64 not in {val(lhs).dtype, val(output).dtype}:
        what = "the scores are computed in float64, wider than the fused op would"
        return Miss(what, scores, progress, hints.same_dtype("the scale and the mask", val(lhs).dtype))
    region = {scores, softmax, output, *weights.region, *(n for s in steps for n in (*s.inner, s.node))}
    frames = (frame, frame, Frame(lead, frame.batch, frame.heads))
    ends, bare = (lhs, rhs, weights.values), _is_read_again(weights)
    operands = _operands(*ends, frames, region, transposed=True, casts=val(output).dtype, bare=bare, turned=turned)
    if isinstance(operands, Miss):
        return replace(operands, progress=progress)
    q, k, v = operands
    covered = frozenset(region.union(q.covered, k.covered, v.covered))
    empty_rows = _empty_rows(softmax, weights)
    width = val(lhs).shape[-1]
    return Roles(q, k, v, tuple(program), sizes, output, covered, False, empty_rows, weights, width)


def _turned(sizes: tuple[Dim, ...]) -> tuple[tuple[Dim, Dim, Dim, Dim], Layout]:
    """Sizes and layout of scores [batch, heads, keys, rows], if `sizes` are those of [batch, heads, rows, keys]."""
    batch, heads, keys, rows = sizes
    lead = identity((batch, heads, rows, keys))
    return (batch, heads, rows, keys), (*lead[:2], lead[3], lead[2])


def _read_given(softmax: Node, end: Node, dim: int) -> Roles | Miss:
    """The roles where no product makes the scores: the scores are what is added to none."""
    shape = val(end).shape
    given = _split(tuple(shape[:-2]))
    sizes = (given.batch, given.heads, shape[-2], shape[-1])
    sizes, laid_out = (sizes, identity(sizes)) if dim == len(shape) - 1 else _turned(sizes)
    layout = reshape(laid_out, shape)
    if layout is None:
        return Miss("the dimensions of the scores can't be told apart", end, 2)
    weights = _weights(softmax, layout, (), sizes)
    if isinstance(weights, Miss):
        return replace(weights, progress=2)
    output, values = weights.output, weights.values
    if torch.float64 in {val(end).dtype, val(softmax).dtype} and val(output).dtype != torch.float64:
        return Miss("the scores are computed in float64, wider than the fused op would", end, 2)
    region = {softmax, output, *weights.region}
    frame = Frame(weights.lead, sizes[0], sizes[1])
    v = place(values, frame, region, bare=_is_read_again(weights))
    if v is None:
        return Miss("v can't be brought to [batch, heads, rows, width]", values, 2)
    program = (Add(end, 1, val(end).dtype, layout),)
    covered = frozenset(region.union(v.covered))
    return Roles(None, None, v, program, sizes, output, covered, False, _empty_rows(softmax, weights), weights)


def _empty_rows(softmax: Node, weights: Weights) -> str:
    return "zero" if softmax.target is aten._safe_softmax.default or weights.zero_empty else "nan"


def _is_read_again(weights: Weights) -> bool:
    """Whether the replacement reads the model's own v, for a product of its own."""
    return any(isinstance(change, Plus) for change in weights.changes)


def _weights(softmax: Node, layout: Layout, program: Sequence[Instruction], sizes: tuple[Dim, ...]) -> Weights | Miss:
    weights = read_weights(softmax, layout, program)
    if weights is None:
        return Miss("no product takes the attention weights", softmax)
    if isinstance(weights, Miss):
        return weights
    lead = _output_lead(weights.layout, weights.output, sizes)
    return lead if isinstance(lead, Miss) else replace(weights, lead=lead)


def read_sdpa(node: Node) -> Roles | Miss:
    """The roles that a call of `F.scaled_dot_product_attention` names."""
    given = arguments(node)
    q, k, v, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if given["dropout_p"] != 0:
        return Miss(f"dropout is active (dropout_p={given['dropout_p']})", node, 1, hints.DROPOUT)
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
            return Miss(
                f"the head size {width} is not a number, so the scale isn't either", node, 1, "pass scale=, a number"
            )
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


def _score_products(end: Node) -> tuple[list[Node], bool]:
    """The matmuls that may make the scores, likeliest first, and whether there is any matmul behind them at all.

    Those with as many elements as the scores, nearest first, also through a linear layer (over the heads); else the
    nearest, for its reason why not.
    """

    def is_product(node: Node) -> bool:
        return is_call(node, *MATMULS, aten.linear.default)

    found = producers(end, is_product)
    products = [n for n in found if is_call(n, *MATMULS)]
    for linear in found:
        if is_call(linear, aten.linear.default) and isinstance(linear.args[0], Node):
            products += [n for n in producers(linear.args[0], is_product) if is_call(n, *MATMULS)]
    products = [n for n in dict.fromkeys(products) if val(n).dim() >= 2]
    wanted = product(val(end).shape)
    fitting = [n for n in products if known_equal(product(val(n).shape), wanted)]
    if fitting or not any(is_call(n, *MATMULS) for n in found):
        return fitting, bool(found)
    return products[:1], True


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
    bare: bool = False,
    turned: bool = False,
) -> tuple[Operand, Operand, Operand] | Miss:
    """q, k and v placed; `casts` is the result's dtype if q and k may be taken before a cast to a wider dtype.

    `bare`: v is taken as the product reads it. `turned`: the left operand is k, the right one q.
    """
    if turned:
        lhs, rhs = rhs, lhs
    scaled = transposed  # SDPA's own operands are taken as they are
    k_turned = transposed and not turned

    def placed(grouped: bool, widened: bool) -> tuple[Operand | None, Operand | None, Operand | None]:
        return (
            place(lhs, frames[0], region, transposed=turned, scaled=scaled, casts=widened),
            place(rhs, frames[1], region, transposed=k_turned, grouped=grouped, scaled=scaled, casts=widened),
            place(values, frames[2], region, grouped=grouped, bare=bare),
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
