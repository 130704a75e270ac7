"""Attention of many query rows: one tile of rows a program, over the tiles of keys that it can see.

What a row sees lies within bounds (causality, `first` and `last`), and those of a tile of rows say which tiles of keys
are visited, and which of them without a look at positions:

    begin ......... inner_begin ................. inner_end .......... end
    some rows see   every row sees every key      some rows see
                    (no comparisons)

A mask that all heads share is looked through first (`_flash_tiles`): tiles in which nothing is live are not visited,
and where it is 0 or True throughout it is not read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._attention_sdpa import dense_mask
from fxopt.kernels._flash_decode import decode, few
from fxopt.kernels._flash_parts import (
    BY_DISTANCE,
    BY_KEY,
    SEGMENTS,
    SLOPE,
    UNIFORM,
    ZERO,
    Operands,
    _bound,
    _divide,
    _start,
    _step,
    _times_distance,
    _whose,
    batch_inner,
    example_signature,
    example_values,
    example_widths,
    operands,
    section,
)
from fxopt.kernels._flash_tiles import list_tiles, worth_listing
from fxopt.kernels._launch import Launch, Launches, launch, likeness
from fxopt.kernels._triton import CompileExample, jit, tl
from fxopt.ops import Config

#: rows, keys, warps and stages that the tuner may try, beside `blocks`
CONFIGS = ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2))
#: prefills that may come again
_LAUNCHES = Launches()
#: keys, warps and stages of the kernel for few rows
DECODE_CONFIGS = ((32, 4, 4), (64, 4, 4), (64, 8, 3), (128, 4, 3), (128, 8, 2))


@jit
def _sloped(slope, row, base, column, start, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """slope · (j - i) of a tile. Unless WHOLE it counts from the row `base`: the softmax does not see what is the same
    for a row, and one number a key is added in the multiply-add that scales the scores."""
    if WHOLE:
        result = _times_distance(slope, row[:, None], column[None, :], start)
    else:
        result = tl.fma(column.to(tl.float32), slope, tl.cast(start - base, tl.float32) * slope)[None, :]
    return result


@jit
def _whole_tile(x, in_rows, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile whose keys are all there; loads without predicates are pipelined better."""
    if EVEN:
        tile = tl.load(x)
    else:
        tile = tl.load(x, mask=in_rows, other=0.0)
    return tile


@jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, bias, sink, first, last, tiles, out, tops, weights,
    batches, heads, group, section, rows, keys, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, b_batch, b_head, s_batch, s_head, s_row,
    first_batch, first_head, first_row, last_batch, last_head, last_row, t_batch,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EMPTY: tl.constexpr, TILES: tl.constexpr,
    STATS: tl.constexpr, BATCH_INNER: tl.constexpr, MASK_ROWS: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M query rows of one head a program; the last rows, which are often the longest, are started first.

    Tiles that every row sees whole are taken first, then those at an edge. With TILES both are listed. With STATS the
    maximum and the weight of each row are kept, for the backward. With EVEN all rows of all tiles are there.
    """
    batch, head, tile = _whose(batches, heads, group, section, IS_CAUSAL or LAST, BATCH_INNER)
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
    mask += batch * m_batch + head * m_head
    mask_tile = mask + (wide_row * m_row)[:, None] + (column * m_key)[None, :]
    factor_tile = factor + batch * f_batch + head * f_head + (wide_row * f_row)[:, None] + (column * f_key)[None, :]
    bias += batch * b_batch + head * b_head
    # Sinks and statistics see what is the same for a row; float32 is worth the exact distance.
    WHOLE: tl.constexpr = (STATS or SINK) or (q.dtype.element_ty == tl.float32)
    slope = 0.0
    if BIAS == 3:
        slope = tl.load(bias).to(tl.float32)
    real_row = tl.minimum(row, rows - 1)
    top, weight = _start(sink, batch * s_batch + head * s_head + wide_row * s_row, row < rows, SINK, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Rows that aren't there have the bounds of the last one that is.
    lowest = first + batch * first_batch + head * first_head
    highest = last + batch * last_batch + head * last_head
    from_key = _bound(lowest, real_row, rows, first_row, 0, FIRST)
    to_key = _bound(highest, real_row, rows, last_row, keys - 1, LAST)
    if TILES:
        tiles += batch * t_batch + tile * (tl.cdiv(keys, BLOCK_N) + 2).to(tl.int64)
        inner = tl.load(tiles)
        edges = tl.load(tiles + 1)
        begin = 0
        inner_begin = 0
        inner_end = 0
    else:
        begin = 0
        inner_begin = 0
        end = keys
        inner_end = keys // BLOCK_N * BLOCK_N
        if IS_CAUSAL:
            inner_end = tl.minimum(inner_end, tile * BLOCK_M // BLOCK_N * BLOCK_N)
            end = tl.minimum(end, (tile + 1) * BLOCK_M)
        if LAST:
            end = tl.minimum(end, tl.max(to_key, 0) + 1)
            inner_end = tl.minimum(inner_end, (tl.min(to_key, 0) + 1) // BLOCK_N * BLOCK_N)
        if FIRST:
            begin = tl.maximum(tl.min(from_key, 0), 0) // BLOCK_N * BLOCK_N
            inner_begin = tl.maximum(tl.cdiv(tl.max(from_key, 0), BLOCK_N), 0) * BLOCK_N
            crossing = inner_begin >= inner_end  # no tile is seen by every row
            inner_begin = tl.where(crossing, begin, inner_begin)
            inner_end = tl.where(crossing, begin, inner_end)
        if MASK == 3:  # of some rows the bounds don't say all
            told = tl.min(from_key, 0) >= 0
            inner_begin = tl.where(told, inner_begin, begin)
            inner_end = tl.where(told, inner_end, begin)
        inner = (inner_end - inner_begin) // BLOCK_N
        edges = (inner_begin - begin) // BLOCK_N + tl.maximum(tl.cdiv(end - inner_end, BLOCK_N), 0)
    INNER_MASK: tl.constexpr = 0 if (TILES or MASK == 3) else MASK
    EDGE_MASK: tl.constexpr = 1 if MASK == 3 else MASK
    for index in range(inner):
        if TILES:
            start = tl.load(tiles + 2 + index) * BLOCK_N
        else:
            start = inner_begin + index * BLOCK_N
        entries = in_rows
        factors = in_rows
        biases = in_rows
        if INNER_MASK != 0:
            if MASK_ROWS:
                entries = _whole_tile(mask_tile + tl.cast(start, tl.int64) * m_key, in_rows, EVEN)
            else:
                entries = tl.load(mask + (start + column).to(tl.int64) * m_key)[None, :]
        if FACTOR:
            factors = _whole_tile(factor_tile + tl.cast(start, tl.int64) * f_key, in_rows, EVEN)
        if BIAS == 1:
            biases = tl.load(bias + ((start + column)[None, :] - real_row[:, None]))
        if BIAS == 2:
            biases = tl.load(bias + start + column)[None, :]
        if BIAS == 3:
            biases = _sloped(slope, row, tile * BLOCK_M, column, start, WHOLE)
        top, weight, acc = _step(
            q_tile, k, v, entries, factors, biases, row, column, start, keys, scale, cap, k_key, v_key, in_rows,
            from_key, to_key, row, top, weight, acc, INNER_MASK, FACTOR, BIAS, CAP, IS_CAUSAL, FIRST, LAST, False,
            False, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for index in range(edges):
        if TILES:
            start = tl.load(tiles + 1 + tl.cdiv(keys, BLOCK_N) - index) * BLOCK_N
        elif FIRST:
            start = begin + index * BLOCK_N
            start += tl.where(start >= inner_begin, inner_end - inner_begin, 0)
        else:
            start = inner_end + index * BLOCK_N
        live = (column < keys - start)[None, :] & in_rows
        entries = live
        factors = live
        biases = live
        if MASK == 3:
            of_row = tl.load(mask + row, mask=row < rows, other=0)
            of_key = tl.load(mask + start + column, mask=column < keys - start, other=0)
            entries = (of_row[:, None] == of_key[None, :]) | (from_key >= 0)[:, None]
        elif MASK != 0:
            if MASK_ROWS:
                entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
            else:
                key_at = (start + column).to(tl.int64) * m_key
                entries = tl.load(mask + key_at, mask=column < keys - start, other=0)[None, :]
        if FACTOR:
            factors = tl.load(factor_tile + tl.cast(start, tl.int64) * f_key, mask=live, other=0.0)
        if BIAS == 1:
            biases = tl.load(bias + ((start + column)[None, :] - real_row[:, None]), mask=live, other=0.0)
        if BIAS == 2:
            biases = tl.load(bias + start + column, mask=column < keys - start, other=0.0)[None, :]
        if BIAS == 3:
            biases = _sloped(slope, row, tile * BLOCK_M, column, start, WHOLE)
        top, weight, acc = _step(
            q_tile, k, v, entries, factors, biases, row, column, start, keys, scale, cap, k_key, v_key, live,
            from_key, to_key, row, top, weight, acc, EDGE_MASK, FACTOR, BIAS, CAP, IS_CAUSAL, FIRST, LAST, False, True,
            D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    place = (batch * heads + head) * rows + wide_row
    if STATS:
        tl.store(tops + place, top, mask=row < rows)
        tl.store(weights + place, weight, mask=row < rows)
    if EMPTY == 2:
        dead = (weight == 0.0) & (row < rows)
        if tl.max(dead.to(tl.int32), 0) != 0:  # a mean of all values
            total = tl.zeros([BLOCK_DV], tl.float32)
            for start in range(0, keys, BLOCK_N):
                at = tl.cast(start, tl.int64) * v_key + (column * v_key)[:, None] + width[None, :]
                inside = (column < keys - start)[:, None] & (width < DV)[None, :]
                total += tl.sum(tl.load(v + at, mask=inside, other=0.0).to(tl.float32), 0)
            acc = tl.where(dead[:, None], total[None, :], acc)
            weight = tl.where(dead, tl.cast(keys, tl.float32), weight)
    result = _divide(acc, weight[:, None], EMPTY)
    tl.store(
        out + place[:, None] * DV + width[None, :], result.to(out.dtype.element_ty),
        mask=in_rows & (width < DV)[None, :],
    )  # fmt: skip


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    empty_rows: str,
    softcap: float | None = None,
    sink: Tensor | None = None,
    factor: Tensor | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """The `attention` op by Triton kernels: contiguous [B, Hq, M, Dv] in v's dtype.

    All operands may have any strides; where a last dimension of q, k or v is not dense, that tensor is copied.
    `config` is one of `configs`, or None for what is believed to do.
    """
    out = v.new_empty((*q.shape[:3], v.shape[3]))
    if out.numel() == 0 or k.shape[2] == 0:
        return out.zero_()
    if few(q.shape[2], q.shape[1] // k.shape[1]):
        mask = dense_mask(mask, first)
        given = operands(q, k, v, mask, is_causal, empty_rows, softcap, sink, factor, first, last, bias)
        decode(given, out, scale, softcap, config=config)
        return out
    from_zero = bias if bias is None or bias.dim() != 3 else bias[..., q.shape[2] - 1 :]  # as a kernel takes it
    tensors = (q, k, v, mask, factor, from_zero, sink, first, last)
    settings = (scale, is_causal, empty_rows, softcap, q.device, tuple(config.items()) if config else None)
    key = (settings, likeness(tensors))
    known = _LAUNCHES.find(key)
    if known is not None:
        known.again(*(q if t is None else t for t in tensors), out, out, out, out)
        return out
    given = operands(q, k, v, mask, is_causal, empty_rows, softcap, sink, factor, first, last, bias)
    launched = prefill(given, out, scale, softcap, config=config)
    as_given = (t is None or t.data_ptr() == own.data_ptr() for t, own in zip(tensors, given.tensors, strict=True))
    if launched is not None and all(as_given):  # nothing was copied
        _LAUNCHES.keep(key, launched)
    return out


def configs(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Config]:
    """Launches to try for these sizes: tiles of more or fewer rows and keys, warps, and tiles loaded ahead."""
    if q.dtype.itemsize == 4:
        return
    if few(q.shape[2], q.shape[1] // max(k.shape[1], 1)):
        for keys, warps, stages in DECODE_CONFIGS:
            yield {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    else:
        for rows, keys, warps, stages in CONFIGS:
            yield {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def prefill(
    given: Operands,
    out: Tensor,
    scale: float,
    softcap: float | None,
    *,
    stats: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
) -> Launch | None:
    """Attention tile by tile into `out`; into `stats` (float32 [B, Hq, M]) each row's maximum score and weight.

    Returns the launch where it is all that there was to do, with q in place of tensors that aren't given, and out for
    those that aren't kept.
    """
    batch, heads, rows, _ = given.q.shape
    kv_heads, keys = given.k.shape[1:3]
    widths = given.widths
    by_row, by_distance = _by_row(given), given.flags["BIAS"] == BY_DISTANCE
    tensors = by_row + (given.factor is not None) + by_distance
    itemsize = given.q.dtype.itemsize
    wide = max(widths["BLOCK_D"], widths["BLOCK_DV"]) * itemsize
    bounded = given.first is not None or given.last is not None or by_distance
    block_m, block_n, warps, stages = blocks(wide, itemsize, tensors, bounded, _triton.capability(given.q.device))
    if config:
        block_m, block_n, warps, stages = (config[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    listed = worth_listing(given, block_n)
    tiles = list_tiles(given, block_m, block_n) if listed else out
    tops, weights = stats if stats is not None else (out, out)
    launched = launch(
        _prefill_kernel, (batch * heads * _triton.ceil_div(rows, block_m),),
        (*given.tensors, tiles, out, tops, weights), batch, heads, heads // kv_heads, section(given), rows, keys,
        scale, 1.0 if softcap is None else softcap, *given.strides, tiles.stride(0) if listed else 0,
        **given.flags, TILES=listed, STATS=stats is not None, BATCH_INNER=batch_inner(given), MASK_ROWS=by_row,
        EVEN=(by_row or given.factor is not None) and rows % block_m == 0,
        **widths, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return launched if stats is None and not listed else None


def _by_row(given: Operands) -> bool:
    """Whether a mask has tiles to be read: one that doesn't tell rows apart is a number a key."""
    return given.mask is not None and given.flags["MASK"] != SEGMENTS and given.mask.stride(2) != 0


def blocks(row_bytes: int, itemsize: int, tensors: int, bounded: bool, capability: int) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) a tile: of those that compile with next to no spills the fastest on an H200
    from `capability` 90 (sm_90) on, and what is believed to be so before.

    `tensors` counts those of which a tile is read beside the scores: a mask that tells rows apart, a factor and a bias
    by distance. `bounded`: rows have bounds, or such a bias.
    """
    if itemsize == 4 or (row_bytes > 256 and (tensors or capability < 90)):
        return 64, 32, 8, 2
    if capability < 90:
        if tensors:
            return 64, 64 if tensors == 1 else 32, 8 if bounded and row_bytes > 128 else 4, 2
        return 128, 64, 4 if row_bytes <= 128 else 8, 3
    if row_bytes > 256:
        return 64, 32, 4, 2
    if row_bytes <= 128:
        if tensors > 1:
            return 64, 32, 4, 2
        return (64, 64 if bounded else 32, 4, 3) if tensors else (128, 64, 4, 3)
    if tensors == 0:
        return 64, 64, 4, 3
    return (64, 64 if tensors == 1 else 32, 4, 2) if bounded else (128, 64, 8, 3)


def _examples(name: str, dtype: str, mask: str | None, d: int, **flags: Any) -> Iterator[CompileExample]:
    """One for sm_90 and later, one for all where that is launched otherwise before."""
    itemsize = 4 if dtype == "fp32" else 2
    widths = example_widths(d)
    by_distance = flags.get("BIAS") == BY_DISTANCE
    by_row = bool(flags.pop("MASK_ROWS", mask not in (None, "i32")))
    tensors = by_row + ("FACTOR" in flags) + by_distance
    bounded = by_distance or bool({"FIRST", "LAST"} & flags.keys())
    off = dict.fromkeys(("TILES", "STATS", "BATCH_INNER", "EVEN"), False)
    values = example_values(mask) | off | {"MASK_ROWS": by_row} | flags
    signature = example_signature(dtype, mask, "batches heads group section rows keys t_batch")
    signature |= {"tiles": "*i32", "tops": "*fp32", "weights": "*fp32"}
    oldest = {blocks(widths["BLOCK_D"] * itemsize, itemsize, tensors, bounded, at): at for at in (90, 80)}
    for (block_m, block_n, warps, stages), at in oldest.items():
        tile = {**widths, "BLOCK_M": block_m, "BLOCK_N": block_n}
        yield CompileExample(
            f"{name}, sm_{at} on", _prefill_kernel, signature, values | tile, warps, stages, capability=at
        )


COMPILE_EXAMPLES = (
    *_examples("prefill, causal, 128", "bf16", None, 128, IS_CAUSAL=True),
    *_examples("prefill, 64", "fp16", None, 64),
    *_examples("prefill with a mask, 80", "fp16", "fp16", 80),
    *_examples("prefill with a bool mask, 64, float32", "fp32", "u8", 64),
    *_examples("prefill, 256", "bf16", None, 256, IS_CAUSAL=True),
    *_examples("prefill with a soft cap and a mask, 256", "bf16", "bf16", 256, CAP=2),
    *_examples("prefill with a soft cap, causal, 128", "fp16", None, 128, CAP=1, IS_CAUSAL=True),
    *_examples("prefill with a sink and a mask, 64", "bf16", "bf16", 64, SINK=True),
    *_examples("prefill with a factor and a mask, 64", "fp16", "fp16", 64, FACTOR=True),
    *_examples("prefill with a mask by key, 64", "bf16", "u8", 64, MASK_ROWS=False),
    *_examples("prefill with a mask by key and a bias, 64", "bf16", "u8", 64, MASK_ROWS=False, BIAS=BY_DISTANCE),
    *_examples("prefill with a mask, 128", "bf16", "bf16", 128, EVEN=True),
    *_examples("prefill with a bias by distance, 64", "bf16", None, 64, BIAS=BY_DISTANCE),
    *_examples("prefill with a bias, causal, 128", "bf16", None, 128, BIAS=BY_DISTANCE, IS_CAUSAL=True),
    *_examples("prefill with a bias by key, padded, 64", "fp16", "u8", 64, BIAS=BY_KEY, LAST=True, EMPTY=UNIFORM),
    *_examples("prefill with a bias by key, causal, 128", "bf16", None, 128, BIAS=BY_KEY, IS_CAUSAL=True),
    *_examples("prefill with a bias, 64, float32", "fp32", None, 64, BIAS=BY_DISTANCE),
    *_examples("prefill with a slope, causal, 128", "bf16", None, 128, BIAS=SLOPE, IS_CAUSAL=True),
    *_examples("prefill with a slope, causal, 64", "fp16", None, 64, BIAS=SLOPE, IS_CAUSAL=True),
    *_examples("prefill with a slope and a sink, padded, 64", "bf16", "u8", 64, BIAS=SLOPE, SINK=True, TILES=True),
    *_examples("prefill with a slope, 64, float32", "fp32", None, 64, BIAS=SLOPE),
    *_examples("prefill with a slope, training, 128", "bf16", None, 128, BIAS=SLOPE, IS_CAUSAL=True, STATS=True),
    *_examples("prefill in a window, 128", "bf16", None, 128, FIRST=True, LAST=True, EMPTY=ZERO),
    *_examples("prefill in a window with a soft cap, 256", "bf16", None, 256, FIRST=True, LAST=True, CAP=2),
    *_examples("prefill up to a bound, padded, 128", "bf16", "u8", 128, LAST=True, EMPTY=UNIFORM),
    *_examples("prefill of segments, 128", "bf16", "i32", 128, FIRST=True, LAST=True, EMPTY=ZERO),
    *_examples("prefill of segments, 64", "fp16", "i32", 64, FIRST=True, LAST=True, EMPTY=UNIFORM),
    *_examples("prefill of segments, 256", "bf16", "i32", 256, FIRST=True, EMPTY=ZERO),
    *_examples("prefill with listed tiles, 128", "bf16", "bf16", 128, TILES=True),
    *_examples("prefill with listed tiles and a sink, 64", "bf16", "bf16", 64, TILES=True, SINK=True),
    *_examples("prefill in a window, training, 128", "bf16", None, 128, FIRST=True, LAST=True, STATS=True),
)
