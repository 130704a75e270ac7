"""Attention: softmax(scale · q kᵀ + mask) v, with grouped-query heads whose keys and values are never repeated.

Bytes: q and the result once, k and v once per KV head (plus the mask once per head that it tells apart); the M x N
scores stay on the chip. FLOPs: 2·B·Hq·M·N·(D + Dv), about half of that where causal. With M query rows a KV head does
2·(Hq/Hkv)·M FLOPs for every element it reads, so decoding (M of 1 to 16) is bound by bandwidth, prefill by the tensor
cores.

On the way to the softmax scores may be multiplied by a tensor, capped softly (Gemma 2: c·tanh(s / c)) and given a sink
(GPT-OSS: one more column, whose weight is dropped):

    s = scale · q kᵀ · factor;  s = c · tanh(s / c);  s = s + mask;  weights = softmax([s, sink])[:N]

A bias that depends on the distance of key and row only (T5's relative positions), or only on the key, is given as the
M + N - 1 or N numbers that it holds, one that is a multiple of the distance (ALiBi) as that one number: `bias`. Neither
a kernel nor what calls it makes M x N numbers of them.

A row's keys may be bounded: `first` and `last`, one number a row, say what causality with an offset, sliding windows,
chunks, caches that are filled in part and packed sequences say, without a mask of M x N elements.

Rows with no live key (every score -inf) come in two kinds: a spelled-out softmax gives NaN there,
F.scaled_dot_product_attention gives 0. `empty_rows` says which. A row that is masked with a finite number, as
torch.finfo(dtype).min, has live keys: plain arithmetic makes its weights uniform.

Gradients tell apart how such a row was masked: a number that was added passes them on to q and k, one that was filled
in does not. A fill is the third kind of empty row, "uniform". For an added number the flash kernels won't do: their
backward takes weights as exp(score - logsumexp), and the logarithm of N is lost beside finfo.min, so every weight is 1
instead of 1 / N. Such a mask is differentiated spelled out, unless it is the same for all rows (`attend_added`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.symbols import Dim, hint, known_equal, known_true
from fxopt.kernels import _attention_sdpa, _flash, attention_training
from fxopt.kernels._attention_sdpa import (
    ABSORBING,
    causal,
    dense_mask,
    group_rows,
    repeat_heads,
    spread,
    with_bounds,
    within_bounds,
)
from fxopt.kernels._flash_decode import MAX_DECODE_ROWS
from fxopt.kernels._flash_parts import MAX_WIDTH as MAX_WIDTH
from fxopt.kernels._triton import needs_gpu
from fxopt.kernels.attention_training import attention_stats, unable, unserved
from fxopt.ops import Target, fused_op


@fused_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False,"
    ' str empty_rows="nan", float? softcap=None, Tensor? sink=None, Tensor? factor=None, Tensor? first=None,'
    " Tensor? last=None, Tensor? bias=None) -> Tensor",
    sources=attention_training.SOURCES,
    contiguous=True,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    empty_rows: str = "nan",
    softcap: float | None = None,
    sink: Tensor | None = None,
    factor: Tensor | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of `q` [B, Hq, M, D] over `k` [B, Hkv, N, D] and `v` [B, Hkv, N, Dv]; Hq is a multiple of Hkv.

    `mask` broadcasts to [B, Hq, M, N]: bool (True attends) or a float that is added to the scaled scores. Integers
    [B or 1, Hq or 1, N] number the segments of keys, and of as many rows: where numbers are equal, the row attends.
    `is_causal` further restricts row i to the keys j <= i; the integers `first` and `last` (which broadcast to
    [B, Hq, M]) restrict it to first <= j <= last as a boolean mask would. Beside segments `first` must be given; where
    it isn't negative the row attends to all keys within its bounds, and the numbers need not be read.
    Returns [B, Hq, M, Dv] in v's dtype, computed in at least float32.
    `empty_rows` is the result of rows in which every score is -inf: "nan" or "zero". With "uniform" a boolean mask
    fills in a huge finite number in place of -inf, so rows that it masks throughout are averages.
    `factor` (broadcasts to [B, Hq, M, N]) multiplies the scaled scores and `softcap` keeps them within +-softcap, both
    before the mask. `bias` is a float that is added before the mask, finite where `empty_rows` is "uniform": with four
    dimensions, [B or 1, Hq or 1, 1, N], a number for each key; with three, [B or 1, Hq or 1, M + N - 1], a number for
    each distance of key j and row i, that at j - i + M - 1; with two, [B or 1, Hq or 1], a slope, which is multiplied
    by j - i. `sink` (broadcasts to [B, Hq, M, 1]) is the score of a key that takes weight and has no value.
    """
    mask = dense_mask(mask, first)
    dtypes = [t.dtype for t in (q, k, v, mask, sink, factor, bias) if t is not None]
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    heads, rows = q.shape[1], q.shape[2]
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = group_rows(q.to(compute), kv_heads)
    scores = (grouped @ k.to(compute).transpose(-1, -2)).reshape(q.shape[0], heads, rows, keys) * scale
    if factor is not None:
        scores = scores * factor.to(compute)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + spread(bias.to(compute), rows, keys)
    if mask is not None:
        filling = ABSORBING if empty_rows == "uniform" else -torch.inf
        scores = torch.where(mask, scores, filling) if mask.dtype == torch.bool else scores + mask.to(compute)
    live = within_bounds(first, last, keys)
    if live is not None:
        scores = torch.where(live, scores, ABSORBING if empty_rows == "uniform" else -torch.inf)
    if is_causal:
        scores = torch.where(causal(rows, keys, q.device), scores, -torch.inf)
    weights = _softmax(scores, sink)
    if empty_rows == "zero":
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    result = group_rows(weights, kv_heads) @ v.to(compute)
    return result.reshape(q.shape[0], heads, rows, v.shape[3]).to(v.dtype)


@attention.fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """softmax([scores, sink]) without its last column."""
    if sink is None:
        return torch.softmax(scores, -1)
    columns = [scores, sink.to(scores.dtype).expand(*scores.shape[:3], 1)]
    return torch.softmax(torch.cat(columns, -1), -1)[..., :-1]


# From so many keys on, decoding is worth a kernel of its own.
DECODE_KEYS = 1024
# From so many scores on, a launch from the host takes no longer than what the kernel saves.
MANY_SCORES = 1 << 21
# From so many elements on, bounds are not made a mask for SDPA.
MASK_ELEMENTS = 1 << 18
# From so many rows on, copying K and V to put a sink beside them is little beside the products.
SINK_ROWS = 32


def _beyond_sdpa(softcap: float | None, factor: Tensor | None) -> str | None:
    """What SDPA can't be told, in words."""
    if softcap is not None:
        return "SDPA has no soft cap"
    return "SDPA does not multiply scores by a tensor" if factor is not None else None


def _triton_unable(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> str | None:
    """Why the Triton kernels can't serve these arguments."""
    return unserved(q, k, v, mask, *rest) or needs_gpu(target)


def _triton_pays(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> str | None:
    """The one place that says where the Triton kernels are preferred: for few rows over many keys, and where SDPA
    can't help, would need the bounds of many rows as a mask, or the sink as a key, which costs a copy of K and V, half
    a tile of width and a mask. And in half precision where it would read a number for each score: for Swin's windows of
    49 tokens it takes 6 times as long on an H200, with BLOOM's biases twice, with dense masks as long to twice."""
    _, _, _, softcap, sink, factor, first, last, bias = rest
    bounded = first is not None or last is not None
    if _beyond_sdpa(softcap, factor) is not None or sink is not None:  # type: ignore[arg-type]
        return None
    if bounded and _many(q, k):
        return None
    if q.dtype.itemsize == 2 and _adds_to_each(mask, bias) and _much(q, k):  # type: ignore[arg-type]
        return None
    if not target.compiled:
        return "op by op, SDPA's launch costs the host less"
    if not target.cuda_graphs:
        # H200, 8-layer 8B shape, one row over 2048 keys: a step of 4.6 ms against Inductor's 3.1 ms.
        return "outside a CUDA graph it was measured to be slower"
    if not known_true(q.shape[2] <= MAX_DECODE_ROWS):
        return f"SDPA is faster for more than {MAX_DECODE_ROWS} query rows"
    if not known_true(k.shape[2] >= DECODE_KEYS):
        return f"SDPA is as fast for fewer than {DECODE_KEYS} keys"
    return None


def _adds_to_each(mask: Tensor | None, bias: Tensor | None) -> bool:
    """Whether rows and keys have numbers of their own, or would be given them for SDPA."""
    if bias is not None:
        return True
    return (
        mask is not None and mask.dim() >= 2 and known_true(mask.shape[-2] > 1) and not known_equal(mask.stride(-2), 0)
    )


def _much(q: Tensor, k: Tensor) -> bool:
    """Whether there are rows and scores for more than what launching the kernel takes the host."""
    scores = hint(q.shape[0]) * hint(q.shape[1]) * hint(q.shape[2]) * hint(k.shape[2])
    return hint(q.shape[2]) > MAX_DECODE_ROWS and scores >= MANY_SCORES


def is_large(rows: Dim, keys: Dim) -> bool:
    """Whether a mask of this size is one to avoid, by the sizes of the first call (every choice is right)."""
    return hint(rows) * hint(keys) >= MASK_ELEMENTS


def _many(q: Tensor, k: Tensor) -> bool:
    return is_large(q.shape[2], k.shape[2])


@attention.draw
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *rest: Any) -> tuple[Any, ...]:
    """Normal numbers, masks that leave everything live, and bounds that are those of causality."""
    *middle, sink, factor, first, last, bias = rest
    drawn = [None if t is None else _drawn(t) for t in (q, k, v, mask, sink, factor, bias)]
    if first is not None:
        first = torch.zeros(first.shape, dtype=first.dtype)
    if last is not None:
        each = last.dim() > 0 and last.shape[-1] == q.shape[2]
        rows = torch.arange(q.shape[2]) if each else torch.tensor(q.shape[2] - 1)
        last = (rows + k.shape[2] - q.shape[2]).to(last.dtype).expand(last.shape)
    return (*drawn[:4], scale, *middle, *drawn[4:6], first, last, drawn[6])


def _drawn(like: Tensor) -> Tensor:
    span = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    flat = torch.ones(span, dtype=torch.bool) if like.dtype == torch.bool else torch.randn(span).to(like.dtype)
    return flat.as_strided(like.shape, like.stride())


attention.implementation(
    "triton",
    opaque=True,
    when=_triton_unable,
    pays=_triton_pays,
    configs=lambda q, k, v, *_: _flash.configs(q, k, v),
)(_flash.flash_attention)


def _trained_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    _, is_causal, _, softcap, sink, factor, first, last, bias = rest
    if not target.training:
        return "it is for gradients"
    if not target.opaque:
        return 'with tune="off" only what the compiler sees into is used'
    bounded = (first is not None or last is not None) and _many(q, k)
    # What SDPA is told instead of a sink is one more key, beside which causality and bounds are a mask.
    masks = (sink is not None and (bool(is_causal) or bounded)) or bias is not None
    if _beyond_sdpa(softcap, factor) is None and not bounded and not masks:  # type: ignore[arg-type]
        return "SDPA has a backward for it that stores no scores"
    return unable(target, q, k, v, mask, *rest)


@attention.implementation("triton_trained", when=_trained_objection)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    mask, *more, first, last, bias = rest
    mask = dense_mask(mask, first)  # type: ignore[arg-type]
    result: Tensor = attention_stats(q, k, v, mask, *more, first, last, bias)[0]
    return result


def _sdpa_objection(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> str | None:
    scale, _, empty_rows, softcap, sink, factor, first, last, bias = rest
    beyond = _beyond_sdpa(softcap, factor)  # type: ignore[arg-type]
    if beyond is not None:
        return beyond
    if sink is not None and not target.training and not known_true(q.shape[2] >= SINK_ROWS):
        # CPU, one row over 2048 keys: 18 ms against 1 ms.
        return f"a sink as one more key copies K and V, too much for fewer than {SINK_ROWS} rows"
    if not known_true(scale > 0):  # type: ignore[operator]
        return "SDPA's flash kernels take the maximum before scaling, which needs a positive scale"
    if target.training and bias is not None:
        return "SDPA differentiates a bias as a mask of as many elements as there are scores"
    if target.training and _adds(mask) and empty_rows != "zero" and sink is None:
        return "flash kernels give rows that are masked by a finite number other gradients"
    if target.training and _fills(mask, empty_rows, sink, first, last):
        return "flash kernels give rows that a fill leaves empty other gradients"
    return None


def _adds(mask: Tensor | None) -> bool:
    return mask is not None and mask.is_floating_point()


def _fills(mask: Tensor | None, empty_rows: object, sink: object, first: object, last: object) -> bool:
    """Whether rows may be filled with -inf throughout."""
    fills = first is not None or last is not None or (mask is not None and not _adds(mask))
    return fills and empty_rows == "nan" and sink is None


def _filled_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    _, _, empty_rows, _, sink, _, first, last, bias = rest
    if not (target.training and _fills(mask, empty_rows, sink, first, last)) or _adds(mask) or bias is not None:
        return "it is for gradients of rows that a boolean mask may leave empty"
    return _sdpa_objection(replace(target, training=False), q, k, v, mask, *rest)


@attention.implementation("sdpa_filled", when=_filled_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, *rest: Any) -> Tensor:
    empty_rows, _, _, _, first, last, _ = rest
    if q.device.type != "cpu":
        k, v = repeat_heads(q, k), repeat_heads(q, v)  # see sdpa_repeated
    mask = with_bounds(dense_mask(mask, first), first, last, k.shape[2], empty_rows)
    assert mask is not None
    return _attention_sdpa.attend_filled(q, k, v, mask, scale, is_causal)


def _added_objection(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> str | None:
    _, is_causal, empty_rows, _, sink, _, first, last, bias = rest
    beside = bool(is_causal) or any(x is not None for x in (sink, first, last, bias))
    if not target.training or mask is None or not _adds(mask) or empty_rows == "zero" or beside:
        return "it is for gradients of scores that nothing but a mask is added to"
    if mask.dim() > 1 and not known_equal(mask.shape[-2], 1):
        return "the mask tells rows apart"
    return _sdpa_objection(replace(target, training=False), q, k, v, mask, *rest)


@attention.implementation("sdpa_added", when=_added_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *rest: object) -> Tensor:
    assert mask is not None
    if q.device.type != "cpu":
        k, v = repeat_heads(q, k), repeat_heads(q, v)  # see sdpa_repeated
    return _attention_sdpa.attend_added(q, k, v, mask, scale)


def _as_given_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    _, is_causal, empty_rows, softcap, sink, factor, first, last, bias = rest
    if not (target.training and _adds(mask) and empty_rows == "zero") or is_causal or not first is last is bias is None:
        return "it is for gradients of SDPA calls with a float mask: those of the kernel that eager mode runs"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return "SDPA takes operands of one dtype"
    if softcap is not None or sink is not None or factor is not None:
        return "SDPA has no soft cap, sink or factor"
    return None


@attention.implementation("sdpa_as_given", when=_as_given_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, *rest: object) -> Tensor:
    if q.device.type != "cpu":
        k, v = repeat_heads(q, k), repeat_heads(q, v)
    gqa = not known_equal(q.shape[1], k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)


def _repeated_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    """Of a GPU's kernels that take a mask and save no scores, not all group heads; SDPA's last resort saves them."""
    masked = mask is not None or any(bound is not None for bound in rest[-3:-1])
    if not target.training or target.device.type == "cpu" or not masked or known_equal(q.shape[1], k.shape[1]):
        return "heads need repeating only for gradients under a mask, on a GPU"
    return _sdpa_objection(target, q, k, v, mask, *rest)


@attention.implementation("sdpa_repeated", when=_repeated_objection)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return attention.run("sdpa", q, repeat_heads(q, k), repeat_heads(q, v), *rest)


@attention.implementation("sdpa", when=_sdpa_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, *rest: Any) -> Tensor:
    empty_rows, _, sink, _, first, last, bias = rest
    return _attention_sdpa.attend(q, k, v, mask, scale, is_causal, empty_rows, sink, first, last, bias)


@attention.implementation("decomposed")
def _(
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
) -> Tensor:
    """Spelled out as models do it: scores in their operands' dtype. ATen's softmax computes in at least float32.

    Its result is rounded once, as a cast of a float32 softmax would be; that float32 is then not kept for the backward.
    """
    batch, heads, rows, kv_heads = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, values = (t.to(common) for t in (q, k, v))
    scores = (group_rows(q, kv_heads) @ k.transpose(-1, -2)).reshape(batch, heads, rows, k.shape[2]) * scale
    if factor is not None:
        scores = scores * factor
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + spread(bias, rows, k.shape[2])
    mask = dense_mask(mask, first)
    if mask is not None:
        filling = torch.finfo(scores.dtype).min if empty_rows == "uniform" else -torch.inf
        scores = torch.where(mask, scores, filling) if mask.dtype == torch.bool else scores + mask
    live = within_bounds(first, last, k.shape[2])
    if live is not None:
        filling = torch.finfo(scores.dtype).min if empty_rows == "uniform" else -torch.inf
        scores = torch.where(live, scores, filling)
    if is_causal:
        scores = torch.where(causal(rows, k.shape[2], q.device), scores, -torch.inf)
    weights = _softmax(scores, sink)
    if empty_rows == "zero":
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    result = group_rows(weights.to(common), kv_heads) @ values
    return result.reshape(batch, heads, rows, v.shape[3]).to(v.dtype)
