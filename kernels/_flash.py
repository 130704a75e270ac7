"""Attention kernels with an online softmax: one for many query rows, one that splits the keys for few.

For a row of scores s and a running maximum m (Milakov and Gimelshein, arXiv:1805.02867; tiled as in FlashAttention-2,
Dao, arXiv:2307.08691):

    m' = max(m, s);  l' = l·exp(m - m') + Σ exp(s - m');  acc' = acc·exp(m - m') + exp(s - m') v;  result acc / l

m stays in natural units, and differences are what is multiplied by log2(e): finfo.min · log2(e) is -inf, which would
make NaN of the rows that a model masks with finfo.min. A maximum of -inf counts as 0 in differences, so a row
without live keys ends with l = 0, and only there is decided whether it is NaN or 0. A sink is a score that is there
from the start: m = sink, l = 1, acc = 0.

Query heads that share a KV head find it by index arithmetic; nothing is repeated in memory. Head widths that are no
powers of two are padded in registers, with zeros that add nothing to the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, tl

# Few query rows (decoding, speculative verification) go to the kernel that splits the keys.
MAX_DECODE_ROWS = 16
MAX_GROUP_ROWS = 128  # query rows of all heads that share a KV head: one tile
MAX_SPLITS = 64

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2


@jit
def _tanh(x, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """tanh(x): for CAP = 1 to a few ulps of float32, for CAP = 2 by the hardware's own, to 11 bits (bfloat16 has 8)."""
    if CAP == 2:
        result = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        square = x * x
        series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.8853900817779268) + 1.0)  # cancels near 0, where the series converges
        result = tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))
    return result


@jit
def _step(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, row, column, start, keys, scale, cap, k_key, v_key, live, top, weight, acc,
    MASK: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr, IS_CAUSAL: tl.constexpr, EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into (m, l, acc). `mask` and `factor` are the tile's part of them, loaded (or anything).

    Without EDGE all keys of the tile are there, and none is later than any row.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    at = tl.cast(start, tl.int64)
    k_at = k + at * k_key + (column * k_key)[None, :] + depth[:, None]
    v_at = v + at * v_key + (column * v_key)[:, None] + width[None, :]
    if EDGE:
        in_keys = column < keys - start
        k_tile = tl.load(k_at, mask=in_keys[None, :] & (depth < D)[:, None], other=0.0)
        v_tile = tl.load(v_at, mask=in_keys[:, None] & (width < DV)[None, :], other=0.0)
    else:
        k_tile = tl.load(k_at) if D == BLOCK_D else tl.load(k_at, mask=(depth < D)[:, None], other=0.0)
        v_tile = tl.load(v_at) if DV == BLOCK_DV else tl.load(v_at, mask=(width < DV)[None, :], other=0.0)
    s = tl.dot(q, k_tile, input_precision="ieee") * scale
    if FACTOR:
        s *= factor.to(tl.float32)
    if CAP != 0:
        s = _tanh(s / cap, CAP) * cap
    if MASK == 1:
        live = live & (mask != 0)
    if MASK == 2:
        s += mask.to(tl.float32)
    if IS_CAUSAL and EDGE:
        live = live & (row[:, None] >= (start + column)[None, :])
    if EDGE or MASK == 1:
        s = tl.where(live, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - origin[:, None]) * LOG2E)
    shrink = tl.exp2((top - origin) * LOG2E)
    acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    return new_top, weight * shrink + tl.sum(p, 1), acc


@jit
def _start(sink, offsets, has_sink, SINK: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(m, l) before the first key: nothing yet, or the sink, a score without a value."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    if SINK:
        top = tl.load(sink + offsets, mask=has_sink, other=float("-inf")).to(tl.float32)
        weight = tl.where(top == float("-inf"), 0.0, 1.0)
    return top, weight


@jit
def _divide(acc, weight, ZERO_EMPTY: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc / l; where there was no live key (l = 0) NaN, or 0 if ZERO_EMPTY."""
    result = acc / weight
    if ZERO_EMPTY:
        result = tl.where(weight == 0.0, 0.0, result)
    return result


@jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, sink, out,
    heads, group, rows, keys, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, s_batch, s_head, s_row,
    MASK: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, ZERO_EMPTY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M query rows of one head a program. Causal tiles stop at the diagonal; the longest are started first.

    Whole tiles below the diagonal are taken first, without a look at positions, then those at an edge.
    """
    tile = tl.program_id(1)
    if IS_CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    in_rows = (row < rows)[:, None]
    q_tile = tl.load(
        q + batch * q_batch + head * q_head + (wide_row * q_row)[:, None] + depth[None, :],
        mask=in_rows & (depth < D)[None, :], other=0.0,
    )  # fmt: skip
    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    mask_tile = mask + batch * m_batch + head * m_head + (wide_row * m_row)[:, None] + (column * m_key)[None, :]
    factor_tile = factor + batch * f_batch + head * f_head + (wide_row * f_row)[:, None] + (column * f_key)[None, :]
    top, weight = _start(sink, batch * s_batch + head * s_head + wide_row * s_row, row < rows, SINK, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    end = keys
    if IS_CAUSAL:
        whole = tl.minimum(whole, tile * BLOCK_M // BLOCK_N * BLOCK_N)
        end = tl.minimum(keys, (tile + 1) * BLOCK_M)
    for start in range(0, whole, BLOCK_N):
        entries = in_rows
        factors = in_rows
        if MASK != 0:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=in_rows, other=0)
        if FACTOR:
            factors = tl.load(factor_tile + tl.cast(start, tl.int64) * f_key, mask=in_rows, other=0.0)
        top, weight, acc = _step(
            q_tile, k, v, entries, factors, row, column, start, keys, scale, cap, k_key, v_key, in_rows,
            top, weight, acc, MASK, FACTOR, CAP, IS_CAUSAL, False, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        live = (column < keys - start)[None, :] & in_rows
        entries = live
        factors = live
        if MASK != 0:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
        if FACTOR:
            factors = tl.load(factor_tile + tl.cast(start, tl.int64) * f_key, mask=live, other=0.0)
        top, weight, acc = _step(
            q_tile, k, v, entries, factors, row, column, start, keys, scale, cap, k_key, v_key, live,
            top, weight, acc, MASK, FACTOR, CAP, IS_CAUSAL, True, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    out += ((batch * heads + head) * rows + wide_row)[:, None] * DV + width[None, :]
    result = _divide(acc, weight[:, None], ZERO_EMPTY)
    tl.store(out, result.to(out.dtype.element_ty), mask=in_rows & (width < DV)[None, :])


@jit
def _split_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, sink, out, partial, tops, weights,
    kv_heads, group, rows, keys, tiles_each, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, s_batch, s_head, s_row,
    MASK: tl.constexpr, FACTOR: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, SKIP_MINIMA: tl.constexpr,
    IS_CAUSAL: tl.constexpr, ZERO_EMPTY: tl.constexpr, DIRECT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All query rows of one KV head over one split of the keys, so that K and V are read once whatever the group.

    A tile that the mask rules out for every row is skipped before K and V are loaded: a static cache costs what it
    holds, not what it could. -inf and False rule a key out. With SKIP_MINIMA so does finfo.min, in rows that have a
    live key anywhere, beside which its weight is exactly 0; a scan of the mask settles that first. It ends as soon as
    every row has one, so it is one tile long unless a row's first keys are padding.
    """
    MINIMUM: tl.constexpr = -1.7e38  # half of finfo.min, of bfloat16 and float32 alike; nothing else is that low
    split = tl.program_id(1)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index = tl.arange(0, BLOCK_R)
    row = index % rows
    head = kv_head * group + index // rows
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    in_rows = (index < group * rows)[:, None]
    q_tile = tl.load(
        q + batch * q_batch + (head * q_head + row.to(tl.int64) * q_row)[:, None] + depth[None, :],
        mask=in_rows & (depth < D)[None, :], other=0.0,
    )  # fmt: skip
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    wide_row = row.to(tl.int64)
    mask_tile = mask + batch * m_batch + (head * m_head + wide_row * m_row)[:, None] + (column * m_key)[None, :]
    factor_tile = factor + batch * f_batch + (head * f_head + wide_row * f_row)[:, None] + (column * f_key)[None, :]
    # Once, in the first split: the sink counts as one score.
    has_sink = (index < group * rows) & (split == 0)
    top, weight = _start(sink, batch * s_batch + head * s_head + wide_row * s_row, has_sink, SINK, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    has_live = (index >= group * rows).to(tl.int32)
    if SKIP_MINIMA:
        scanned = 0
        while (scanned < keys) & (tl.min(has_live, 0) == 0):
            inside = (column < keys - scanned)[None, :] & in_rows
            seen = tl.load(mask_tile + tl.cast(scanned, tl.int64) * m_key, mask=inside, other=float("-inf"))
            has_live = tl.maximum(has_live, tl.max((seen.to(tl.float32) > MINIMUM).to(tl.int32), 1))
            scanned += BLOCK_N
    first = split * tiles_each * BLOCK_N
    for start in range(first, tl.minimum(keys, first + tiles_each * BLOCK_N), BLOCK_N):
        live = (column < keys - start)[None, :] & in_rows
        entries = live
        counts = live
        if MASK != 0:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
            if MASK == 1:
                counts = live & (entries != 0)
            else:
                counts = live & (entries != float("-inf"))
                if SKIP_MINIMA:
                    counts = counts & ((has_live[:, None] == 0) | ~(entries.to(tl.float32) <= MINIMUM))
        if MASK == 0 or tl.max(tl.max(counts.to(tl.int32), 1), 0) != 0:
            factors = live
            if FACTOR:
                factors = tl.load(factor_tile + tl.cast(start, tl.int64) * f_key, mask=live, other=0.0)
            top, weight, acc = _step(
                q_tile, k, v, entries, factors, row, column, start, keys, scale, cap, k_key, v_key, live,
                top, weight, acc, MASK, FACTOR, CAP, IS_CAUSAL, True, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    at = ((batch * kv_heads * group + head) * rows + row)[:, None]
    if DIRECT:
        result = _divide(acc, weight[:, None], ZERO_EMPTY)
        tl.store(out + at * DV + width[None, :], result.to(out.dtype.element_ty), mask=in_rows & (width < DV)[None, :])
    else:
        at = at * tl.num_programs(1) + split
        tl.store(partial + at * DV + width[None, :], acc, mask=in_rows & (width < DV)[None, :])
        tl.store(tops + at, top[:, None], mask=in_rows)
        tl.store(weights + at, weight[:, None], mask=in_rows)


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial, tops, weights, out, splits,
    ZERO_EMPTY: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One query row of one head a program: its splits brought to one maximum and added."""
    LOG2E: tl.constexpr = 1.4426950408889634
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    width = tl.arange(0, BLOCK_DV)
    top = tl.load(tops + at * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.load(weights + at * splits + split, mask=split < splits, other=0.0)
    highest = tl.max(top, 0)
    share = tl.exp2((top - tl.where(highest == float("-inf"), 0.0, highest)) * LOG2E)
    acc = tl.load(
        partial + (at * splits + split)[:, None] * DV + width[None, :],
        mask=(split < splits)[:, None] & (width < DV)[None, :], other=0.0,
    )  # fmt: skip
    result = _divide(tl.sum(acc * share[:, None], 0), tl.sum(weight * share, 0), ZERO_EMPTY)
    tl.store(out + at * DV + width, result.to(out.dtype.element_ty), mask=width < DV)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    zero_empty: bool,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """The `attention` op by the kernels above: contiguous [B, Hq, M, Dv] in v's dtype.

    All operands may have any strides; where a last dimension of q, k or v is not dense, that tensor is copied.
    """
    batch, heads, rows, depth = q.shape
    kv_heads, keys, width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // max(kv_heads, 1)
    out = v.new_empty((batch, heads, rows, width))
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_dense(t.to(common)) for t in (q, k, v))
    kind, skip_minima = NO_MASK, False
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
        if mask.dtype == torch.float64:
            mask = float32_mask(mask)
        skip_minima = mask.dtype in (torch.float32, torch.bfloat16) and not is_causal
    mask, m_strides = _broadcast(mask, (batch, heads, rows, keys))
    mask = mask.view(torch.uint8) if mask is not None and kind == BOOL_MASK else mask
    factor, f_strides = _broadcast(_single(factor), (batch, heads, rows, keys))
    sink, s_strides = _broadcast(_single(sink), (batch, heads, rows, 1))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *m_strides, *f_strides, *s_strides[:3])
    shape = {
        "D": depth, "DV": width,
        "BLOCK_D": max(16, _triton.next_power_of_2(depth)), "BLOCK_DV": max(16, _triton.next_power_of_2(width)),
    }  # fmt: skip
    wide = max(shape["BLOCK_D"], shape["BLOCK_DV"]) * common.itemsize
    cap = 0 if softcap is None else 2 if common == torch.bfloat16 and q.is_cuda else 1
    flags = {"MASK": kind, "FACTOR": factor is not None, "CAP": cap, "SINK": sink is not None}
    flags |= {"IS_CAUSAL": is_causal, "ZERO_EMPTY": zero_empty}
    operands = (q, k, v, *(q if t is None else t for t in (mask, factor, sink)), out)
    numbers = (scale, 1.0 if softcap is None else softcap)
    if rows <= MAX_DECODE_ROWS and rows * group <= MAX_GROUP_ROWS:
        block_r = max(16, _triton.next_power_of_2(rows * group))
        block_n, warps, stages = _split_blocks(wide, common.itemsize, block_r)
        splits, tiles_each = _split(batch * kv_heads, _triton.ceil_div(keys, block_n), q.device)
        direct = splits == 1
        partial = q.new_empty((out.numel() // width, splits, width) if not direct else 0, dtype=torch.float32)
        tops, weights = partial.new_empty((2, 0 if direct else out.numel() // width * splits)).unbind()
        _split_kernel[(batch * kv_heads, splits)](
            *operands, partial, tops, weights, kv_heads, group, rows, keys, tiles_each, *numbers, *strides,
            **flags, SKIP_MINIMA=skip_minima, DIRECT=direct, **shape, BLOCK_R=block_r, BLOCK_N=block_n,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not direct:
            _combine_kernel[(out.numel() // width,)](
                partial, tops, weights, out, splits, ZERO_EMPTY=zero_empty, DV=width, BLOCK_DV=shape["BLOCK_DV"],
                BLOCK_S=_triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
        return out
    tensors = (mask is not None) + (factor is not None)
    block_m, block_n, warps, stages = _prefill_blocks(wide, common.itemsize, tensors)
    _prefill_kernel[(batch * heads, _triton.ceil_div(rows, block_m))](
        *operands, heads, group, rows, keys, *numbers, *strides,
        **flags, **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _broadcast(x: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, tuple[int, ...]]:
    """`x` expanded to `shape` (never copied), and its strides."""
    if x is None:
        return None, (0, 0, 0, 0)
    x = x.expand(shape)
    return x, x.stride()


def _single(x: Tensor | None) -> Tensor | None:
    return x.to(torch.float32) if x is not None and x.dtype == torch.float64 else x


def float32_mask(mask: Tensor) -> Tensor:
    """A float mask as float32, with float64's finite minima still finite: rows of them are uniform, not empty."""
    if mask.dtype == torch.float64:
        mask = torch.where(mask == -torch.inf, mask, mask.clamp(min=torch.finfo(torch.float32).min))
    return mask.to(torch.float32)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _prefill_blocks(row_bytes: int, itemsize: int, tensors: int) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) a tile: what compiles without spilling on sm_80, sm_90 and sm_100.

    `tensors` counts those that are read beside the scores, a mask and a factor.
    """
    if itemsize == 4 or row_bytes > 256:
        return 64, 32, 8, 2
    if tensors:
        return 64, 64 if tensors == 1 else 32, 4, 2
    return 128, 64, 4 if row_bytes <= 128 else 8, 3


def _split_blocks(row_bytes: int, itemsize: int, block_r: int) -> tuple[int, int, int]:
    """(keys, warps, stages) a tile of the splitting kernel, chosen likewise."""
    small = itemsize < 4 and row_bytes <= 256
    return 64 if small else 32, 4 if small and block_r <= 32 else 8, 3 if small else 2


def _split(programs: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """(splits, key tiles each): enough splits for two programs a multiprocessor, each with at least one tile."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    splits = max(1, min(tiles, MAX_SPLITS, _triton.ceil_div(2 * multiprocessors, programs)))
    each = _triton.ceil_div(tiles, splits)
    return _triton.ceil_div(tiles, each), each


def _signature(kernel: Any, dtype: str, mask: str | None, sizes: str) -> dict[str, str]:
    strides = [f"{t}_{axis}" for t, last in zip("qkvm", ("row", "key", "key", "row"), strict=True)
               for axis in ("batch", "head", last)]  # fmt: skip
    pointers = {**dict.fromkeys(("q", "k", "v", "out", "factor"), f"*{dtype}"), "mask": f"*{mask or dtype}"}
    partial = dict.fromkeys(("partial", "tops", "weights"), "*fp32") if kernel is _split_kernel else {}
    numbers = {"scale": "fp32", "cap": "fp32", **dict.fromkeys(sizes.split(), "i32")}
    numbers |= dict.fromkeys(strides, "i32:16") | dict.fromkeys(
        ("f_batch", "f_head", "f_row", "s_batch", "s_head", "s_row"), "i32"
    )
    return {**pointers, "sink": f"*{dtype}", **partial, **numbers}


def _widths(d: int) -> dict[str, int]:
    return {"D": d, "DV": d, "BLOCK_D": _triton.next_power_of_2(d), "BLOCK_DV": _triton.next_power_of_2(d)}


def _values(mask: str | None, **flags: Any) -> dict[str, Any]:
    plain = {"FACTOR": False, "CAP": 0, "SINK": False, "IS_CAUSAL": False, "ZERO_EMPTY": False}
    return {"MASK": MASK_KINDS[mask], **plain, "m_key": 1, "f_key": 1, **flags}


def _prefill_example(name: str, dtype: str, mask: str | None, d: int, **flags: Any) -> CompileExample:
    itemsize = 4 if dtype == "fp32" else 2
    widths = _widths(d)
    tensors = (mask is not None) + ("FACTOR" in flags)
    block_m, block_n, warps, stages = _prefill_blocks(widths["BLOCK_D"] * itemsize, itemsize, tensors)
    values = _values(mask, **flags) | {**widths, "BLOCK_M": block_m, "BLOCK_N": block_n}
    signature = _signature(_prefill_kernel, dtype, mask, "heads group rows keys")
    return CompileExample(name, _prefill_kernel, signature, values, warps, stages)


def _split_example(name: str, dtype: str, mask: str | None, d: int, rows: int = 16, **flags: Any) -> CompileExample:
    itemsize = 4 if dtype == "fp32" else 2
    widths = _widths(d)
    block_n, warps, stages = _split_blocks(widths["BLOCK_D"] * itemsize, itemsize, rows)
    values = _values(mask) | {"SKIP_MINIMA": mask == "bf16", "DIRECT": False, **widths}
    values |= {"BLOCK_R": rows, "BLOCK_N": block_n, **flags}
    signature = _signature(_split_kernel, dtype, mask, "kv_heads group rows keys tiles_each")
    return CompileExample(name, _split_kernel, signature, values, warps, stages)


MASK_KINDS = {None: NO_MASK, "u8": BOOL_MASK, "fp16": FLOAT_MASK, "bf16": FLOAT_MASK, "fp32": FLOAT_MASK}
COMPILE_EXAMPLES = (
    _prefill_example("prefill, causal, 128", "bf16", None, 128, IS_CAUSAL=True),
    _prefill_example("prefill, 64", "fp16", None, 64),
    _prefill_example("prefill with a mask, 80", "fp16", "fp16", 80),
    _prefill_example("prefill with a bool mask, 64, float32", "fp32", "u8", 64),
    _prefill_example("prefill, 256", "bf16", None, 256, IS_CAUSAL=True),
    _prefill_example("prefill with a soft cap and a mask, 256", "bf16", "bf16", 256, CAP=2),
    _prefill_example("prefill with a soft cap, causal, 128", "fp16", None, 128, CAP=1, IS_CAUSAL=True),
    _prefill_example("prefill with a sink and a mask, 64", "bf16", "bf16", 64, SINK=True),
    _prefill_example("prefill with a factor and a mask, 64", "fp16", "fp16", 64, FACTOR=True),
    _split_example("decode, 128", "bf16", None, 128),
    _split_example("decode in a static cache, 64", "bf16", "bf16", 64),
    _split_example("decode of 8 rows of 8 heads, bool mask", "fp16", "u8", 128, 64),
    _split_example("decode, 64, float32, one split", "fp32", "fp32", 64, DIRECT=True),
    _split_example("decode, 256", "bf16", "u8", 256),
    _split_example("decode with a soft cap in a static cache, 256", "bf16", "bf16", 256, CAP=2),
    _split_example("decode with a sink in a static cache, 64", "bf16", "bf16", 64, SINK=True),
    _split_example("decode with a factor, 64", "fp16", "fp16", 64, FACTOR=True),
    CompileExample(
        "combine", _combine_kernel,
        {"partial": "*fp32", "tops": "*fp32", "weights": "*fp32", "out": "*bf16", "splits": "i32"},
        {"ZERO_EMPTY": True, "DV": 128, "BLOCK_DV": 128, "BLOCK_S": 64},
    ),
)  # fmt: skip
