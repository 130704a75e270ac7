"""Which tiles of keys a mask leaves live, for each tile of query rows: read once, for all heads that share the mask.

A tile is dead where no entry is live: -inf and False rule a key out, and so does finfo.min in rows that have a live
key anywhere, beside which its weight is exactly 0 (in other rows it makes weights uniform, so there it counts as
live). A tile is whole where every row sees every key and nothing is added. The others are partial. Dead tiles are
never visited, whole ones without reading the mask again: what FlexAttention's block masks are made of by hand, here
read off the values that a mask has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._flash_parts import MASK_KINDS, SEGMENTS, Operands, _bound, _visible
from fxopt.kernels._triton import CompileExample, jit, tl

#: reading a mask once more is little where so many heads read it
SHARING = 4


@jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    mask, first, last, tiles, rows, keys, t_batch, m_batch, m_row, m_key, first_batch, first_row, last_batch, last_row,
    MASK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, IS_CAUSAL: tl.constexpr, SKIP_MINIMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of one tile of rows: how many are whole, how many partial, whole ones from the front, others from the
    back."""
    MINIMUM: tl.constexpr = -1.7e38  # half of finfo.min, of bfloat16 and float32 alike; nothing else is that low
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    in_rows = (row < rows)[:, None]
    count = tl.cdiv(keys, BLOCK_N)
    tiles += batch * t_batch + tile * (count + 2).to(tl.int64)
    mask_tile = mask + batch * m_batch + (row.to(tl.int64) * m_row)[:, None] + (column * m_key)[None, :]
    from_key = _bound(first + batch * first_batch, row, rows, first_row, 0, FIRST)
    to_key = _bound(last + batch * last_batch, row, rows, last_row, keys - 1, LAST)
    has_live = (row >= rows).to(tl.int32)
    if SKIP_MINIMA:
        scanned = 0
        while (scanned < keys) & (tl.min(has_live, 0) == 0):
            inside = (column < keys - scanned)[None, :] & in_rows
            seen = tl.load(mask_tile + tl.cast(scanned, tl.int64) * m_key, mask=inside, other=float("-inf"))
            inside = _visible(inside, row, scanned + column, from_key, to_key, IS_CAUSAL, FIRST, LAST)
            has_live = tl.maximum(has_live, tl.max((inside & (seen.to(tl.float32) > MINIMUM)).to(tl.int32), 1))
            scanned += BLOCK_N
    whole = 0
    partial = 0
    for index in range(count):
        start = index * BLOCK_N
        inside = (column < keys - start)[None, :] & in_rows
        entries = tl.load(mask_tile + tl.cast(start, tl.int64) * m_key, mask=inside, other=0)
        inside = _visible(inside, row, start + column, from_key, to_key, IS_CAUSAL, FIRST, LAST)
        if MASK == 1:
            live = inside & (entries != 0)
            plain = live
        else:
            live = inside & (entries != float("-inf"))
            if SKIP_MINIMA:
                live = live & ((has_live[:, None] == 0) | ~(entries.to(tl.float32) <= MINIMUM))
            plain = inside & (entries == 0.0)
        is_whole = tl.min(tl.min((plain | (row >= rows)[:, None]).to(tl.int32), 1), 0)
        is_partial = tl.max(tl.max(live.to(tl.int32), 1), 0) * (1 - is_whole)
        tl.store(tiles + 2 + whole, index, mask=is_whole != 0)
        tl.store(tiles + 1 + count - partial, index, mask=is_partial != 0)
        whole += is_whole
        partial += is_partial
    tl.store(tiles, whole)
    tl.store(tiles + 1, partial)


def worth_listing(given: Operands, block_n: int) -> bool:
    """Whether to look through the mask first: where it tells rows apart, several heads share it, and there are tiles to
    leave out."""
    if given.mask is None or given.flags["MASK"] == SEGMENTS or (given.mask.stride(1) != 0 and given.mask.shape[1] > 1):
        return False
    if given.mask.stride(2) == 0:
        return False
    bounds = [t for t in (given.first, given.last) if t is not None]
    if any(t.stride(1) != 0 and t.shape[1] > 1 for t in bounds):
        return False
    batch, heads, _, keys = given.mask.shape
    per_batch = any(t.stride(0) != 0 and batch > 1 for t in (given.mask, *bounds))
    return heads * (1 if per_batch else batch) >= SHARING and keys > 2 * block_n


def list_tiles(given: Operands, block_m: int, block_n: int) -> Tensor:
    """int32 [B, tiles of rows, tiles of keys + 2]: (whole, partial, whole tiles ..., ... partial tiles from the end).

    Where all batches see the same the first dimension is broadcast.
    """
    mask, first, last = given.mask, given.first, given.last
    assert mask is not None
    batch, _, rows, keys = mask.shape
    shared = all(t is None or t.stride(0) == 0 or batch == 1 for t in (mask, first, last))
    row_tiles, key_tiles = _triton.ceil_div(rows, block_m), _triton.ceil_div(keys, block_n)
    tiles = mask.new_empty((1 if shared else batch, row_tiles, key_tiles + 2), dtype=torch.int32)
    bounds = [s for t in (first, last) for s in ((0, 0) if t is None else (t.stride(0), t.stride(2)))]
    names = ("MASK", "FIRST", "LAST", "IS_CAUSAL")
    _tiles_kernel[(row_tiles, tiles.shape[0])](
        mask, mask if first is None else first, mask if last is None else last, tiles, rows, keys, tiles.stride(0),
        mask.stride(0), mask.stride(2), mask.stride(3), *bounds,
        **{name: given.flags[name] for name in names}, SKIP_MINIMA=given.skip_minima,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8,
    )  # fmt: skip
    return tiles.expand(batch, -1, -1)


def _example(name: str, mask: str, **flags: bool) -> CompileExample:
    numbers = "rows keys t_batch m_batch m_row first_batch first_row last_batch last_row"
    signature = {"mask": f"*{mask}", "first": "*i64", "last": "*i64", "tiles": "*i32"}
    signature |= dict.fromkeys(numbers.split(), "i32")
    plain = {"FIRST": False, "LAST": False, "IS_CAUSAL": False, "SKIP_MINIMA": mask in ("bf16", "fp32")}
    values = {"MASK": MASK_KINDS[mask], "m_key": 1, **plain, **flags, "BLOCK_M": 64, "BLOCK_N": 64}
    return CompileExample(name, _tiles_kernel, signature, values, 8)


COMPILE_EXAMPLES = (
    _example("tiles of a float mask", "bf16"),
    _example("tiles of a bool mask in a window", "u8", FIRST=True, LAST=True),
    _example("tiles of a float16 mask, causal", "fp16", IS_CAUSAL=True),
)
