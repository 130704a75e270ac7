"""Matmul by a quantised weight: y = x @ w^T + bias, where w is stored as int8 or as packed 4-bit integers.

    int8_matmul   w[n, k] = q[n, k] * scale[n]
    int4_matmul   w[n, k] = (q[n, k] - offset - zero[n, k // g]) * scale[n, k // g] + minimum[n, k // g]

Bytes for few rows: the weight once, N*K (int8) or N*K/2 (int4) against 2*N*K in bfloat16; FLOPs: 2*M*N*K. Spelled out,
the dequantised weight is written to memory and read back, 3 to 5 times the bytes.

The weight is read in place, in the layout that the model has (kernels/_int4.py lists the layouts): weights are inputs
of compiled code and can change, so nothing derived from them is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.symbols import hint, is_static
from fxopt.kernels import _dequant_triton, _int4, _triton
from fxopt.kernels._dequant_triton import Weight
from fxopt.kernels._int4 import Layout, unpack
from fxopt.ops import Config, Target, fused_op

_SOURCES = [_int4.__file__, _dequant_triton.__file__, _triton.__file__]
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights are dequantised before they are rounded to x's."""
    return torch.promote_types(dtype, torch.float32)


@fused_op("int8_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", sources=_SOURCES)
def int8_matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times an int8 weight [N, K] (any strides) scaled per output by `scale` [N] (any float dtype).

    The result has x's dtype; `bias` [N] is added. Symmetric weight-only quantisation as in LLM.int8() (Dettmers et
    al., arXiv:2208.07339) without its activation part.
    """
    wide = _wide(x.dtype)
    w = (weight.to(wide) * scale.to(wide)[:, None]).to(x.dtype)
    return F.linear(x, w, bias if bias is None else bias.to(x.dtype))


@fused_op(
    "int4_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? minimum, int group_size, str layout,"
    " float offset=0.0, Tensor? bias=None) -> Tensor",
    sources=_SOURCES,
)
def int4_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    group_size: int,
    layout: str,
    offset: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """x [..., K] times a weight of packed 4-bit integers, quantised in groups of `group_size` inputs.

    `packed` is [N, K / P] of uint8 or int8 (P = 2) or int32 (P = 8) in one of the layouts of kernels/_int4.py, any
    strides; `scale`, `zero` and `minimum` are [N, K / group_size], any strides. The result has x's dtype; `bias` [N] is
    added. Covers symmetric weights (offset 8), integer zero points (GPTQ, AWQ) and a float minimum (GGML's Q4_1).
    """
    wide = _wide(x.dtype)
    q = unpack(packed, layout).to(wide)
    n, k = q.shape
    q = q.reshape(n, k // group_size, group_size) - offset
    if zero is not None:
        q = q - zero.to(wide)[:, :, None]
    w = q * scale.to(wide)[:, :, None]
    if minimum is not None:
        w = w + minimum.to(wide)[:, :, None]
    return F.linear(x, w.reshape(n, k).to(x.dtype), bias if bias is None else bias.to(x.dtype))


@int8_matmul.fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@int4_matmul.fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    group_size: int,
    layout: str,
    offset: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@int8_matmul.draw
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return _drawn(x), _drawn(weight), _drawn(scale) / 100, None if bias is None else _drawn(bias)


@int4_matmul.draw
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, minimum: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    tables = (None if zero is None else _drawn(zero, 15), None if minimum is None else _drawn(minimum))
    return (
        _drawn(x),
        _drawn(packed),
        _drawn(scale) / 10,
        *tables,
        *rest[:-1],
        None if rest[-1] is None else _drawn(rest[-1]),
    )


def _drawn(like: Tensor, most: int | None = None) -> Tensor:
    """A random tensor of the kind: all bits of an integer, or the numbers up to `most`."""
    shape, strides = like.shape, like.stride()
    if like.dtype.is_floating_point:
        numbers = torch.randn(shape).to(like.dtype)
    else:
        span = torch.iinfo(like.dtype)
        numbers = torch.randint(0 if most else span.min, (most or span.max) + 1, shape, dtype=torch.int64).to(
            like.dtype
        )
    return torch.empty_strided(shape, strides, dtype=like.dtype).copy_(numbers)


#: (int8, int4) rows up to which the Triton kernels are used. On an H200 (docs/measurements.md) both beat what Inductor
#: makes of the spelled-out form at 16 rows, and lose to it at 64; between them 32 is a guess, not a measurement.
_MOST_ROWS = (32, 32)


def too_many_rows(x: Tensor, *, bits: int) -> str | None:
    """Why on a GPU nothing here beats a matmul of the dequantised weight, for x [..., K] of so many rows; or None."""
    most, rows = _MOST_ROWS[bits == 4], hint(x.numel() // x.shape[-1])
    return f"the kernel pays up to {most} rows; there are {rows}" if rows > most else None


def _kernel_fits(bits: int, target: Target, x: Tensor, packed: Tensor) -> str | None:
    """Why the Triton kernels don't serve these arguments, or None."""
    if (objection := _triton.needs_gpu(target)) is not None:
        return objection
    if x.dtype not in _KERNEL_DTYPES:
        return f"the kernel computes in float32; x is {x.dtype}"
    if not all(is_static(size) for size in packed.shape):
        return "the kernel is specialised on the weight's shape, which is dynamic here"
    rows, most = hint(x.numel() // x.shape[-1]), 4 * _MOST_ROWS[bits == 4]
    return f"the kernel takes up to {most} rows; there are {rows}" if rows > most else None


@int8_matmul.implementation(
    "triton",
    opaque=True,
    when=lambda target, x, weight, *_: _kernel_fits(8, target, x, weight),
    pays=lambda target, x, *_: too_many_rows(x, bits=8),
    configs=lambda x, weight, *_: _dequant_triton.configs(math.prod(x.shape[:-1]), weight.shape[0]),
)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, config: Config | None = None) -> Tensor:
    n, k = weight.shape
    rows = x.reshape(-1, k)
    if rows.shape[0] > 4 * _MOST_ROWS[0]:  # a dynamic number of rows can be anything
        return int8_matmul.run("decomposed", x, weight, scale, bias)
    described = Weight(weight, scale[:, None], None, None, 0.0, k, Layout(False, 1, 1), k)
    out = _dequant_triton.matmul(rows, described, bias, x.new_empty((rows.shape[0], n)), config)
    return out.view(*x.shape[:-1], n)


@int4_matmul.implementation(
    "triton",
    opaque=True,
    when=lambda target, x, packed, *_: _kernel_fits(4, target, x, packed),
    pays=lambda target, x, *_: too_many_rows(x, bits=4),
    configs=lambda x, packed, *_: _dequant_triton.configs(math.prod(x.shape[:-1]), packed.shape[0]),
)
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    minimum: Tensor | None,
    group_size: int,
    layout: str,
    offset: float = 0.0,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    n, k = packed.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    if rows.shape[0] > 4 * _MOST_ROWS[1]:  # a dynamic number of rows can be anything
        return int4_matmul.reference(x, packed, scale, zero, minimum, group_size, layout, offset, bias)
    if packed.dtype == torch.int32 and layout == "low/8" and packed.stride(1) == 1:
        packed, layout = packed.view(torch.uint8), "low/2"  # the same bits: GPUs are little-endian
    described = Weight(packed, scale, zero, minimum, offset, group_size, Layout.parse(layout, packed.dtype, k), k)
    out = _dequant_triton.matmul(rows, described, bias, x.new_empty((rows.shape[0], n)), config)
    return out.view(*x.shape[:-1], n)


def _int8pack_fits(target: Target, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> str | None:
    """Why aten._weight_int8pack_mm doesn't serve these arguments, or None.

    Measured on one core (1024x1024): bfloat16 at M = 1, 4, 16 takes 0.05, 0.10, 0.39 ms against 0.33 ms for
    dequantising and a plain matmul. In float32 it sums serially, less exactly and no faster. It crashes where K is
    not a multiple of its vector length.
    """
    if target.device.type != "cpu":
        return f"aten._weight_int8pack_mm is used on the CPU only, not on {target.device.type}"
    if target.training:
        return "aten._weight_int8pack_mm has no backward; gradients are needed"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"aten._weight_int8pack_mm pays for 16-bit x only; x is {x.dtype}"
    if not all(is_static(size) for size in weight.shape) or weight.shape[1] % 32:
        return f"aten._weight_int8pack_mm needs K in multiples of 32; K is {weight.shape[1]}"
    if not weight.is_contiguous():
        return "aten._weight_int8pack_mm needs a contiguous weight"
    if x.dtype == torch.float16 and scale.dtype != torch.float16:
        return "aten._weight_int8pack_mm without its scale can overflow float16"
    rows = hint(x.numel() // weight.shape[1])
    if rows > 8:
        return f"aten._weight_int8pack_mm pays up to 8 rows; there are {rows}"
    return None


@int8_matmul.implementation("aten", when=_int8pack_fits)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    n, k = weight.shape
    rows = x.reshape(-1, k).contiguous()
    inside = scale.dtype == x.dtype  # the op takes a scale of x's dtype only; a wider one is applied after it
    factor = scale.contiguous() if inside else torch.ones(n, dtype=x.dtype, device=x.device)
    y = torch.ops.aten._weight_int8pack_mm(rows, weight, factor)
    y = _scaled(y, None if inside else scale, bias)
    return y.reshape(*x.shape[:-1], n)


def _scales_last(target: Target, *args: object) -> str | None:
    """Why the scale should not be applied to the product, or None."""
    return "the scale's gradient would need the unscaled product to be kept" if target.training else None


@int8_matmul.implementation("decomposed", when=_scales_last)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.float16:  # unscaled sums of int8 products overflow it
        return int8_matmul.reference(x, weight, scale, bias)
    return _scaled(F.linear(x, weight.to(x.dtype)), scale, bias)


def _scaled(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """y * scale + bias, rounded once."""
    if scale is None and bias is None:
        return y
    wide = y.to(_wide(y.dtype))
    wide = wide if scale is None else wide * scale.to(wide.dtype)
    return (wide if bias is None else wide + bias.to(wide.dtype)).to(y.dtype)


# What Inductor fuses best is the reference: its dequantisation is pointwise and ends in one plain matmul.
int4_matmul.implementation("decomposed")(int4_matmul.reference)
