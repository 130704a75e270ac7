"""What the attention kernels share: an online softmax, tile by tile, and how their operands are handed over.

For a row of scores s and a running maximum m (Milakov and Gimelshein, arXiv:1805.02867; tiled as in FlashAttention-2,
Dao, arXiv:2307.08691):

    m' = max(m, s);  l' = l·exp(m - m') + Σ exp(s - m');  acc' = acc·exp(m - m') + exp(s - m') v;  result acc / l

m stays in natural units, and differences are what is multiplied by log2(e): finfo.min · log2(e) is -inf, which would
make NaN of the rows that a model masks with finfo.min. A maximum of -inf counts as 0 in differences, so a row
without live keys ends with l = 0, and only there is decided what it is. A sink is a score that is there from the
start: m = sink, l = 1, acc = 0.

Query heads that share a KV head find it by index arithmetic; nothing is repeated in memory. Head widths that are no
powers of two are padded in registers, with zeros that add nothing to the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import jit, tl

NO_MASK, BOOL_MASK, FLOAT_MASK, SEGMENTS = 0, 1, 2, 3
#: what a bias has a number for; a slope is one number, times the distance
BY_DISTANCE, BY_KEY, SLOPE = 1, 2, 3
MASK_KINDS = {None: NO_MASK, "u8": BOOL_MASK, "i32": SEGMENTS} | dict.fromkeys(("fp16", "bf16", "fp32"), FLOAT_MASK)

#: the widest heads that the kernels serve
MAX_WIDTH = 256

#: what a row without a live key gives
NAN, ZERO, UNIFORM = 0, 1, 2


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
def _visible(  # type: ignore[no-untyped-def]
    live, row, key, first, last, IS_CAUSAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Which of the positions `live` lie within the bounds of their rows: key <= row, first <= key <= last."""
    if IS_CAUSAL:
        live = live & (row[:, None] >= key[None, :])
    if FIRST:
        live = live & (key[None, :] >= first[:, None])
    if LAST:
        live = live & (key[None, :] <= last[:, None])
    return live


@jit
def _bound(x, row, rows, stride, other, GIVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bounds of some rows, int32; `other` beyond the last row, and where there are none."""
    result = tl.zeros_like(row) + other
    if GIVEN:
        bound = tl.load(x + row.to(tl.int64) * stride, mask=row < rows, other=0).to(tl.int64)
        bound = tl.minimum(tl.maximum(bound, -1), 2147483646)  # farther out they all mean the same
        result = tl.where(row < rows, bound.to(tl.int32), other)
    return result


@jit
def _times_distance(slope, row, key, start):  # type: ignore[no-untyped-def]
    """slope · (start + key - row): an exact difference, and one product that is added to the scores in one rounding."""
    return ((key.to(tl.float32) + tl.cast(start, tl.float32)) - row.to(tl.float32)) * slope


@jit
def _step(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, bias, row, column, start, keys, scale, cap, k_key, v_key, live, first, last, flat,
    top, weight, acc,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, EDGE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into (m, l, acc). `mask`, `factor` and `bias` are the tile's part of them, loaded (or
    anything).

    Without EDGE all keys of the tile are there, and within the bounds of every row. With FLAT the rows in `flat` have
    the same score everywhere.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    CHUNK: tl.constexpr = 32
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
    if q.dtype == tl.float32 and BLOCK_D > CHUNK:  # in chunks, whose sums are added: what is added one by one drifts
        q_chunks = tl.permute(tl.reshape(q, [q.shape[0], BLOCK_D // CHUNK, CHUNK]), (1, 0, 2))
        k_chunks = tl.reshape(k_tile, [BLOCK_D // CHUNK, CHUNK, k_tile.shape[1]])
        s = tl.sum(tl.dot(q_chunks, k_chunks, input_precision="ieee"), 0) * scale
    else:
        s = tl.dot(q, k_tile, input_precision="ieee") * scale
    if FACTOR:
        s *= factor.to(tl.float32)
    if CAP != 0:
        s = _tanh(s / cap, CAP) * cap
    if BIAS != 0:
        s += bias.to(tl.float32)
    if MASK == 2:
        s += mask.to(tl.float32)
    if EDGE or MASK == 1:
        seen = live
        if MASK == 1:
            seen = seen & (mask != 0)
        if EDGE:
            seen = _visible(seen, row, start + column, first, last, IS_CAUSAL, FIRST, LAST)
        if FLAT:
            s = tl.where(flat[:, None], 0.0, s)
            seen = seen | (live & flat[:, None])
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - origin[:, None]) * LOG2E)
    shrink = tl.exp2((top - origin) * LOG2E)
    product = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
    if v_tile.dtype == tl.float32:  # the tile's sum on its own: as the dot's accumulator, acc would take key by key
        acc = tl.fma(acc, shrink[:, None], product)
    else:
        acc = acc * shrink[:, None] + product
    return new_top, weight * shrink + tl.sum(p, 1), acc


@jit
def _whose(  # type: ignore[no-untyped-def]
    batches, heads, group, section, BACKWARDS: tl.constexpr, BATCH_INNER: tl.constexpr
):  # fmt: skip
    """(batch, head, tile of rows) of a program: `section` heads at a time, tile by tile, so that the keys and values
    that they read again and again stay in the L2 cache.

    With BACKWARDS the last tiles, which are often the longest, are started first; with BATCH_INNER the batches of a
    head follow each other, for what they share.
    """
    tiles = tl.num_programs(0) // (batches * heads)
    within = tl.program_id(0) % (section * tiles)
    pair = tl.program_id(0) // (section * tiles) * section + within % section
    tile = within // section
    if BACKWARDS:
        tile = tiles - 1 - tile
    if BATCH_INNER:
        batch = pair // group % batches
        head = pair // (group * batches) * group + pair % group
    else:
        batch = pair // heads
        head = pair % heads
    return batch.to(tl.int64), head.to(tl.int64), tile


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
def _divide(acc, weight, EMPTY: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc / l; where there was no live key (l = 0) NaN, or 0."""
    result = acc / weight
    if EMPTY == 1:
        result = tl.where(weight == 0.0, 0.0, result)
    return result


@dataclass(frozen=True)
class Operands:
    """The op's tensors as the kernels take them: float32 or narrower, q, k and v of one dtype and dense at the end.

    `strides` are those of q, k, v (batch, head, row), mask and factor (batch, head, row, key), bias (batch, head), sink
    and bounds (batch, head, row), in this order, 0 where a tensor is broadcast. What isn't given is None. A bias is
    dense at the end; one by distance begins, as it is here, at distance 0, and those below zero lie before it. A mask
    that is segments has the keys' numbers in place of rows, and one key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    factor: Tensor | None
    bias: Tensor | None
    sink: Tensor | None
    first: Tensor | None
    last: Tensor | None
    skip_minima: bool
    flags: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, q in place of those that aren't there (a kernel won't read it)."""
        optional = (self.mask, self.factor, self.bias, self.sink, self.first, self.last)
        return (self.q, self.k, self.v, *(self.q if t is None else t for t in optional))

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, in the order in which the kernels take them."""
        found: list[int] = []
        for t, n in zip((self.q, self.k, self.v), (3, 3, 3), strict=True):
            found += t.stride()[:n]
        four = ((self.mask, 4), (self.factor, 4), (self.bias, 2), (self.sink, 3), (self.first, 3), (self.last, 3))
        for optional, n in four:
            found += (0,) * n if optional is None else optional.stride()[:n]
        return tuple(found)

    @property
    def widths(self) -> dict[str, int]:
        """The widths of heads, and those that they are padded to."""
        depth, width = self.q.shape[3], self.v.shape[3]
        blocks = (max(16, _triton.next_power_of_2(n)) for n in (depth, width))
        return {"D": depth, "DV": width, **dict(zip(("BLOCK_D", "BLOCK_DV"), blocks, strict=True))}


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    empty_rows: str,
    softcap: float | None,
    sink: Tensor | None,
    factor: Tensor | None,
    first: Tensor | None,
    last: Tensor | None,
    bias: Tensor | None = None,
) -> Operands:
    """The op's arguments as kernels take them. Nothing broadcast is copied; q, k and v are if their end isn't dense."""
    batch, heads, rows, _ = q.shape
    shape = (batch, heads, rows, k.shape[2])
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_dense(t.to(common)) for t in (q, k, v))
    kind, skip_minima = NO_MASK, False
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK if mask.is_floating_point() else SEGMENTS
        if mask.dtype == torch.float64:
            mask = float32_mask(mask)
        skip_minima = mask.dtype in (torch.float32, torch.bfloat16)
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        mask = _dense(mask).expand(*shape[:2], -1)[..., None] if kind == SEGMENTS else mask.expand(shape)
    factor = None if factor is None else _single(factor).expand(shape)
    by = 0
    if bias is not None:
        by = {4: BY_KEY, 3: BY_DISTANCE, 2: SLOPE}[bias.dim()]
        bias = at_zero(_single(bias) if by == SLOPE else _dense(_single(bias)), by, shape)
    sink = None if sink is None else _single(sink).expand(*shape[:3], 1)
    first, last = (None if t is None else t.expand(shape[:3]) for t in (first, last))
    # A float mask that leaves a row empty says itself what it is, and beside a sink none is.
    fills = kind in (BOOL_MASK, SEGMENTS) or (kind == NO_MASK and not first is last is None)
    empty = {"nan": NAN, "zero": ZERO, "uniform": UNIFORM if fills and sink is None else NAN}[empty_rows]
    cap = 0 if softcap is None else 2 if common == torch.bfloat16 and q.is_cuda else 1
    flags = {"MASK": kind, "FACTOR": factor is not None, "CAP": cap, "SINK": sink is not None, "IS_CAUSAL": is_causal}
    flags |= {"BIAS": by, "FIRST": first is not None, "LAST": last is not None, "EMPTY": empty}
    return Operands(q, k, v, mask, factor, bias, sink, first, last, skip_minima, flags)


def section(given: Operands) -> int:
    """How many query heads, of all batches, are worked on at a time: those whose keys and values fill half the L2.

    All heads at once, tile by tile, would read keys and values from memory once a tile.
    """
    batch, heads = given.q.shape[:2]
    kv_heads, keys = given.k.shape[1:3]
    one = keys * (given.k.shape[3] + given.v.shape[3]) * given.k.element_size()
    return heads // kv_heads * _kv_heads_within(_triton.l2_cache(given.q.device) // 2, one, batch * kv_heads)


@lru_cache
def _kv_heads_within(room: int, one: int, pairs: int) -> int:
    """The largest divisor of `pairs` for which so many times `one` fit into `room`, at least 1."""
    most = min(max(1, room // max(one, 1)), pairs)
    return next(n for n in range(most, 0, -1) if pairs % n == 0)


def batch_inner(given: Operands) -> bool:
    """Whether a mask or factor tells heads apart and batches not: read once for all of them where they go together."""
    return any(t is not None and t.stride(0) == 0 and t.stride(1) != 0 for t in (given.mask, given.factor))


def at_zero(bias: Tensor, by: int, shape: tuple[int, int, int, int]) -> Tensor:
    """[B, Hq, ...] of a bias, for scores of `shape`: from its first key on, or distance 0, to be read around it."""
    if by == SLOPE:
        return bias.expand(shape[:2])
    if by == BY_KEY:
        return bias[:, :, 0].expand(*shape[:2], shape[3])
    return bias.expand(*shape[:2], bias.shape[-1])[..., shape[2] - 1 :]


def _single(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype == torch.float64 else x


def float32_mask(mask: Tensor) -> Tensor:
    """A float mask as float32, with float64's finite minima still finite: rows of them are uniform, not empty."""
    if mask.dtype == torch.float64:
        mask = torch.where(mask == -torch.inf, mask, mask.clamp(min=torch.finfo(torch.float32).min))
    return mask.to(torch.float32)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# What examples to compile are made of: types of arguments, widths, and the values of flags.


def example_signature(dtype: str, mask: str | None, sizes: str) -> dict[str, str]:
    """The types of the arguments that all kernels share."""
    strides = [f"{t}_{axis}" for t, last in zip("qkvm", ("row", "key", "key", "row"), strict=True)
               for axis in ("batch", "head", last)]  # fmt: skip
    plain = [f"{t}_{axis}" for t in ("f", "s", "first", "last") for axis in ("batch", "head", "row")]
    plain += ["b_batch", "b_head"]
    pointers = dict.fromkeys(("q", "k", "v", "out", "factor", "bias", "sink"), f"*{dtype}") | {
        "mask": f"*{mask or dtype}"
    }
    pointers |= dict.fromkeys(("first", "last"), "*i64")
    numbers = {"scale": "fp32", "cap": "fp32", **dict.fromkeys(sizes.split(), "i32")}
    return {**pointers, **numbers, **dict.fromkeys(strides, "i32:16"), **dict.fromkeys(plain, "i32")}


def example_widths(d: int) -> dict[str, int]:
    """The widths of heads."""
    return {"D": d, "DV": d, "BLOCK_D": _triton.next_power_of_2(d), "BLOCK_DV": _triton.next_power_of_2(d)}


def example_values(mask: str | None, **flags: Any) -> dict[str, Any]:
    """The flags, those not named off."""
    plain = dict.fromkeys(("FACTOR", "SINK", "IS_CAUSAL", "FIRST", "LAST"), False) | {"CAP": 0, "EMPTY": NAN}
    return {"MASK": MASK_KINDS[mask], "BIAS": 0, **plain, "m_key": 1, "f_key": 1, **flags}
