"""What was done to the attention weights, done to the result instead (`_attention_weights` has the algebra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from fxopt.graph.query import aten, val
from fxopt.match.match import Match
from fxopt.match.region import number
from fxopt.passes._attention_weights import Blank, Change, MixWeights, Plus, Renormalise, Rescale, Weights


def unmix(match: Match, wide: Node, values: Node, mix: MixWeights) -> Node:
    """Heads mixed: P [v_0, v_1, ...] of shape [B, H, M, H · Dv] to Σ_g W[h, g] P_g v_h (+ b_h · Σ v_h) [B, H, M, Dv].

    `values` is v [B, H, N, Dv].
    """
    heads = val(mix.weight).shape[0]
    apart = match.call(aten.reshape.default, wide, [*_sizes(match, wide, 3), heads, val(values).shape[3]])
    apart = match.call(aten.permute.default, apart, [0, 3, 1, 2, 4])
    weight = match.call(aten.reshape.default, mix.weight, [1, heads, heads, 1, 1])
    mixed = match.call(aten.mul.Tensor, apart, weight)
    result = match.call(aten.sum.dim_IntList, mixed, [2])
    if mix.bias is not None:
        total = match.call(aten.sum.dim_IntList, values, [2], True)
        bias = match.call(aten.reshape.default, mix.bias, [1, heads, 1, 1])
        result = match.call(aten.add.Tensor, result, match.call(aten.mul.Tensor, total, bias))
    return _like(match, result, wide)


def join_heads(match: Match, x: Node, factor: Node | None = None) -> Node:
    """[B, H, N, D] to [B, 1, N, H · D], the heads side by side; with a `factor` [H, H] to [B, H, N, H · D]: head h
    holds all heads, head g times factor[h, g].
    """
    heads, width = val(x).shape[1], val(x).shape[3]
    if factor is None:
        turned = match.call(aten.transpose.int, x, 1, 2)
        joined = match.call(aten.reshape.default, turned, [*_sizes(match, turned, 2), heads * width])
        return match.call(aten.unsqueeze.default, joined, 1)
    weight = match.call(aten.reshape.default, factor, [1, heads, heads, 1, 1])
    product = match.call(aten.mul.Tensor, match.call(aten.unsqueeze.default, x, 1), weight)  # [B, H, H', N, D]
    turned = match.call(aten.transpose.int, _like(match, product, x), 2, 3)
    return match.call(aten.reshape.default, turned, [*_sizes(match, turned, 3), heads * width])


def apply_changes(match: Match, result: Node, weights: Weights, changes: Sequence[Change]) -> Node:
    """Insert the changes behind `result`, which is laid out as the model's product with v is."""
    total: Any = 1.0  # the sum of each row of weights
    summed = any(isinstance(c, Renormalise) for c in changes)
    for change in changes:
        if isinstance(change, Rescale):
            op = aten.div.Tensor if change.divide else aten.mul.Tensor
            result = _like(match, match.call(op, result, change.by), result)
            total = _times(match, total, change.by, change.divide) if summed else total
        elif isinstance(change, Plus):
            core, total_of = change.core, 1.0 if change.covered else None
            if change.covered:
                core = match.call(core.target, *core.args, **core.kwargs)  # type: ignore[arg-type]
            product = match.call(aten.matmul.default, _like(match, core, weights.values), weights.values)
            for by in change.factors:
                product = _like(match, match.call(aten.mul.Tensor, product, by), product)
            result = match.call(aten.add.Tensor, result, product, alpha=change.alpha)
            if summed:
                more = total_of or match.call(aten.sum.dim_IntList, core, [-1], True)
                for by in (*change.factors, change.alpha):
                    more = _times(match, more, by)
                total = _plus(match, total, more)
        elif isinstance(change, Renormalise):
            if isinstance(total, Node):
                result = _like(match, match.call(aten.div.Tensor, result, total), result)
            elif total != 1:
                result = match.call(aten.div.Tensor, result, total)
            total = 1.0
        elif isinstance(change, Blank):
            result = _blank(match, result, change)
    return result


def _blank(match: Match, result: Node, change: Blank) -> Node:
    condition = change.condition
    if change.every:
        whole = aten.any.dim if change.keep else aten.all.dim
        condition = match.call(whole, condition, -1, True)
    if change.keep:
        condition = match.call(aten.logical_not.default, condition)
    return match.call(aten.masked_fill.Scalar, result, condition, 0)


def _times(match: Match, a: Any, b: Any, divide: bool = False) -> Any:
    plain = number(b)
    b = b if plain is None or isinstance(plain, Node) else plain
    if not isinstance(a, Node) and not isinstance(b, Node):
        return a / b if divide else a * b
    if not isinstance(a, Node):
        if not divide:
            return b if a == 1 else match.call(aten.mul.Tensor, b, a)
        return match.call(aten.mul.Tensor, match.call(aten.reciprocal.default, b), a)
    return match.call(aten.div.Tensor if divide else aten.mul.Tensor, a, b)


def _plus(match: Match, a: Any, b: Any) -> Any:
    if not isinstance(a, Node):
        a, b = b, a
    return a + b if not isinstance(a, Node) else match.call(aten.add.Tensor, a, b)


def _sizes(match: Match, node: Node, count: int) -> list[Any]:
    """The first sizes of a tensor as arguments: numbers, or nodes that read symbolic ones."""
    shape = val(node).shape
    return [n if isinstance(n, int) else match.call(aten.sym_size.int, node, d) for d, n in enumerate(shape[:count])]


def _like(match: Match, node: Node, other: Node) -> Node:
    dtype = val(other).dtype
    return node if val(node).dtype == dtype else match.call(aten.to.dtype, node, dtype)
