"""Attention: softmax(scale · q kᵀ + mask) v, with grouped-query heads whose keys and values are never repeated.

Bytes: q and the result once, k and v once per KV head (plus the mask once per head that it tells apart); the M x N
scores stay on the chip. FLOPs: 2·B·Hq·M·N·(D + Dv), about half of that where causal. With M query rows a KV head does
2·(Hq/Hkv)·M FLOPs for every element it reads, so decoding (M of 1 to 16) is bound by bandwidth, prefill by the tensor
cores.

Rows with no live key (every score -inf) come in two kinds: a spelled-out softmax gives NaN there,
F.scaled_dot_product_attention gives 0. `empty_rows` says which. A row that is masked with a finite number, as
torch.finfo(dtype).min, has live keys: plain arithmetic makes its weights uniform.

Gradients tell apart how such a row was masked: a number that was added passes them on to q and k, one that was filled
in does not. A fill is the third kind of empty row, "uniform". For an added number the flash kernels won't do: their
backward takes weights as exp(score - logsumexp), and the logarithm of N is lost beside finfo.min, so every weight is 1
instead of 1 / N. Such a mask is differentiated spelled out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.symbols import known_equal, known_true
from fxopt.kernels import _flash, _triton
from fxopt.ops import Target, fused_op


@fused_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal=False,"
    ' str empty_rows="nan") -> Tensor',
    sources=[_triton.__file__, _flash.__file__],
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
) -> Tensor:
    """Attention of `q` [B, Hq, M, D] over `k` [B, Hkv, N, D] and `v` [B, Hkv, N, Dv]; Hq is a multiple of Hkv.

    `mask` broadcasts to [B, Hq, M, N]: bool (True attends) or a float that is added to the scaled scores. `is_causal`
    further restricts row i to the keys j <= i. Returns [B, Hq, M, Dv] in v's dtype, computed in at least float32.
    `empty_rows` is the result of rows in which every score is -inf: "nan" or "zero". With "uniform" a boolean mask
    fills in a huge finite number in place of -inf, so rows that it masks throughout are averages.
    """
    dtypes = (q.dtype, k.dtype, v.dtype, None if mask is None else mask.dtype)
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    heads, rows = q.shape[1], q.shape[2]
    kv_heads, keys = k.shape[1], k.shape[2]
    grouped = _group_rows(q.to(compute), kv_heads)
    scores = (grouped @ k.to(compute).transpose(-1, -2)).reshape(q.shape[0], heads, rows, keys) * scale
    if mask is not None:
        filling = ABSORBING if empty_rows == "uniform" else -torch.inf
        scores = torch.where(mask, scores, filling) if mask.dtype == torch.bool else scores + mask.to(compute)
    if is_causal:
        scores = torch.where(_causal(rows, keys, q.device), scores, -torch.inf)
    weights = torch.softmax(scores, -1)
    if empty_rows == "zero":
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    result = _group_rows(weights, kv_heads) @ v.to(compute)
    return result.reshape(q.shape[0], heads, rows, v.shape[3]).to(v.dtype)


@attention.fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
    empty_rows: str = "nan",
) -> Tensor:
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _group_rows(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, M, D] -> [B, Hkv, Hq / Hkv · M, D]: the rows that share a KV head, below each other."""
    group = x.shape[1] // kv_heads
    return x.reshape(x.shape[0], kv_heads, group * x.shape[2], x.shape[3])


def _causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """[M, N], True where key j <= row i (aligned at the top left, as in F.scaled_dot_product_attention)."""
    return torch.arange(rows, device=device)[:, None] >= torch.arange(keys, device=device)[None, :]


# Float32 adds no score of float16 operands to a number of this size.
ABSORBING = -1e25

# From so many keys on, decoding is worth a kernel of its own.
DECODE_KEYS = 1024
MAX_WIDTH = 256


def _triton_objection(target: Target, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> str | None:
    """The one place that says where the Triton kernels are preferred to SDPA: for few rows over many keys."""
    if "uniform" in rest:
        return "the Triton kernel leaves empty rows NaN or 0"
    if not target.compiled:
        return "op by op, SDPA's launch costs the host less"
    if not target.cuda_graphs:
        # H200, 8-layer 8B shape, one row over 2048 keys: a step of 4.6 ms against Inductor's 3.1 ms.
        return "outside a CUDA graph it was measured to be slower"
    if not known_true(q.shape[2] <= _flash.MAX_DECODE_ROWS):
        return f"SDPA is faster for more than {_flash.MAX_DECODE_ROWS} query rows"
    if not known_true(k.shape[2] >= DECODE_KEYS):
        return f"SDPA is as fast for fewer than {DECODE_KEYS} keys"
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in (q, k, v)):
        return "the Triton kernel computes in float32"
    if not known_true(q.shape[3] <= MAX_WIDTH) or not known_true(v.shape[3] <= MAX_WIDTH):
        return f"the Triton kernel serves heads up to {MAX_WIDTH} wide"
    return _triton.needs_gpu(target)


@attention.implementation("triton", opaque=True, when=_triton_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, empty_rows: str) -> Tensor:
    return _flash.flash_attention(q, k, v, mask, scale, is_causal, empty_rows == "zero")


def _sdpa_objection(target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> str | None:
    scale, _, empty_rows = rest
    if not known_true(scale > 0):  # type: ignore[operator]
        return "SDPA's flash kernels take the maximum before scaling, which needs a positive scale"
    if target.training and _adds(mask) and empty_rows != "zero":
        return "flash kernels give rows that are masked by a finite number other gradients"
    return None


def _adds(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def _as_given_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    _, is_causal, empty_rows = rest
    if not (target.training and _adds(mask) and empty_rows == "zero") or is_causal:
        return "it is for gradients of SDPA calls with a float mask: those of the kernel that eager mode runs"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return "SDPA takes operands of one dtype"
    return None


@attention.implementation("sdpa_as_given", when=_as_given_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, empty_rows: str) -> Tensor:
    if q.device.type != "cpu":
        k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    gqa = not known_equal(q.shape[1], k.shape[1])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)


def _repeat_heads(q: Tensor, x: Tensor) -> Tensor:
    return x if known_equal(q.shape[1], x.shape[1]) else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _repeated_objection(
    target: Target, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object
) -> str | None:
    """Of a GPU's kernels that take a mask and save no scores, not all group heads; SDPA's last resort saves them."""
    if not target.training or target.device.type == "cpu" or mask is None or known_equal(q.shape[1], k.shape[1]):
        return "heads need repeating only for gradients under a mask, on a GPU"
    return _sdpa_objection(target, q, k, v, mask, *rest)


@attention.implementation("sdpa_repeated", when=_repeated_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, empty_rows: str) -> Tensor:
    return attention.run("sdpa", q, _repeat_heads(q, k), _repeat_heads(q, v), mask, scale, is_causal, empty_rows)


@attention.implementation("sdpa", when=_sdpa_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, empty_rows: str) -> Tensor:
    rows, keys, width, value_width, dtype = q.shape[2], k.shape[2], q.shape[3], v.shape[3], v.dtype
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t if t.dtype == common else t.to(common) for t in (q, k, v))
    if mask is not None:
        if empty_rows == "uniform" and mask.dtype == torch.bool:
            q, mask = _settle_filled_rows(q, mask, _causal(rows, keys, q.device) if is_causal else None)
            is_causal, empty_rows = False, "zero"  # there are none left
        if q.dtype == torch.float16 and mask.dtype in (torch.float32, torch.bfloat16):
            q, mask = _settle_dead_rows(q, mask)
        mask = _sdpa_mask(mask, _causal(rows, keys, q.device) if is_causal else None, q, empty_rows)
        is_causal = False
    gqa = not known_equal(q.shape[1], k.shape[1])
    on_cpu, one_row = q.device.type == "cpu", known_equal(rows, 1)
    if on_cpu and not one_row and not known_equal(width, value_width):
        # Only heads of one width take the CPU's flash kernel; the zeros cost less than its absence (4 times at 2048).
        if known_true(value_width < width):
            v = F.pad(v, (0, width - value_width))
        elif known_true(width < value_width):
            q, k = F.pad(q, (0, value_width - width)), F.pad(k, (0, value_width - width))
    if on_cpu and one_row and gqa and not is_causal and known_true(q.shape[0] * k.shape[1] >= torch.get_num_threads()):
        # A KV head's query rows together read it once: 1.2 to 1.7 times as fast as SDPA's own grouping.
        out = F.scaled_dot_product_attention(
            _group_rows(q, k.shape[1]), k, v, _group_mask(mask, q.shape[1], k.shape[1]), scale=scale
        ).reshape(*q.shape[:3], v.shape[3])
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if not known_equal(out.shape[3], value_width):
        out = out[..., :value_width]
    return out if out.dtype == dtype else out.to(dtype)


def _settle_filled_rows(q: Tensor, mask: Tensor, causal: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that `mask` fills throughout as rows of equal scores; their gradients reach v only, as through a fill."""
    kept = mask if causal is None else mask & causal
    empty = ~kept.any(-1, keepdim=True)
    filled = empty if causal is None else empty & causal
    return torch.where(empty, 0.0, q), kept | filled


def _settle_dead_rows(q: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A row masked throughout by one huge number is uniform: float16 has no number that says so, equal scores do."""
    highest = mask.amax(-1, keepdim=True)
    dead = (highest <= ABSORBING) & (highest > -torch.inf) & (mask == highest).all(-1, keepdim=True)
    return torch.where(dead, 0.0, q), torch.where(dead, 0.0, mask)


def _decomposed_objection(target: Target, *args: object) -> str | None:
    return None if target.training else "SDPA never stores the scores"


@attention.implementation("decomposed", when=_decomposed_objection)
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, empty_rows: str) -> Tensor:
    """Spelled out as models do it: scores in their operands' dtype. ATen's softmax computes in at least float32.

    Its result is rounded once, as a cast of a float32 softmax would be; that float32 is then not kept for the backward.
    """
    batch, heads, rows, kv_heads = q.shape[0], q.shape[1], q.shape[2], k.shape[1]
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, values = (t.to(common) for t in (q, k, v))
    scores = (_group_rows(q, kv_heads) @ k.transpose(-1, -2)).reshape(batch, heads, rows, k.shape[2]) * scale
    if mask is not None:
        filling = torch.finfo(scores.dtype).min if empty_rows == "uniform" else -torch.inf
        scores = torch.where(mask, scores, filling) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = torch.where(_causal(rows, k.shape[2], q.device), scores, -torch.inf)
    weights = torch.softmax(scores, -1)
    if empty_rows == "zero":
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
    result = _group_rows(weights.to(common), kv_heads) @ values
    return result.reshape(batch, heads, rows, v.shape[3]).to(v.dtype)


def _sdpa_mask(mask: Tensor, causal: Tensor | None, q: Tensor, empty_rows: str) -> Tensor:
    """`mask` and `causal` as one 4-D mask that SDPA accepts and that gives empty rows the result they should have.

    Depends on the mask alone, so layers that share it share this. SDPA gives an empty row 0, and a row of NaN NaN.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dtype == torch.bool:
        if causal is not None:
            mask = mask & causal
        if empty_rows == "zero":
            return mask
        mask = torch.where(mask, 0.0, -torch.inf).to(q.dtype)
    else:
        if q.device.type != "cpu":
            # finfo.min must stay finite in the narrower dtype and where a kernel scales it by log2(e): rows of it are
            # uniform, not empty. Half of it still absorbs every score.
            floor = torch.finfo(q.dtype).min / 2
            mask = torch.where(mask == -torch.inf, mask, mask.clamp(min=floor)).to(q.dtype)
        elif mask.dtype not in (q.dtype, torch.float32):
            # On the CPU a float32 mask serves any q, and only float64's minima have to be kept finite.
            mask = _flash.float32_mask(mask)
        if causal is not None:
            mask = torch.where(causal, mask, -torch.inf)
    if empty_rows == "nan":
        mask = torch.where((mask == -torch.inf).all(-1, keepdim=True), torch.nan, mask)
    return mask


def _group_mask(mask: Tensor | None, heads: int, kv_heads: int) -> Tensor | None:
    """A mask [B or 1, Hq or 1, 1, N or 1] for one query row a head as one for `_group_rows` of the queries."""
    if mask is None or known_equal(mask.shape[1], 1):
        return mask
    return mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, mask.shape[3])
