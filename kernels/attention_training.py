"""Attention with a backward of its own, for what SDPA's can't be told: soft caps, factors, bounds, sinks.

attention_stats(q, k, v, ...)          the result, and of each row the maximum score m and the weight l = Σ exp(s - m)
attention_gradients(grad, out, ...)    the gradients of all of its tensors, recomputed from q, k, v, m and l

Nothing of M x N elements is kept between the two, nor made, but for the gradient of a mask that has as many itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxopt.graph.symbols import known_true
from fxopt.kernels import (
    _attention_sdpa,
    _flash,
    _flash_backward,
    _flash_decode,
    _flash_parts,
    _flash_tiles,
    _launch,
    _triton,
)
from fxopt.kernels._attention_sdpa import causal, group_rows, spread, within_bounds
from fxopt.kernels._flash_parts import MAX_WIDTH
from fxopt.ops import Target, fused_op

_MODULES = (_triton, _launch, _flash, _flash_backward, _flash_decode, _flash_parts, _flash_tiles, _attention_sdpa)
#: what both ops and `attention` are written in, beside their own files
SOURCES = [__file__, *(str(module.__file__) for module in _MODULES)]
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, str empty_rows, float? softcap,"
    " Tensor? sink, Tensor? factor, Tensor? first, Tensor? last, Tensor? bias"
)


@fused_op(f"attention_stats({_ARGUMENTS}) -> (Tensor, Tensor)", sources=SOURCES, contiguous=True)
def attention_stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    empty_rows: str,
    softcap: float | None,
    sink: Tensor | None,
    factor: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result of the op `attention` (see there), and float32 or float64 [2, B, Hq, M].

    The second are the maximum score of each row, -inf where it has none, and the sum of exp(score - maximum), 0 there;
    rows that are averages because nothing is live in them count as such. A sink is one of the scores.
    """
    _, _, scores, live = _scores(q, k, mask, scale, is_causal, softcap, factor, first, last, bias)
    columns = scores if sink is None else torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:3], 1)], -1)
    top = columns.amax(-1, keepdim=True)
    weight = torch.exp(columns - torch.where(top == -torch.inf, 0.0, top)).sum(-1, keepdim=True)
    shares = _shares(scores, top, weight, empty_rows)
    if empty_rows == "uniform" and sink is None and live is not None:
        shares = torch.where(live.any(-1, keepdim=True), shares, 1.0 / k.shape[2])
    out = group_rows(shares, k.shape[1]) @ v.to(shares.dtype)
    return out.reshape(*q.shape[:3], v.shape[3]).to(v.dtype), torch.stack([top[..., 0], weight[..., 0]])


def _scores(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float | None,
    factor: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """scale · q kᵀ, d(capped) / d(multiplied), the scores with -inf where nothing is live, and what is live."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kv_heads, keys = k.shape[1:3]
    raw = (group_rows(q.to(wide), kv_heads) @ k.to(wide).mT).reshape(*q.shape[:3], keys) * scale
    scores = raw if factor is None else raw * factor
    slope = torch.ones_like(raw)
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    if bias is not None:
        scores = scores + spread(bias.to(wide), q.shape[2], keys)
    live = within_bounds(first, last, keys)
    if is_causal:
        below = causal(q.shape[2], keys, q.device)
        live = below if live is None else live & below
    if mask is not None and mask.dtype == torch.bool:
        live = mask if live is None else live & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    return raw, slope, scores if live is None else torch.where(live, scores, -torch.inf), live


def _shares(scores: Tensor, top: Tensor, weight: Tensor, empty_rows: str) -> Tensor:
    """exp(scores - top) / weight; 0, or NaN, where nothing is live."""
    shares = torch.exp(scores - torch.where(top == -torch.inf, 0.0, top)) / weight
    return shares if empty_rows == "nan" else torch.where(weight == 0, 0.0, shares)


@attention_stats.fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty((*q.shape[:3], v.shape[3])), q.new_empty((2, *q.shape[:3]), dtype=wide)


def unserved(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    """Why no Triton kernel, forward or backward, serves these arguments of `attention`, wherever they are."""
    _, is_causal, empty_rows, _, sink, _, first, last, _ = rest
    bounded = first is not None or last is not None
    adds = mask is not None and mask.is_floating_point()
    if (
        empty_rows == "uniform"
        and sink is None
        and ((bounded and adds) or (is_causal and (bounded or mask is not None)))
    ):
        return "the Triton kernel averages rows that are empty over all keys, not over some"
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in (q, k, v)):
        return "the Triton kernel computes in float32"
    if not known_true(q.shape[3] <= MAX_WIDTH) or not known_true(v.shape[3] <= MAX_WIDTH):
        return f"the Triton kernel serves heads up to {MAX_WIDTH} wide"
    return None


def unable(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    """Why the Triton kernels can't serve these arguments, where they are run with gradients."""
    _, _, empty_rows, _, sink, _, first, last, _ = rest
    fills = first is not None or last is not None or (mask is not None and not mask.is_floating_point())
    if sink is None and fills and empty_rows == "nan":
        return "rows that a fill empties have gradients that the Triton kernel does not give"
    return unserved(q, k, v, mask, *rest) or _triton.needs_gpu(replace(target, training=False))


@attention_stats.implementation("triton", opaque=True, when=unable)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _flash_backward.flash_forward(q, k, v, *rest)


@attention_stats.gradient
def _(args: Any, results: Any, grads: Any, wanted: Any) -> list[Tensor | None]:
    mask, sink, factor, bias = args[3], args[8], args[9], args[12]
    out, stats = results
    extras = [t is not None and wanted[i] for t, i in ((mask, 3), (sink, 8), (factor, 9), (bias, 12))]
    given: list[Tensor | None] = [None] * len(args)
    if grads[0] is None:
        return given
    found = attention_gradients(grads[0], out, stats, *extras, *args)
    for place, gradient, needed in zip((0, 1, 2, 3, 8, 9, 12), found, [*wanted[:3], *extras], strict=True):
        given[place] = gradient if needed else None
    return given


@fused_op(
    "attention_gradients(Tensor grad, Tensor out, Tensor stats, bool of_mask, bool of_sink, bool of_factor,"
    f" bool of_bias, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    sources=SOURCES,
    contiguous=True,
)
def attention_gradients(
    grad: Tensor,
    out: Tensor,
    stats: Tensor,
    of_mask: bool,
    of_sink: bool,
    of_factor: bool,
    of_bias: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    empty_rows: str,
    softcap: float | None,
    sink: Tensor | None,
    factor: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, mask, sink, factor and bias, given the result's; an empty tensor where not asked for.

    `out` and `stats` are the results of `attention_stats` for the same arguments.
    """
    raw, slope, scores, live = _scores(q, k, mask, scale, is_causal, softcap, factor, first, last, bias)
    wide, (batch, heads, rows, _), kv_heads = scores.dtype, q.shape, k.shape[1]
    top, weight, grad = stats[0][..., None], stats[1][..., None], grad.to(scores.dtype)
    shares = _shares(scores, top, weight, empty_rows)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    if empty_rows != "nan":
        delta = torch.where(weight == 0, 0.0, delta)
    products = (group_rows(grad, kv_heads) @ v.to(wide).mT).reshape(scores.shape)
    of_scores = shares * (products - delta)
    of_products = of_scores * slope  # of what the cap was given
    of_raw = of_products if factor is None else of_products * factor
    if empty_rows == "uniform" and sink is None and live is not None:
        shares = torch.where(live.any(-1, keepdim=True), shares, 1.0 / k.shape[2])
    dq = (group_rows(of_raw, kv_heads) @ k.to(wide)).reshape(q.shape) * scale
    dk = group_rows(of_raw, kv_heads).mT @ group_rows(q.to(wide), kv_heads) * scale
    dv = group_rows(shares, kv_heads).mT @ group_rows(grad, kv_heads)
    of_column = torch.zeros_like(delta)
    if sink is not None:
        of_column = -_shares(sink.to(wide).expand(batch, heads, rows, 1), top, weight, empty_rows) * delta
    extras = ((mask, of_mask, of_scores), (sink, of_sink, of_column), (factor, of_factor, of_products * raw))
    return (  # type: ignore[return-value]
        *(d.to(t.dtype) for d, t in ((dq, q), (dk, k), (dv, v))),
        *(q.new_empty(0) if t is None or not asked else _summed(d, t) for t, asked, d in extras),
        q.new_empty(0) if bias is None or not of_bias else _gathered(of_scores, bias),
    )


def _summed(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A gradient of what `tensor` was broadcast to, as its own."""
    return gradient.sum_to_size((1,) * (4 - tensor.dim()) + tensor.shape).reshape(tensor.shape).to(tensor.dtype)


def _gathered(gradient: Tensor, bias: Tensor) -> Tensor:
    """A gradient of what was added to the scores [B, Hq, M, N], as that of a bias by key, by distance or a slope."""
    rows, keys = gradient.shape[2:]
    if bias.dim() == 4:
        return gradient.sum_to_size(bias.shape).to(bias.dtype)
    row, key = torch.arange(rows, device=bias.device), torch.arange(keys, device=bias.device)
    if bias.dim() == 2:
        return (gradient * (key - row[:, None])).sum((2, 3)).sum_to_size(bias.shape).to(bias.dtype)
    distance = (key + (rows - 1 - row)[:, None]).flatten()
    sums = gradient.new_zeros(*gradient.shape[:2], bias.shape[-1]).index_add(-1, distance, gradient.flatten(2))
    return sums.sum_to_size(bias.shape).to(bias.dtype)


@attention_gradients.fake
def _(grad: Tensor, out: Tensor, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    of_mask, of_sink, of_factor, of_bias, q, k, v, mask, *_, sink, factor, _, _, bias = rest
    extras = ((mask, of_mask), (sink, of_sink), (factor, of_factor), (bias, of_bias))
    return (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        *(t.new_empty(t.shape) if wanted else q.new_empty(0) for t, wanted in extras),
    )


def _gradients_unable(target: Target, *args: Any) -> str | None:
    return unable(target, *args[7:])


@attention_gradients.implementation("triton", opaque=True, when=_gradients_unable)
def _(grad: Tensor, out: Tensor, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *wanted, q, k, v = rest[:7]
    found = _flash_backward.flash_backward(grad, out, stats, tuple(wanted), q, k, v, *rest[7:])
    return tuple(q.new_empty(0) if t is None else t for t in found)
