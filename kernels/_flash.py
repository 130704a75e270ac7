"""Attention kernels with an online softmax: one for many query rows, one that splits the keys for few.

For a row of scores s and a running maximum m (Milakov and Gimelshein, arXiv:1805.02867; tiled as in FlashAttention-2,
Dao, arXiv:2307.08691):

    m' = max(m, s);  l' = l·exp(m - m') + Σ exp(s - m');  acc' = acc·exp(m - m') + exp(s - m') v;  result acc / l

m stays in natural units, and differences are what is multiplied by log2(e): finfo.min · log2(e) is -inf, which would
make NaN of the rows that a model masks with finfo.min. A maximum of -inf counts as 0 in differences, so a row
without live keys ends with l = 0, and only there is decided whether it is NaN or 0.

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
def _step(  # type: ignore[no-untyped-def]
    q, k, v, mask, row, column, start, keys, scale, k_key, v_key, live, top, weight, acc,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into (m, l, acc). `mask` is the tile's part of the mask, already loaded (or anything)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    at = tl.cast(start, tl.int64)
    in_keys = column < keys - start
    k_tile = tl.load(
        k + at * k_key + (column * k_key)[None, :] + depth[:, None],
        mask=in_keys[None, :] & (depth < D)[:, None], other=0.0,
    )  # fmt: skip
    v_tile = tl.load(
        v + at * v_key + (column * v_key)[:, None] + width[None, :],
        mask=in_keys[:, None] & (width < DV)[None, :], other=0.0,
    )  # fmt: skip
    s = tl.dot(q, k_tile, input_precision="ieee") * scale
    if MASK == 1:
        live = live & (mask != 0)
    if MASK == 2:
        s += mask.to(tl.float32)
    if IS_CAUSAL:
        live = live & (row[:, None] >= (start + column)[None, :])
    s = tl.where(live, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - origin[:, None]) * LOG2E)
    shrink = tl.exp2((top - origin) * LOG2E)
    acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    return new_top, weight * shrink + tl.sum(p, 1), acc


@jit
def _divide(acc, weight, ZERO_EMPTY: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc / l; where there was no live key (l = 0) NaN, or 0 if ZERO_EMPTY."""
    result = acc / weight
    if ZERO_EMPTY:
        result = tl.where(weight == 0.0, 0.0, result)
    return result


@jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, out,
    heads, group, rows, keys, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, ZERO_EMPTY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M query rows of one head a program. Causal tiles stop at the diagonal; the longest are started first."""
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
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = keys
    if IS_CAUSAL:
        end = tl.minimum(keys, (tile + 1) * BLOCK_M)
    for start in range(0, end, BLOCK_N):
        live = (column < keys - start)[None, :] & in_rows
        entries = live
        if MASK != 0:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
        top, weight, acc = _step(
            q_tile, k, v, entries, row, column, start, keys, scale, k_key, v_key, live, top, weight, acc,
            MASK, IS_CAUSAL, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    out += ((batch * heads + head) * rows + wide_row)[:, None] * DV + width[None, :]
    result = _divide(acc, weight[:, None], ZERO_EMPTY)
    tl.store(out, result.to(out.dtype.element_ty), mask=in_rows & (width < DV)[None, :])


@jit
def _split_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, out, partial, tops, weights,
    kv_heads, group, rows, keys, tiles_each, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    MASK: tl.constexpr, SKIP_MINIMA: tl.constexpr, IS_CAUSAL: tl.constexpr, ZERO_EMPTY: tl.constexpr,
    DIRECT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
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
    mask_tile = mask + batch * m_batch + (head * m_head + row.to(tl.int64) * m_row)[:, None] + (column * m_key)[None, :]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
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
        if MASK == 0:
            top, weight, acc = _step(
                q_tile, k, v, live, row, column, start, keys, scale, k_key, v_key, live, top, weight, acc,
                MASK, IS_CAUSAL, D, DV, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        else:
            entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=live, other=0)
            if MASK == 1:
                counts = live & (entries != 0)
            else:
                counts = live & (entries != float("-inf"))
                if SKIP_MINIMA:
                    counts = counts & ((has_live[:, None] == 0) | ~(entries.to(tl.float32) <= MINIMUM))
            if tl.max(tl.max(counts.to(tl.int32), 1), 0) != 0:
                top, weight, acc = _step(
                    q_tile, k, v, entries, row, column, start, keys, scale, k_key, v_key, live, top, weight, acc,
                    MASK, IS_CAUSAL, D, DV, BLOCK_D, BLOCK_DV,
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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool, zero_empty: bool
) -> Tensor:
    """The `attention` op by the kernels above: contiguous [B, Hq, M, Dv] in v's dtype.

    q, k, v and mask may have any strides; where a last dimension of q, k or v is not dense, that tensor is copied.
    """
    batch, heads, rows, depth = q.shape
    kv_heads, keys, width = k.shape[1], k.shape[2], v.shape[3]
    group = heads // max(kv_heads, 1)
    out = v.new_empty((batch, heads, rows, width))
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_dense(t.to(common)) for t in (q, k, v))
    kind = NO_MASK
    m_strides: tuple[int, ...] = (0, 0, 0, 0)
    skip_minima = False
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
        if mask.dtype == torch.float64:
            mask = float32_mask(mask)
        skip_minima = mask.dtype in (torch.float32, torch.bfloat16) and not is_causal
        mask = mask.expand(batch, heads, rows, keys)
        m_strides = mask.stride()
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *m_strides)
    shape = {
        "D": depth, "DV": width,
        "BLOCK_D": max(16, _triton.next_power_of_2(depth)), "BLOCK_DV": max(16, _triton.next_power_of_2(width)),
    }  # fmt: skip
    wide = max(shape["BLOCK_D"], shape["BLOCK_DV"]) * common.itemsize
    flags = {"MASK": kind, "IS_CAUSAL": is_causal, "ZERO_EMPTY": zero_empty}
    if rows <= MAX_DECODE_ROWS and rows * group <= MAX_GROUP_ROWS:
        block_r = max(16, _triton.next_power_of_2(rows * group))
        block_n, warps, stages = _split_blocks(wide, common.itemsize, block_r)
        splits, tiles_each = _split(batch * kv_heads, _triton.ceil_div(keys, block_n), q.device)
        direct = splits == 1
        partial = q.new_empty((out.numel() // width, splits, width) if not direct else 0, dtype=torch.float32)
        tops, weights = partial.new_empty((2, 0 if direct else out.numel() // width * splits)).unbind()
        _split_kernel[(batch * kv_heads, splits)](
            q, k, v, q if mask is None else mask, out, partial, tops, weights,
            kv_heads, group, rows, keys, tiles_each, scale, *strides,
            **flags, SKIP_MINIMA=skip_minima, DIRECT=direct, **shape, BLOCK_R=block_r, BLOCK_N=block_n,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not direct:
            _combine_kernel[(out.numel() // width,)](
                partial, tops, weights, out, splits, ZERO_EMPTY=zero_empty, DV=width, BLOCK_DV=shape["BLOCK_DV"],
                BLOCK_S=_triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
        return out
    block_m, block_n, warps, stages = _prefill_blocks(wide, common.itemsize, mask is not None)
    _prefill_kernel[(batch * heads, _triton.ceil_div(rows, block_m))](
        q, k, v, q if mask is None else mask, out, heads, group, rows, keys, scale, *strides,
        **flags, **shape, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def float32_mask(mask: Tensor) -> Tensor:
    """A float mask as float32, with float64's finite minima still finite: rows of them are uniform, not empty."""
    if mask.dtype == torch.float64:
        mask = torch.where(mask == -torch.inf, mask, mask.clamp(min=torch.finfo(torch.float32).min))
    return mask.to(torch.float32)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _prefill_blocks(row_bytes: int, itemsize: int, masked: bool) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) a tile: what compiles without spilling on sm_80, sm_90 and sm_100."""
    if itemsize == 4 or row_bytes > 256:
        return 64, 32, 8, 2
    if masked:
        return 64, 64, 4, 2
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
    pointers = {**dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"), "mask": f"*{mask or dtype}"}
    partial = dict.fromkeys(("partial", "tops", "weights"), "*fp32") if kernel is _split_kernel else {}
    numbers = {"scale": "fp32", **dict.fromkeys(sizes.split(), "i32"), **dict.fromkeys(strides, "i32:16")}
    return {**pointers, **partial, **numbers}


def _widths(d: int) -> dict[str, int]:
    return {"D": d, "DV": d, "BLOCK_D": _triton.next_power_of_2(d), "BLOCK_DV": _triton.next_power_of_2(d)}


def _prefill_example(name: str, dtype: str, mask: str | None, d: int, causal: bool) -> CompileExample:
    itemsize = 4 if dtype == "fp32" else 2
    widths = _widths(d)
    block_m, block_n, warps, stages = _prefill_blocks(widths["BLOCK_D"] * itemsize, itemsize, mask is not None)
    values = {"MASK": MASK_KINDS[mask], "IS_CAUSAL": causal, "ZERO_EMPTY": False, "m_key": 1}
    values |= {**widths, "BLOCK_M": block_m, "BLOCK_N": block_n}
    signature = _signature(_prefill_kernel, dtype, mask, "heads group rows keys")
    return CompileExample(name, _prefill_kernel, signature, values, warps, stages)


def _split_example(name: str, dtype: str, mask: str | None, d: int, rows: int = 16, **flags: Any) -> CompileExample:
    itemsize = 4 if dtype == "fp32" else 2
    widths = _widths(d)
    block_n, warps, stages = _split_blocks(widths["BLOCK_D"] * itemsize, itemsize, rows)
    values = {"MASK": MASK_KINDS[mask], "IS_CAUSAL": False, "ZERO_EMPTY": False, "SKIP_MINIMA": mask == "bf16"}
    values |= {"DIRECT": False, "m_key": 1, **widths, "BLOCK_R": rows, "BLOCK_N": block_n, **flags}
    signature = _signature(_split_kernel, dtype, mask, "kv_heads group rows keys tiles_each")
    return CompileExample(name, _split_kernel, signature, values, warps, stages)


MASK_KINDS = {None: NO_MASK, "u8": BOOL_MASK, "fp16": FLOAT_MASK, "bf16": FLOAT_MASK, "fp32": FLOAT_MASK}
COMPILE_EXAMPLES = (
    _prefill_example("prefill, causal, 128", "bf16", None, 128, True),
    _prefill_example("prefill, 64", "fp16", None, 64, False),
    _prefill_example("prefill with a mask, 80", "fp16", "fp16", 80, False),
    _prefill_example("prefill with a bool mask, 64, float32", "fp32", "u8", 64, False),
    _prefill_example("prefill, 256", "bf16", None, 256, True),
    _split_example("decode, 128", "bf16", None, 128),
    _split_example("decode in a static cache, 64", "bf16", "bf16", 64),
    _split_example("decode of 8 rows of 8 heads, bool mask", "fp16", "u8", 128, 64),
    _split_example("decode, 64, float32, one split", "fp32", "fp32", 64, DIRECT=True),
    _split_example("decode, 256", "bf16", "u8", 256),
    CompileExample(
        "combine", _combine_kernel,
        {"partial": "*fp32", "tops": "*fp32", "weights": "*fp32", "out": "*bf16", "splits": "i32"},
        {"ZERO_EMPTY": True, "DV": 128, "BLOCK_DV": 128, "BLOCK_S": 64},
    ),
)  # fmt: skip
