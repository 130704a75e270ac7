"""What F.scaled_dot_product_attention has to be given so that it computes what the `attention` op says.

Its rows without a live key are 0, finfo.min must survive a kernel's change of base, its CPU kernel wants heads of one
width, and it knows no sink. A sink is one more key, whose score is the sink itself:

    q' = [q, sink / scale]    k' = [k 0; 0 1]    v' = [v; 0]        scale · q' k'ᵀ = [scale · q kᵀ, sink]

so no mask has to be told apart by heads. In half precision the quotient takes two columns, its rounded value and what
that lacks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.symbols import known_equal, known_true
from fxopt.kernels._flash_parts import float32_mask

# Float32 adds no score of float16 operands to a number of this size.
ABSORBING = -1e25
# From here on the logarithm of a row's weights is kept with too few digits beside its maximum. Numbers of this size are
# so far apart in half precision that their differences are exact there, or mask.
LARGE = -1e3


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    empty_rows: str,
    sink: Tensor | None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The `attention` op (without soft cap and factor) by F.scaled_dot_product_attention."""
    mask = with_bias(dense_mask(mask, first), bias, q.shape[2], k.shape[2], empty_rows)
    mask = with_bounds(mask, first, last, k.shape[2], empty_rows)
    width, value_width, dtype = q.shape[3], v.shape[3], v.dtype
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (t if t.dtype == common else t.to(common) for t in (q, k, v))
    if sink is not None:
        q, k, v, mask = _with_sink(q, k, v, mask, scale, is_causal, sink)
        is_causal, empty_rows, width = False, "zero", q.shape[3]  # no row is empty now
    rows, keys = q.shape[2], k.shape[2]
    if mask is not None:
        if empty_rows == "uniform" and mask.dtype == torch.bool:
            q, mask = _settle_filled_rows(q, mask, causal(rows, keys, q.device) if is_causal else None)
            is_causal, empty_rows = False, "zero"  # there are none left
        if q.dtype == torch.float16 and mask.dtype in (torch.float32, torch.bfloat16):
            q, mask = _settle_dead_rows(q, mask)
        mask = _sdpa_mask(mask, causal(rows, keys, q.device) if is_causal else None, q, empty_rows)
        is_causal = False
    on_cpu, one_row = q.device.type == "cpu", known_equal(rows, 1)
    gqa = not known_equal(q.shape[1], k.shape[1])
    if on_cpu and not one_row and not known_equal(width, value_width):
        # Only heads of one width take the CPU's flash kernel; the zeros cost less than its absence (4 times at 2048).
        if known_true(value_width < width):
            v = F.pad(v, (0, width - value_width))
        elif known_true(width < value_width):
            q, k = F.pad(q, (0, value_width - width)), F.pad(k, (0, value_width - width))
    if on_cpu and one_row and gqa and not is_causal and known_true(q.shape[0] * k.shape[1] >= torch.get_num_threads()):
        # A KV head's query rows together read it once: 1.2 to 1.7 times as fast as SDPA's own grouping.
        out = F.scaled_dot_product_attention(
            group_rows(q, k.shape[1]), k, v, _group_mask(mask, q.shape[1], k.shape[1]), scale=scale
        ).reshape(*q.shape[:3], v.shape[3])
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    if not known_equal(out.shape[3], value_width):
        out = out[..., :value_width]
    return out if out.dtype == dtype else out.to(dtype)


def within_bounds(first: Tensor | None, last: Tensor | None, keys: int) -> Tensor | None:
    """[B or 1, Hq or 1, M or 1, N], True where first <= key <= last; None without bounds."""
    live: Tensor | None = None
    for bound, below in ((first, True), (last, False)):
        if bound is not None:
            key = torch.arange(keys, device=bound.device)
            part = key >= bound[..., None] if below else key <= bound[..., None]
            live = part if live is None else live & part
    return live


def dense_mask(mask: Tensor | None, first: Tensor | None) -> Tensor | None:
    """`mask`; numbers of segments, one a key and row, as the boolean mask that they and `first` stand for."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return mask
    assert first is not None
    return (mask[..., :, None] == mask[..., None, :]) | (first >= 0)[..., None]


def spread(bias: Tensor, rows: int, keys: int) -> Tensor:
    """A bias by key [.., .., 1, N], by distance [.., .., M + N - 1] or a slope [.., ..] as one for every score."""
    if bias.dim() == 4:
        return bias
    row, key = torch.arange(rows, device=bias.device), torch.arange(keys, device=bias.device)
    if bias.dim() == 2:
        return bias[..., None, None] * (key - row[:, None])
    return bias[..., key + (rows - 1 - row)[:, None]]


def with_bias(mask: Tensor | None, bias: Tensor | None, rows: int, keys: int, empty_rows: str) -> Tensor | None:
    """`mask` with a bias added to it."""
    if bias is None:
        return mask
    dense = spread(bias, rows, keys)
    if mask is None:
        return dense
    if mask.dtype == torch.bool:
        filling = ABSORBING if empty_rows == "uniform" else -torch.inf
        return torch.where(mask, dense.to(torch.promote_types(dense.dtype, torch.float32)), filling)
    return mask + dense.to(torch.promote_types(mask.dtype, torch.float32))


def with_bounds(
    mask: Tensor | None, first: Tensor | None, last: Tensor | None, keys: int, empty_rows: str
) -> Tensor | None:
    """`mask` with the bounds of each row in it."""
    live = within_bounds(first, last, keys)
    if live is None or mask is None:
        return live if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & live
    return torch.where(live, mask, ABSORBING if empty_rows == "uniform" else -torch.inf)


def attend_filled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Attention with a boolean mask that fills in -inf, and the gradients of that fill.

    The weights of an empty row are NaN. The fill stops its gradients to q and k, while v gets NaN from them.
    """
    mask = four_dims(mask)
    empty = ~(mask & causal(q.shape[2], k.shape[2], q.device) if is_causal else mask).any(-1, keepdim=True)
    spoilt = empty.any(-2, keepdim=True)
    if not known_equal(spoilt.shape[1], 1) and not known_equal(spoilt.shape[1], v.shape[1]):
        spoilt = spoilt.reshape(spoilt.shape[0], v.shape[1], -1, 1).any(-2, keepdim=True)
    # A branch never taken, whose gradient is 0 times NaN where a row is empty.
    v = torch.where(spoilt & ~spoilt, v * torch.where(spoilt, torch.nan, 0.0).to(v.dtype), v)
    return torch.where(empty, torch.nan, attend(q, k, v, mask, scale, is_causal, "uniform", None))


def attend_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention with a float mask by key, [B or 1, Hq or 1, 1, N], and the gradients of a sum.

    All rows of a sequence have its largest number in common, so it is taken off where it is large: what flash kernels
    keep of a row then has the digits that their backward needs. Where it absorbs every score, the weights are those of
    the mask alone, p; but adding passes gradients on, d s_ij = p_j d o_i · (v_j - o), and they are those of

        o_i + scale · q_i C - scale · q_i C,   C = Σ_j k_j p_j (v_j - o)ᵀ [D, Dv]

    with p, v, o and the last term taken for constants.
    """
    mask = four_dims(mask)
    top = mask.detach().amax(-1, keepdim=True)
    finite = top > -torch.inf
    mask = torch.where((top < LARGE) & finite, mask - top, mask)
    absorbed = (top <= ABSORBING) & finite
    out = attend(q, k, v, torch.where(absorbed, 0.0, mask), scale, False, "nan", None)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = repeat_heads(q, k), repeat_heads(q, v)
    share = torch.softmax(mask.to(wide), -1).mT
    mean = (share * v).sum(-2, keepdim=True)
    apart = (share * (v - mean)).detach().to(k.dtype)
    along = q @ ((k.mT @ apart).to(q.dtype) * scale)
    return torch.where(absorbed, mean.to(out.dtype) + (along - along.detach()).to(out.dtype), out)


def group_rows(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, M, D] -> [B, Hkv, Hq / Hkv · M, D]: the rows that share a KV head, below each other."""
    group = x.shape[1] // kv_heads
    return x.reshape(x.shape[0], kv_heads, group * x.shape[2], x.shape[3])


def repeat_heads(q: Tensor, x: Tensor) -> Tensor:
    """`x` with each head repeated in place until there are as many as in `q`."""
    return x if known_equal(q.shape[1], x.shape[1]) else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """[M, N], True where key j <= row i (aligned at the top left, as in F.scaled_dot_product_attention)."""
    return torch.arange(rows, device=device)[:, None] >= torch.arange(keys, device=device)[None, :]


def four_dims(x: Tensor) -> Tensor:
    """`x` with leading dimensions of size 1 up to four."""
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and the mask with the sink as one more key; `is_causal` goes into the mask."""
    rows, keys = q.shape[2], k.shape[2]
    wide, limits = torch.float64 if torch.float64 in (q.dtype, sink.dtype) else torch.float32, torch.finfo(q.dtype)
    score = (four_dims(sink).to(wide) / scale).clamp(limits.min, limits.max)  # -inf · 0 would reach the other keys
    columns = [score.to(q.dtype)]
    if q.dtype.itemsize < 4:
        columns.append((score - columns[0].to(wide)).to(q.dtype))
    spare = 0 if q.device.type == "cpu" else 8 - len(columns)  # GPU kernels want widths in steps of 8
    q = torch.cat([F.pad(q, (0, spare)), *(c.expand(*q.shape[:3], 1) for c in columns)], -1)
    extra = F.pad(k.new_zeros((*k.shape[:2], 1, k.shape[3] + spare)), (0, len(columns)), value=1.0)
    k = torch.cat([F.pad(k, (0, spare + len(columns))), extra], 2)
    v = F.pad(v, (0, 0, 0, 1))
    if mask is not None:
        mask = four_dims(mask)
        mask = mask.expand(*mask.shape[:3], keys)
        mask = torch.cat([mask, mask.new_full((*mask.shape[:3], 1), mask.dtype == torch.bool)], -1)
    if is_causal:
        seen = F.pad(causal(rows, keys, q.device), (0, 1), value=True)
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else mask.where(seen, -torch.inf)
    return q, k, v, mask


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


def _sdpa_mask(mask: Tensor, causal: Tensor | None, q: Tensor, empty_rows: str) -> Tensor:
    """`mask` and `causal` as one 4-D mask that SDPA accepts and that gives empty rows the result they should have.

    Depends on the mask alone, so layers that share it share this. SDPA gives an empty row 0, and a row of NaN NaN.
    """
    mask = four_dims(mask)
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
            mask = float32_mask(mask)
        if causal is not None:
            mask = torch.where(causal, mask, -torch.inf)
    if empty_rows == "nan":
        mask = torch.where((mask == -torch.inf).all(-1, keepdim=True), torch.nan, mask)
    return mask


def _group_mask(mask: Tensor | None, heads: int, kv_heads: int) -> Tensor | None:
    """A mask [B or 1, Hq or 1, 1, N or 1] for one query row a head as one for `group_rows` of the queries."""
    if mask is None or known_equal(mask.shape[1], 1):
        return mask
    return mask.reshape(mask.shape[0], kv_heads, heads // kv_heads, mask.shape[3])
