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

from dataclasses import dataclass

from torch import Tensor

from fxopt.kernels._int4 import Layout
from fxopt.kernels._triton import CompileExample, ceil_div, jit, next_power_of_2, tl, triton

# Triton takes module-level numbers only as constexpr.
_MANTISSA = tl.constexpr(0x4B000000) if tl is not None else 0x4B000000  # bits of float32 2^23


@jit
def _value(word, shift, base, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The BITS bits of `word` from `shift` on as float32, less `base` - 2^23. An int8 has 128 added to it."""
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
    x, w, scale, zero, minimum, bias, out, N, J,
    x_k, w_n, w_j, s_n, s_g, z_n, z_g, m_n, m_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr, HIGH: tl.constexpr,
    BASE: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr, SHARED: tl.constexpr,
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
        total = tl.zeros([BLOCK_N, CHUNKS, CHUNK], tl.float32)
        for p in tl.static_range(VALUES):
            place = VALUES - 1 - p if HIGH else p
            k = (j // RUN) * (RUN * VALUES) + place * RUN + j % RUN
            xs = tl.load(x + k * x_k, mask=inside, other=0).to(tl.float32)
            group = ((first // RUN) * (RUN * VALUES) + place * RUN + first % RUN) // GROUP
            if ONE_GROUP:
                group = first * 0
            base = tl.full([1, 1, 1], BASE, tl.float32)
            if ZERO == 1:
                base += _affine(zero, n[:, None], group[None, :], z_n, z_g, cells)[:, :, None]
            value = _value(word, BITS * p, base, BITS)
            if OFFSET != 0.0:
                value -= OFFSET
            if ZERO == 2:
                value -= _affine(zero, n[:, None], group[None, :], z_n, z_g, cells)[:, :, None]
            if MINIMUM:
                value = value * _affine(scale, n[:, None], group[None, :], s_n, s_g, cells)[:, :, None]
                value += _affine(minimum, n[:, None], group[None, :], m_n, m_g, cells)[:, :, None]
            if SHARED or MINIMUM or ONE_GROUP:
                total += value * xs[None]
            else:
                part = tl.sum(value * xs[None], axis=2)
                acc += part * _affine(scale, n[:, None], group[None, :], s_n, s_g, cells)
            if p == VALUES - 1 and SHARED and not (MINIMUM or ONE_GROUP):
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
    x, w, scale, zero, minimum, bias, out, M, N, K,
    x_m, x_k, w_n, w_j, s_n, s_g, z_n, z_g, m_n, m_g,
    GROUP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, RUN: tl.constexpr, HIGH: tl.constexpr,
    BASE: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, MINIMUM: tl.constexpr, BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr, ALIGNED: tl.constexpr, WIDE_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = n < N
    row = m.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < K
        cells = inside[:, None] & columns[None, :]
        j = (k // (RUN * VALUES)) * RUN + k % RUN
        place = (k % (RUN * VALUES)) // RUN
        if HIGH:
            place = VALUES - 1 - place
        word = tl.load(w + n.to(tl.int64)[None, :] * w_n + j.to(tl.int64)[:, None] * w_j, mask=cells, other=0)
        group = k[:, None] // GROUP
        if ALIGNED:  # the tile lies in one group: its scale multiplies the tile's product
            group = tl.full([1, 1], 0, tl.int32) + start // GROUP
            cells = columns[None, :]
        base = tl.full([1, 1], BASE, tl.float32)
        if ZERO == 1:
            base += _affine(zero, n[None, :], group, z_n, z_g, cells)
        value = _value(word.to(tl.int32), (BITS * place)[:, None], base, BITS)
        if OFFSET != 0.0:
            value -= OFFSET
        if ZERO == 2:
            value -= _affine(zero, n[None, :], group, z_n, z_g, cells)
        if MINIMUM or not (ALIGNED or ONE_GROUP):
            value *= _affine(scale, n[None, :], group, s_n, s_g, cells)
        if MINIMUM:
            value += _affine(minimum, n[None, :], group, m_n, m_g, cells)
        xs = tl.load(x + row * x_m + k[None, :] * x_k, mask=(m < M)[:, None] & inside[None, :], other=0)
        value = value.to(xs.dtype)
        if WIDE_DOT:
            xs, value = xs.to(tl.float32), value.to(tl.float32)
        product = tl.dot(xs, value, input_precision="ieee")
        if ALIGNED and not (ONE_GROUP or MINIMUM):
            product *= _affine(scale, n[None, :], group, s_n, s_g, cells)
        acc += product
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
        base, offset = 8388608.0 + (128.0 if bits == 8 else 0.0), self.offset
        if offset == int(offset) and abs(offset) < 2**20:
            base, offset = base + offset, 0.0
        return {
            "GROUP": self.group_size, "BITS": bits, "VALUES": self.layout.values, "RUN": self.layout.run,
            "HIGH": self.layout.high_first, "BASE": base, "OFFSET": offset,
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


def chunk_elements(weight: Weight) -> int:
    """Packed elements that `gemv` sums at once under one scale (a power of two), or 0 where there are too few."""
    run, values, group = weight.layout.run, weight.layout.values, weight.group_size
    size = 64 // weight.packed.element_size()
    if group == weight.k:
        return size
    while size * weight.packed.element_size() >= 8:
        # A chunk's p-th values lie in one group: they are `size` consecutive inputs, or the whole chunk's inputs are.
        if (run % size == 0 and group % size == 0) or (size % run == 0 and group % (size * values) == 0):
            return size
        size //= 2
    return 0


def matmul(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> Tensor:
    """`out` [M, N] (contiguous) = x [M, K] @ weight^T + bias."""
    (m, k), n = x.shape, out.shape[1]
    if m == 0 or n == 0:
        return out
    if bias is not None:
        bias = bias.contiguous()
    common = weight.constexprs(bias)
    pointers = weight.pointers(x, bias, out)
    chunk = chunk_elements(weight)
    if m == 1 and chunk:
        j = k // weight.layout.values
        block_n = 2 if n <= 2048 else 4 if n <= 8192 else 8
        chunks = min(max(1024 // (chunk * weight.packed.element_size()), 1), next_power_of_2(ceil_div(j, chunk)))
        shared = weight.group_size % (weight.layout.run * weight.layout.values) == 0
        _gemv[(ceil_div(n, block_n),)](
            *pointers, n, j, x.stride(1), *weight.strides(),
            **common, SHARED=shared, BLOCK_N=block_n, CHUNKS=chunks, CHUNK=chunk, STAGES=3, num_warps=4,
        )  # fmt: skip
        return out
    block_m = min(max(next_power_of_2(m), 16), 64)
    block_n = 64
    block_k = 64 if x.element_size() == 2 else 32
    aligned = weight.group_size % block_k == 0
    _tile[(ceil_div(n, block_n), ceil_div(m, block_m))](
        *pointers, m, n, k, *x.stride(), *weight.strides(),
        **common, ALIGNED=aligned, WIDE_DOT=_interpreted(), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        STAGES=3, num_warps=4,
    )  # fmt: skip
    return out


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, whose `dot` multiplies the bit patterns of bfloat16 numbers."""
    return bool(triton.knobs.runtime.interpret)


_TABLES = ("scale", "zero", "minimum")
_STRIDES = {"w_n": "i32", "w_j": "i32", **{f"{t[0]}_{axis}": "i32" for t in _TABLES for axis in ("n", "g")}}
_INT4 = {"GROUP": 128, "BITS": 4, "VALUES": 2, "RUN": 1, "HIGH": False, "BASE": 8388616.0, "OFFSET": 0.0}
_INT8 = {"GROUP": 4096, "BITS": 8, "VALUES": 1, "RUN": 1, "HIGH": False, "BASE": 8388736.0, "OFFSET": 0.0}
_PLAIN = {"ZERO": 0, "MINIMUM": False, "BIAS": False, "ONE_GROUP": False}


def _pointers(w: str, dtype: str = "*bf16") -> dict[str, str]:
    return {"x": dtype, "w": w, "scale": dtype, "zero": dtype, "minimum": dtype, "bias": dtype, "out": dtype}


_GEMV = {"x_k": "i32", **_STRIDES}
_TILE = {"M": "i32", "N": "i32", "K": "i32", "x_m": "i32", "x_k": "i32", **_STRIDES}
_GEMV_BLOCKS = {"SHARED": True, "BLOCK_N": 4, "CHUNKS": 16, "CHUNK": 64, "STAGES": 3}
_TILE_BLOCKS = {"ALIGNED": True, "WIDE_DOT": False, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 3}

COMPILE_EXAMPLES = (
    CompileExample(
        "int4 GEMV, bf16, groups of 128",
        _gemv,
        {**_pointers("*u8"), "N": "i32", "J": "i32", **_GEMV},
        {**_INT4, **_PLAIN, **_GEMV_BLOCKS},
    ),
    CompileExample(
        "int4 GEMV, fp16, groups of 32 in halves with a minimum",
        _gemv,
        {**_pointers("*u8", "*fp16"), "N": "i32", "J": "i32", **_GEMV},
        {**_INT4, **_PLAIN, **_GEMV_BLOCKS, "GROUP": 32, "RUN": 16, "MINIMUM": True, "CHUNKS": 64, "CHUNK": 16},
    ),
    CompileExample(
        "int8 GEMV, bf16",
        _gemv,
        {**_pointers("*i8"), "N": "i32", "J": "i32", **_GEMV},
        {**_INT8, **_PLAIN, **_GEMV_BLOCKS, "ONE_GROUP": True},
    ),
    CompileExample(
        "int4 tile, bf16, 16 rows", _tile, {**_pointers("*u8"), **_TILE}, {**_INT4, **_PLAIN, **_TILE_BLOCKS}
    ),
    CompileExample(
        "int4 tile, fp16, GPTQ words with zero points",
        _tile,
        {**_pointers("*i32", "*fp16"), **_TILE, "zero": "*i8"},
        {**_INT4, **_PLAIN, **_TILE_BLOCKS, "VALUES": 8, "ZERO": 1, "BLOCK_M": 64},
    ),
    CompileExample(
        "int8 tile, fp32, 64 rows",
        _tile,
        {**_pointers("*i8", "*fp32"), **_TILE},
        {**_INT8, **_PLAIN, **_TILE_BLOCKS, "ONE_GROUP": True, "BLOCK_M": 64, "BLOCK_K": 32, "GROUP": 4096},
    ),
)
