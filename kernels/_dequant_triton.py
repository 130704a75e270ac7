"""Triton kernels that multiply by an integer weight without ever writing the dequantised weight to memory.

Both kernels read the packed weight once, in whatever layout and strides it has, and compute with

    w[n, k] = (q[n, k] - offset - zero[n, k // g]) * scale[n, k // g] + minimum[n, k // g]

in float32. The bits of a value are or-ed into the mantissa of 2^23, so that one subtraction both converts it and takes
off the offset and an integer zero point, exactly: integer-to-float conversions run at a quarter of the rate and bound
a 4-bit kernel before memory does. Without `minimum` the scale multiplies a group's sum, not its elements.

`gemv` serves one row: every word is loaded once and all its values are used, no tensor cores. `tile` serves more rows
through `tl.dot`, whose left operand is x and whose right one is dequantised in registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.kernels._int4 import Layout
from fxopt.kernels._triton import CompileExample, ceil_div, jit, next_power_of_2, tl, triton

# Triton takes module-level numbers only as constexpr.
_MANTISSA = tl.constexpr(0x4B000000) if tl is not None else 0x4B000000  # bits of float32 2^23


@jit
def _value(word, shift, base, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The BITS bits of `word` from `shift` on (an int8 plus 128) as float32, less `base` - 2^23."""
    bits = (word >> shift) & ((1 << BITS) - 1)
    if BITS == 8:
        bits = bits ^ 0x80
    return (bits | _MANTISSA).to(tl.float32, bitcast=True) - base


@jit
def _affine(pointer, n, group, stride_n, stride_g, mask):  # type: ignore[no-untyped-def]
    """One entry a group as float32."""
    return tl.load(pointer + n.to(tl.int64) * stride_n + group * stride_g, mask=mask, other=0).to(tl.float32)


@jit
def _gemv(  # type: ignore[no-untyped-def]
    x, w, scale, zero, minimum, bias, out, mantissa, N, J,
    x_k, w_n, w_j, s_n, s_g, z_n, z_g, m_n, m_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr, HIGH: tl.constexpr,
    SUBTRACT: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr, SHARED: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = n < N
    row = n.to(tl.int64)[:, None, None]
    acc = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    for start in tl.range(0, J, CHUNKS * CHUNK, num_stages=STAGES):
        first = start + tl.arange(0, CHUNKS) * CHUNK
        j = first[:, None] + tl.arange(0, CHUNK)[None, :]
        inside = j < J
        cells = rows[:, None] & (first < J)[None, :]
        word = tl.load(w + row * w_n + j.to(tl.int64)[None] * w_j, mask=rows[:, None, None] & inside[None], other=0)
        word = word.to(tl.int32)
        if BITS == 8:  # signed bytes to 0 .. 255
            word = word ^ (0x80 if LANES == 1 else -0x7F7F7F80)
        total = tl.zeros([BLOCK_N, CHUNKS, CHUNK], tl.float32)
        for p in tl.static_range(LANES * VALUES):
            place = VALUES - 1 - p % VALUES if HIGH else p % VALUES
            element = j * LANES + p // VALUES
            k = (element // RUN) * (RUN * VALUES) + place * RUN + element % RUN
            head = first * LANES + p // VALUES
            group = ((head // RUN) * (RUN * VALUES) + place * RUN + head % RUN) // GROUP
            if ONE_GROUP:
                group = first * 0
            # The value stays where it is in the word, which makes it `power` times as large; x is divided by that.
            fits = BITS * p + BITS <= 23
            bit = BITS * p if fits else BITS * p - (20 if BITS == 4 else 16)
            power = 1 << bit
            bits = (word if fits else word >> (20 if BITS == 4 else 16)) & (((1 << BITS) - 1) * power)
            base = tl.full([1, 1, 1], 8388608.0 + SUBTRACT * power, tl.float32)
            if ZERO == 1:
                base += power * _affine(zero, n[:, None], group[None, :], z_n, z_g, cells)[:, :, None]
            value = (bits | mantissa).to(tl.float32, bitcast=True) - base
            if OFFSET != 0.0:
                value -= OFFSET * power
            if ZERO == 2:
                value -= power * _affine(zero, n[:, None], group[None, :], z_n, z_g, cells)[:, :, None]
            xs = tl.load(x + k * x_k, mask=inside, other=0).to(tl.float32)
            if MINIMUM:
                value *= (1.0 / power) * _affine(scale, n[:, None], group[None, :], s_n, s_g, cells)[:, :, None]
                value += _affine(minimum, n[:, None], group[None, :], m_n, m_g, cells)[:, :, None]
            else:
                xs *= 1.0 / power
            if SHARED or MINIMUM or ONE_GROUP:
                total += value * xs[None]
            else:
                part = tl.sum(value * xs[None], axis=2)
                acc += part * _affine(scale, n[:, None], group[None, :], s_n, s_g, cells)
            if p == LANES * VALUES - 1 and SHARED and not (MINIMUM or ONE_GROUP):
                acc += tl.sum(total, axis=2) * _affine(scale, n[:, None], group[None, :], s_n, s_g, cells)
        if MINIMUM or ONE_GROUP:
            acc += tl.sum(total, axis=2)
    y = tl.sum(acc, axis=1)
    if ONE_GROUP and not MINIMUM:
        y *= _affine(scale, n, 0, s_n, s_g, rows)
    if BIAS:
        y += tl.load(bias + n, mask=rows, other=0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=rows)


@jit
def _tile(  # type: ignore[no-untyped-def]
    x, w, scale, zero, minimum, bias, out, one, M, N, J,
    x_m, x_k, w_n, w_j, s_n, s_g, z_n, z_g, m_n, m_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr, HIGH: tl.constexpr,
    SUBTRACT: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr, SHARED: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr, WIDE_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = n < N
    row = m.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, J, BLOCK_J, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_J)
        inside = j < J
        word = tl.load(
            w + n.to(tl.int64)[None, :] * w_n + j.to(tl.int64)[:, None] * w_j,
            mask=inside[:, None] & columns[None, :],
            other=0,
        ).to(tl.int32)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if VALUES == 2 and RUN == 1:  # neighbours share a byte: x is read in order and split, not read by twos
            pair = (j[:, None] * 2 + tl.arange(0, 2)[None, :])[None]
            both = tl.load(
                x + row[:, :, None] * x_m + pair * x_k, mask=(m < M)[:, None, None] & inside[None, :, None], other=0
            )
            even, odd = tl.split(both)
        for p in tl.static_range(VALUES):
            place = VALUES - 1 - p if HIGH else p
            k = (j // RUN) * (RUN * VALUES) + place * RUN + j % RUN
            cells = inside[:, None] & columns[None, :]
            group = k[:, None] // GROUP
            if ALIGNED or ONE_GROUP:  # all of the tile's p-th values lie in one group
                head = ((start // RUN) * (RUN * VALUES) + place * RUN + start % RUN) // GROUP
                group = tl.full([1, 1], 0, tl.int32) + (0 if ONE_GROUP else head)
                cells = columns[None, :]
            base = tl.full([1, 1], 8388608.0 + SUBTRACT, tl.float32)
            if ZERO == 1:
                base += _affine(zero, n[None, :], group, z_n, z_g, cells)
            value = _value(word, BITS * p, base, BITS)
            if OFFSET != 0.0:
                value -= OFFSET
            if ZERO == 2:
                value -= _affine(zero, n[None, :], group, z_n, z_g, cells)
            if MINIMUM or not (ALIGNED or ONE_GROUP):
                value *= _affine(scale, n[None, :], group, s_n, s_g, cells)
            if MINIMUM:
                value += _affine(minimum, n[None, :], group, m_n, m_g, cells)
            if VALUES == 2 and RUN == 1:
                xs = odd if place == 1 else even
            else:
                xs = tl.load(x + row * x_m + k[None, :] * x_k, mask=(m < M)[:, None] & inside[None, :], other=0)
            value = value.to(xs.dtype)
            if WIDE_DOT:
                xs, value = xs.to(tl.float32), value.to(tl.float32)
            if MINIMUM or ONE_GROUP or not ALIGNED or SHARED:
                part = tl.dot(xs, value, part, input_precision="ieee")
            else:
                product = tl.dot(xs, value, input_precision="ieee")
                acc += product * _affine(scale, n[None, :], group, s_n, s_g, cells)
            if p == VALUES - 1:
                if MINIMUM or ONE_GROUP or not ALIGNED:
                    # In float32 one chain of additions over all of K rounds four times worse than blocks do; the
                    # factor keeps the compiler from making it one.
                    acc += part * one if EXACT else part
                elif SHARED:
                    acc += part * _affine(scale, n[None, :], group, s_n, s_g, cells)
    if ONE_GROUP and not MINIMUM:
        acc *= _affine(scale, n, 0, s_n, s_g, columns)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=columns, other=0).to(tl.float32)[None, :]
    mask = (m < M)[:, None] & columns[None, :]
    tl.store(out + row * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Weight:
    """A quantised weight as both kernels take it. `scale`, `zero` and `minimum` are [N, groups], any strides."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    minimum: Tensor | None
    offset: float
    group_size: int
    layout: Layout  # Layout(False, 1, 1) for int8
    k: int

    def constexprs(self, bias: Tensor | None) -> dict[str, object]:
        """What both kernels are specialised on."""
        bits = 8 // self.layout.values if self.packed.element_size() == 1 else 4
        subtract, offset = 128.0 if bits == 8 else 0.0, self.offset
        if offset == int(offset) and abs(offset) < 2**20:  # exact beside 2^23
            subtract, offset = subtract + offset, 0.0
        return {
            "GROUP": self.group_size, "BITS": bits, "VALUES": self.layout.values, "RUN": self.layout.run,
            "HIGH": self.layout.high_first, "SUBTRACT": subtract, "OFFSET": offset,
            "ZERO": 0 if self.zero is None else 2 if self.zero.dtype.is_floating_point else 1,
            "MINIMUM": self.minimum is not None, "BIAS": bias is not None, "ONE_GROUP": self.group_size == self.k,
        }  # fmt: skip

    def pointers(self, x: Tensor, bias: Tensor | None, out: Tensor) -> list[Tensor]:
        """The pointer arguments; what is absent is never read."""
        rest = [t if t is not None else self.scale for t in (self.zero, self.minimum, bias)]
        return [x, self.packed, self.scale, *rest, out]

    def strides(self) -> list[int]:
        """The stride arguments after those of x."""
        tables = (t if t is not None else self.scale for t in (self.scale, self.zero, self.minimum))
        return [*self.packed.stride(), *(s for t in tables for s in t.stride())]


def in_one_group(weight: Weight, size: int) -> bool:
    """Whether the p-th values of `size` (a power of two) elements from a multiple of `size` on share a group."""
    run, values, group = weight.layout.run, weight.layout.values, weight.group_size
    # They are `size` consecutive inputs, or lie among the inputs of all `size` elements.
    return (run % size == 0 and group % size == 0) or (size % run == 0 and group % (size * values) == 0)


def chunk_elements(weight: Weight) -> int:
    """Packed elements that `gemv` sums at once under one scale (a power of two), or 0 where there are too few."""
    size = 64 // weight.packed.element_size()
    if weight.group_size == weight.k:
        return size
    while size * weight.packed.element_size() >= 8:
        if in_one_group(weight, size):
            return size
        size //= 2
    return 0


def _words(packed: Tensor) -> tuple[Tensor, int]:
    """Bytes that can be read four at a time as int32, and how many elements that makes one."""
    dense = packed.element_size() == 1 and packed.stride(1) == 1 and packed.shape[1] % 4 == 0
    if dense and packed.stride(0) % 4 == 0 and packed.storage_offset() % 4 == 0:
        return packed.view(torch.int32), 4
    return packed, 1


def configs(rows: int, n: int) -> Iterator[dict[str, int]]:
    """What `matmul` may be launched with: BYTES of a weight's row a step (one row of x), or BLOCK_J (more rows)."""
    if rows == 1:
        for block_n, width, warps in (
            (4, 1024, 4),
            (8, 512, 4),
            (8, 1024, 4),
            (16, 1024, 8),
            (16, 512, 4),
            (32, 256, 4),
        ):
            yield {"BLOCK_N": block_n, "BYTES": width, "num_warps": warps}
        return
    for block_n in (16, 32, 64):
        for block_j in (32, 64, 128):
            yield {"BLOCK_N": block_n, "BLOCK_J": block_j, "num_warps": 4}


def matmul(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, config: Mapping[str, int] | None = None
) -> Tensor:
    """`out` [M, N] (contiguous) = x [M, K] @ weight^T + bias, launched as `config` (one of `configs`) says."""
    (m, k), n = x.shape, out.shape[1]
    if m == 0 or n == 0:
        return out
    if bias is not None:
        bias = bias.contiguous()
    common = weight.constexprs(bias)
    pointers = weight.pointers(x, bias, out)
    values = weight.layout.values
    j, chunk = k // values, chunk_elements(weight)
    shared = weight.group_size % (weight.layout.run * values) == 0
    if m == 1 and chunk:
        # (rows, bytes of a row) a step: the best of 60 shapes tried at 4096x4096 int4 on a Hopper GPU.
        block_n, width, warps = (4, 1024, 4) if n <= 2048 else (16, 1024, 8) if n <= 8192 else (16, 512, 4)
        if config and "BYTES" in config:
            block_n, width, warps = config["BLOCK_N"], config["BYTES"], config["num_warps"]
        chunks = min(max(width // (chunk * weight.packed.element_size()), 1), next_power_of_2(ceil_div(j, chunk)))
        words, lanes = _words(weight.packed)
        pointers[1], (w_n, w_j) = words, words.stride()
        j, chunk = j // lanes, chunk // lanes
        _gemv[(ceil_div(n, block_n),)](
            *pointers, 0x4B000000, n, j, x.stride(1), w_n, w_j, *weight.strides()[2:],
            **common, SHARED=shared, LANES=lanes, BLOCK_N=block_n, CHUNKS=chunks, CHUNK=chunk, STAGES=1,
            num_warps=warps,
        )  # fmt: skip
        return out
    # Tile shapes from a sweep at 4096x4096, with 16 and 256 rows, on a Hopper GPU.
    block_m, block_n = min(max(next_power_of_2(m), 16), 128 if values == 1 else 64), 32 if m <= 16 else 64
    exact = x.element_size() == 4
    block_j = 32 if exact else 128 if values == 1 else 64
    if config and "BLOCK_J" in config:
        block_n, block_j = config["BLOCK_N"], config["BLOCK_J"]
    sizes = [size for size in (128, 64, 32, 16) if size <= block_j and in_one_group(weight, size)]
    _tile[(ceil_div(n, block_n), ceil_div(m, block_m))](
        *pointers, 1.0, m, n, j, *x.stride(), *weight.strides(),
        **common, SHARED=shared, ALIGNED=bool(sizes), EXACT=exact, WIDE_DOT=_interpreted(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_J=sizes[0] if sizes else block_j, STAGES=_stages(x), num_warps=4,
    )  # fmt: skip
    return out


def _stages(x: Tensor) -> int:
    """Tiles in flight: 4 need up to 160 KB of shared memory a block, which data-centre Hopper and Blackwell have."""
    large = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0), (10, 3))
    return 4 if large else 2


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose `dot` multiplies the bit patterns of bfloat16 numbers."""
    return bool(triton.knobs.runtime.interpret)


_TABLES = ("scale", "zero", "minimum")
_STRIDES = {"w_n": "i32", "w_j": "i32", **{f"{t[0]}_{axis}": "i32" for t in _TABLES for axis in ("n", "g")}}
_INT4 = {"GROUP": 128, "BITS": 4, "VALUES": 2, "RUN": 1, "HIGH": False, "SUBTRACT": 8.0, "OFFSET": 0.0}
_INT8 = {"GROUP": 4096, "BITS": 8, "VALUES": 1, "RUN": 1, "HIGH": False, "SUBTRACT": 128.0, "OFFSET": 0.0}
_PLAIN = {"ZERO": 0, "MINIMUM": False, "BIAS": False, "ONE_GROUP": False}


def _pointers(w: str, dtype: str = "*bf16") -> dict[str, str]:
    return {"x": dtype, "w": w, "scale": dtype, "zero": dtype, "minimum": dtype, "bias": dtype, "out": dtype}


_GEMV = {"mantissa": "i32", "N": "i32", "J": "i32", "x_k": "i32", **_STRIDES}
_TILE = {"one": "fp32", "M": "i32", "N": "i32", "J": "i32", "x_m": "i32", "x_k": "i32", **_STRIDES}
_GEMV_BLOCKS = {"SHARED": True, "LANES": 4, "BLOCK_N": 4, "CHUNKS": 16, "CHUNK": 16, "STAGES": 3}
_TILE_BLOCKS = {
    "SHARED": True, "ALIGNED": True, "EXACT": False, "WIDE_DOT": False,
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_J": 64, "STAGES": 4,
}  # fmt: skip

COMPILE_EXAMPLES = (
    CompileExample(
        "int4 GEMV, bf16, groups of 128",
        _gemv,
        {**_pointers("*i32"), **_GEMV},
        {**_INT4, **_PLAIN, **_GEMV_BLOCKS},
    ),
    CompileExample(
        "int4 GEMV, fp16, groups of 32 in halves with a minimum",
        _gemv,
        {**_pointers("*i32", "*fp16"), **_GEMV},
        {**_INT4, **_PLAIN, **_GEMV_BLOCKS, "GROUP": 32, "RUN": 16, "MINIMUM": True, "CHUNKS": 64, "CHUNK": 4},
    ),
    CompileExample(
        "int8 GEMV, bf16",
        _gemv,
        {**_pointers("*i32"), **_GEMV},
        {**_INT8, **_PLAIN, **_GEMV_BLOCKS, "ONE_GROUP": True},
    ),
    CompileExample(
        "int4 tile, bf16, 16 rows", _tile, {**_pointers("*u8"), **_TILE}, {**_INT4, **_PLAIN, **_TILE_BLOCKS}
    ),
    CompileExample(
        "int4 tile, fp16, GPTQ words with zero points",
        _tile,
        {**_pointers("*i32", "*fp16"), **_TILE, "zero": "*i8"},
        {**_INT4, **_PLAIN, **_TILE_BLOCKS, "VALUES": 8, "ZERO": 1, "BLOCK_M": 64, "BLOCK_J": 16},
    ),
    CompileExample(
        "int8 tile, fp32, 64 rows",
        _tile,
        {**_pointers("*i8", "*fp32"), **_TILE},
        {**_INT8, **_PLAIN, **_TILE_BLOCKS, "ONE_GROUP": True, "EXACT": True, "BLOCK_M": 64, "BLOCK_J": 32},
    ),
)
