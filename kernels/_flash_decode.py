"""Attention of few query rows (decoding, speculative verification): the keys are split over programs.

All query rows of one KV head go into one tile, so that K and V are read once whatever the group. Each program takes
every S-th tile of keys (S splits) within the rows' bounds, and one more kernel brings the splits together. A tile that
the mask rules out for every row is skipped before K and V are loaded: a static cache costs what it holds, not what it
could, and as tiles are dealt out in turn, what it holds is spread over all programs, wherever it lies. Where one row of
the mask is that of all query rows, several tiles are judged by one load: tile by tile, each look would wait for memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._flash_parts import (
    BY_DISTANCE,
    SLOPE,
    UNIFORM,
    ZERO,
    Operands,
    _bound,
    _divide,
    _start,
    _step,
    _times_distance,
    _visible,
    example_signature,
    example_values,
    example_widths,
)
from fxopt.kernels._triton import CompileExample, jit, tl
from fxopt.ops import Config

# Few query rows go to the kernel that splits the keys.
MAX_DECODE_ROWS = 16
MAX_GROUP_ROWS = 128  # query rows of all heads that share a KV head: one tile
MAX_SPLITS = 64


@jit
def _live_tiles(  # type: ignore[no-untyped-def]
    mask, m_key, start, step, keys, any_flat,
    MASK: tl.constexpr, SKIP_MINIMA: tl.constexpr, FLAT: tl.constexpr, MINIMUM: tl.constexpr, BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Which of AT_ONCE tiles, from `start` on at distances of `step`, have a key that one row of a mask leaves live: a
    bit each."""
    tile = tl.arange(0, AT_ONCE)
    key = start + (tile * step)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    there = key < keys
    entries = tl.load(mask + key.to(tl.int64) * m_key, mask=there, other=0)
    if MASK == 1:
        live = there & (entries != 0)
    else:
        live = there & (entries != float("-inf"))
        if SKIP_MINIMA:
            live = live & (any_flat | ~(entries.to(tl.float32) <= MINIMUM))
    if FLAT:
        live = live | (there & any_flat)
    return tl.sum(tl.max(live.to(tl.int32), 1) << tile, 0)


@jit
def _split_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, bias, sink, first, last, out, partial, tops, weights,
    kv_heads, group, rows, keys, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, b_batch, b_head, s_batch, s_head, s_row,
    first_batch, first_head, first_row, last_batch, last_head, last_row,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    SKIP_MINIMA: tl.constexpr, IS_CAUSAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EMPTY: tl.constexpr,
    DIRECT: tl.constexpr, ONE_ROW: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The query rows of one KV head over one split of the keys.

    -inf and False rule a key out. With SKIP_MINIMA so does finfo.min, in rows that have a live key anywhere, beside
    which its weight is exactly 0; a scan settles that first, and which rows are averages where empty ones are. It ends
    as soon as every row has a live key, so it is one tile long unless a row's first keys are padding. With ONE_ROW all
    rows have the same row of the mask.
    """
    MINIMUM: tl.constexpr = -1.7e38  # half of finfo.min, of bfloat16 and float32 alike; nothing else is that low
    AT_ONCE: tl.constexpr = 16  # tiles
    FLAT: tl.constexpr = (EMPTY == 2) and (MASK != 0 or FIRST or LAST)
    split = tl.program_id(1)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    index = tl.arange(0, BLOCK_R)
    row = index % rows
    head = kv_head * group + index // rows
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    there = index < group * rows
    in_rows = there[:, None]
    q_tile = tl.load(
        q + batch * q_batch + (head * q_head + row.to(tl.int64) * q_row)[:, None] + depth[None, :],
        mask=in_rows & (depth < D)[None, :], other=0.0,
    )  # fmt: skip
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    wide_row = row.to(tl.int64)
    mask_tile = mask + batch * m_batch + (head * m_head + wide_row * m_row)[:, None] + (column * m_key)[None, :]
    factor_tile = factor + batch * f_batch + (head * f_head + wide_row * f_row)[:, None] + (column * f_key)[None, :]
    slopes = tl.zeros([BLOCK_R], tl.float32)
    if BIAS == 3:
        slopes = tl.load(bias + batch * b_batch + head * b_head, mask=there, other=0.0).to(tl.float32)
    bias_tile = bias + batch * b_batch + (head * b_head - (wide_row if BIAS == 1 else 0))[:, None] + column[None, :]
    # Once, in the first split: the sink counts as one score.
    has_sink = there & (split == 0)
    top, weight = _start(sink, batch * s_batch + head * s_head + wide_row * s_row, has_sink, SINK, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    # Rows beyond the last one have bounds that widen nothing.
    real = tl.where(there, index, 0)
    real_head = kv_head * group + real // rows
    from_key = _bound(first + batch * first_batch + real_head * first_head, real % rows, rows, first_row, 0, FIRST)
    to_key = _bound(last + batch * last_batch + real_head * last_head, real % rows, rows, last_row, keys - 1, LAST)
    begin = 0
    end = keys
    if FIRST:
        begin = tl.maximum(tl.min(from_key, 0), 0) // BLOCK_N * BLOCK_N
    if LAST:
        end = tl.minimum(end, tl.max(to_key, 0) + 1)
    if IS_CAUSAL:
        end = tl.minimum(end, rows)
    has_live = 1 - there.to(tl.int32)
    if SKIP_MINIMA or FLAT:
        scanned = begin
        while (scanned < end) & (tl.min(has_live, 0) == 0):
            inside = (column < keys - scanned)[None, :] & in_rows
            seen = inside
            if MASK != 0:
                seen = tl.load(mask_tile + tl.cast(scanned, tl.int64) * m_key, mask=inside, other=0)
                seen = (seen != 0) if MASK == 1 else (seen.to(tl.float32) > MINIMUM)
            inside = _visible(inside & seen, row, scanned + column, from_key, to_key, IS_CAUSAL, FIRST, LAST)
            has_live = tl.maximum(has_live, tl.max(inside.to(tl.int32), 1))
            scanned += BLOCK_N
    flat = has_live == 0
    if FLAT:
        averaged = tl.min(has_live, 0) == 0  # a mean of all values
        begin = tl.where(averaged, 0, begin)
        end = tl.where(averaged, keys, end)
    step = tl.num_programs(1) * BLOCK_N
    only_row = mask + batch * m_batch + kv_head * group * m_head
    visited = 0
    bits = 0
    for start in range(begin + split * BLOCK_N, end, step):
        live = (column < keys - start)[None, :] & in_rows
        entries = live
        counts = 1
        if MASK != 0 and not ONE_ROW:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
        if ONE_ROW:
            if visited % AT_ONCE == 0:
                any_flat = tl.max(flat.to(tl.int32), 0) != 0
                bits = _live_tiles(
                    only_row, m_key, start, step, keys, any_flat, MASK, SKIP_MINIMA, FLAT, MINIMUM, BLOCK_N, AT_ONCE
                )  # fmt: skip
            counts = (bits >> (visited % AT_ONCE)) & 1
            visited += 1
        elif MASK != 0:
            if MASK == 1:
                attended = live & (entries != 0)
            else:
                attended = live & (entries != float("-inf"))
                if SKIP_MINIMA:
                    attended = attended & (flat[:, None] | ~(entries.to(tl.float32) <= MINIMUM))
            if FLAT:
                attended = attended | (live & flat[:, None])
            counts = tl.max(tl.max(attended.to(tl.int32), 1), 0)
        if MASK == 0 or counts != 0:
            factors = live
            biases = live
            seen_keys = entries
            if ONE_ROW:
                key_at = (start + column).to(tl.int64) * m_key
                seen_keys = tl.load(only_row + key_at, mask=column < keys - start, other=0)[None, :]
            if FACTOR:
                factors = tl.load(factor_tile + tl.cast(start, tl.int64) * f_key, mask=live, other=0.0)
            if BIAS == 3:
                biases = _times_distance(slopes[:, None], row[:, None], column[None, :], start)
            elif BIAS != 0:
                biases = tl.load(bias_tile + start, mask=live, other=0.0)
            top, weight, acc = _step(
                q_tile, k, v, seen_keys, factors, biases, row, column, start, keys, scale, cap, k_key, v_key, live,
                from_key, to_key, flat, top, weight, acc, MASK, FACTOR, BIAS, CAP, IS_CAUSAL, FIRST, LAST, FLAT, True,
                D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    at = ((batch * kv_heads * group + head) * rows + row)[:, None]
    if DIRECT:
        result = _divide(acc, weight[:, None], EMPTY)
        tl.store(out + at * DV + width[None, :], result.to(out.dtype.element_ty), mask=in_rows & (width < DV)[None, :])
    else:
        at = at * tl.num_programs(1) + split
        tl.store(partial + at * DV + width[None, :], acc, mask=in_rows & (width < DV)[None, :])
        tl.store(tops + at, top[:, None], mask=in_rows)
        tl.store(weights + at, weight[:, None], mask=in_rows)


@jit
def _combine_kernel(  # type: ignore[no-untyped-def]
    partial, tops, weights, out, splits,
    EMPTY: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
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
    result = _divide(tl.sum(acc * share[:, None], 0), tl.sum(weight * share, 0), EMPTY)
    tl.store(out + at * DV + width, result.to(out.dtype.element_ty), mask=width < DV)


def few(rows: int, group: int) -> bool:
    """Whether the query rows, of `group` heads each that share a KV head, are few enough for one tile."""
    return rows <= MAX_DECODE_ROWS and rows * group <= MAX_GROUP_ROWS


def decode(given: Operands, out: Tensor, scale: float, softcap: float | None, *, config: Config | None = None) -> None:
    """Attention with split keys into `out`."""
    batch, heads, rows, _ = given.q.shape
    kv_heads, keys = given.k.shape[1:3]
    group, width, widths = heads // kv_heads, out.shape[3], given.widths
    itemsize = given.q.dtype.itemsize
    wide = max(widths["BLOCK_D"], widths["BLOCK_DV"]) * itemsize
    block_r = max(16, _triton.next_power_of_2(rows * group))
    block_n, warps, stages = blocks(wide, itemsize, block_r)
    if config:
        block_n, warps, stages = (config[n] for n in ("BLOCK_N", "num_warps", "num_stages"))
    splits = _split(batch * kv_heads, _triton.ceil_div(keys, block_n), out.device)
    direct = splits == 1
    mask = given.mask
    one_row = mask is not None and (mask.stride(1) == 0 or group == 1) and (mask.stride(2) == 0 or rows == 1)
    partial = out.new_empty((out.numel() // width, splits, width) if not direct else 0, dtype=torch.float32)
    tops, weights = partial.new_empty((2, 0 if direct else out.numel() // width * splits)).unbind()
    _split_kernel[(batch * kv_heads, splits)](
        *given.tensors, out, partial, tops, weights, kv_heads, group, rows, keys,
        scale, 1.0 if softcap is None else softcap, *given.strides,
        **given.flags, SKIP_MINIMA=given.skip_minima, DIRECT=direct, ONE_ROW=one_row, **widths, BLOCK_R=block_r,
        BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not direct:
        _combine_kernel[(out.numel() // width,)](
            partial, tops, weights, out, splits, EMPTY=given.flags["EMPTY"], DV=width, BLOCK_DV=widths["BLOCK_DV"],
            BLOCK_S=_triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip


def blocks(row_bytes: int, itemsize: int, block_r: int) -> tuple[int, int, int]:
    """(keys, warps, stages) a tile: what compiles without spilling on sm_80, sm_90 and sm_100."""
    small = itemsize < 4 and row_bytes <= 256
    return 64 if small else 32, 4 if small and block_r <= 32 else 8, 3 if small else 2


def _split(programs: int, tiles: int, device: torch.device) -> int:
    """How many splits: as many as there are multiprocessors for, each with at least one tile, of as many tiles each.

    On an H200 one wave of one program a multiprocessor did best for 1 to 64 rows of 8 KV heads over 513 to 8192 keys:
    more of them wait for the same memory and leave more to be brought together.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    splits = max(1, min(tiles, MAX_SPLITS, multiprocessors // programs))
    return _triton.ceil_div(tiles, _triton.ceil_div(tiles, splits))


def _example(name: str, dtype: str, mask: str | None, d: int, rows: int = 16, **flags: Any) -> CompileExample:
    itemsize = 4 if dtype == "fp32" else 2
    widths = example_widths(d)
    block_n, warps, stages = blocks(widths["BLOCK_D"] * itemsize, itemsize, rows)
    values = example_values(mask) | {"SKIP_MINIMA": mask == "bf16", "DIRECT": False, "ONE_ROW": False}
    values |= widths
    values |= {"BLOCK_R": rows, "BLOCK_N": block_n, **flags}
    signature = example_signature(dtype, mask, "kv_heads group rows keys")
    signature |= dict.fromkeys(("partial", "tops", "weights"), "*fp32")
    return CompileExample(name, _split_kernel, signature, values, warps, stages)


COMPILE_EXAMPLES = (
    _example("decode, 128", "bf16", None, 128),
    _example("decode in a static cache, 64", "bf16", "bf16", 64, ONE_ROW=True),
    _example("decode of 8 rows of 8 heads, bool mask", "fp16", "u8", 128, 64),
    _example("decode of rows that are averages, one mask", "bf16", "u8", 128, ONE_ROW=True, EMPTY=UNIFORM),
    _example("decode, 64, float32, one split", "fp32", "fp32", 64, DIRECT=True),
    _example("decode, 256", "bf16", "u8", 256),
    _example("decode with a soft cap in a static cache, 256", "bf16", "bf16", 256, CAP=2),
    _example("decode with a sink in a static cache, 64", "bf16", "bf16", 64, SINK=True),
    _example("decode with a factor, 64", "fp16", "fp16", 64, FACTOR=True),
    _example("decode of 8 rows with a bias by distance, 64", "bf16", None, 64, BIAS=BY_DISTANCE, LAST=True, EMPTY=ZERO),
    _example("decode of 8 rows with a slope, 64", "bf16", None, 64, BIAS=SLOPE, LAST=True, EMPTY=ZERO),
    _example("decode up to a bound, 128", "bf16", None, 128, LAST=True, EMPTY=ZERO),
    _example("decode in a window, padded, 128", "bf16", "u8", 128, FIRST=True, LAST=True, EMPTY=UNIFORM),
    CompileExample(
        "combine", _combine_kernel,
        {"partial": "*fp32", "tops": "*fp32", "weights": "*fp32", "out": "*bf16", "splits": "i32"},
        {"EMPTY": ZERO, "DV": 128, "BLOCK_DV": 128, "BLOCK_S": 64},
    ),
)  # fmt: skip
