"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) · w + b, over the last dimensions; with a residual added first
if wanted.

Bytes: x once in, y once out (the residual once more in, the sum once more out). FLOPs: 8 an element, so bandwidth is
the limit everywhere. The variance is the biased one (Ba, Kiros and Hinton, arXiv:1607.06450). It is computed from
differences to the mean, never as E[x²] - E[x]², which loses every digit where |mean| is large beside the deviation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, row_start, summed, tl
from fxopt.ops import Target, fused_op


@fused_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Scalar eps, int dims=1, ScalarType? out_dtype=None) -> Tensor",
    sources=[_triton.__file__],
)
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm over the last `dims` dimensions of `x`; `weight` and `bias` have their shape.

    Computed in at least float32, rounded to x's dtype, then cast to `out_dtype` if given. A weight or bias wider than
    `x` takes part in its own dtype. The result is contiguous.
    """
    parts = [t.dtype for t in (weight, bias) if t is not None]
    compute = x.dtype
    for dtype in parts:
        compute = torch.promote_types(compute, dtype)
    y = F.layer_norm(
        x.to(compute),
        x.shape[x.dim() - dims :],
        None if weight is None else weight.to(compute),
        None if bias is None else bias.to(compute),
        eps,
    ).to(x.dtype)
    return y if out_dtype is None else y.to(out_dtype)


@fused_op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Scalar eps, int dims=1,"
    " ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    sources=[_triton.__file__],
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual): the sum is rounded to its own dtype before it is normed."""
    total = x + residual
    return layer_norm.reference(total, weight, bias, eps, dims, out_dtype), total


@layer_norm.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=torch.contiguous_format)


@add_layer_norm.fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int = 1,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.empty_like(total, dtype=out_dtype or total.dtype, memory_format=torch.contiguous_format), total


def _triton_objection(target: Target, x: Tensor, *rest: object) -> str | None:
    others = [t for t in rest if isinstance(t, Tensor)]
    return _triton.needs_gpu(target) or _triton.norm_objection(x, *others)


@jit
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, out, total,
    rows, columns, eps,
    x_inner, x_outer, x_step, r_inner, r_outer, r_step,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LOOPED: tl.constexpr,
    FOLDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, float32 throughout; a row longer than BLOCK is read twice (the second time from L2).

    Of a shorter one weight and bias are asked for before the mean: they would wait for memory a second time. The
    moments of a longer row's blocks are merged pairwise (Chan, Golub and LeVeque, 1979).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x += row_start(row, x_inner, x_outer, x_step, FOLDED)
    if HAS_RESIDUAL:
        residual += row_start(row, r_inner, r_outer, r_step, FOLDED)
    live = (row < rows) & (column < columns)
    wide = summed(x + column, residual + column, total, live, HAS_RESIDUAL)
    factor = 1.0
    shift = 0.0
    if not LOOPED:
        if HAS_WEIGHT:
            factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        if HAS_BIAS:
            shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            tl.store(total + row * columns + column, wide.to(total.dtype.element_ty), mask=live)
    count = tl.minimum(tl.cast(columns, tl.float32), BLOCK)
    mean = tl.sum(wide, 1)[:, None] / count
    away = tl.where(live, wide - mean, 0.0)
    squares = tl.sum(away * away, 1)[:, None]
    if LOOPED:
        for start in range(BLOCK, columns, BLOCK):
            live = (row < rows) & (start + column < columns)
            wide = summed(x + start + column, residual + start + column, total, live, HAS_RESIDUAL)
            more = tl.minimum(tl.cast(columns - start, tl.float32), BLOCK)
            block_mean = tl.sum(wide, 1)[:, None] / more
            away = tl.where(live, wide - block_mean, 0.0)
            apart = block_mean - mean
            squares += tl.sum(away * away, 1)[:, None] + apart * apart * (count * more / (count + more))
            mean += apart * (more / (count + more))
            count += more
    scale = tl.rsqrt(squares / tl.cast(columns, tl.float32) + eps)
    # The result is rounded to the sum's dtype first; without a residual, `total` is x.
    if LOOPED:
        for start in range(0, columns, BLOCK):
            at = start + column
            live = (row < rows) & (at < columns)
            wide = summed(x + at, residual + at, total, live, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(total + row * columns + at, wide.to(total.dtype.element_ty), mask=live)
            y = (wide - mean) * scale
            if HAS_WEIGHT:
                y *= tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
            if HAS_BIAS:
                y += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
            y = y.to(total.dtype.element_ty)
            tl.store(out + row * columns + at, y.to(out.dtype.element_ty), mask=live)
    else:
        y = (wide - mean) * scale
        if HAS_WEIGHT:
            y *= factor
        if HAS_BIAS:
            y += shift
        y = y.to(total.dtype.element_ty)
        tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=live)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(normed, sum or x), contiguous."""
    total = x
    if residual is not None:
        x, residual = torch.broadcast_tensors(x, residual)
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    out = x.new_empty(x.shape, dtype=out_dtype or total.dtype)
    if out.numel() == 0:
        return out, total
    columns = math.prod(x.shape[x.dim() - dims :])
    rows = out.numel() // columns
    block, rows_each, warps = _triton.norm_blocks(columns)
    x, *x_fold = _triton.as_rows(x.flatten(-dims))
    summand, *r_fold = _triton.as_rows(x if residual is None else residual.flatten(-dims))
    _layer_norm_kernel[(_triton.ceil_div(rows, rows_each),)](
        x, summand, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), out, total,
        rows, columns, eps, *x_fold, *r_fold,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        LOOPED=block < columns, FOLDED=_triton.folded(rows, x_fold[0], r_fold[0]),
        ROWS=rows_each, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, total


@layer_norm.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(x: Tensor, *rest: Any) -> Tensor:
    return _launch(x, None, *rest)[0]


@add_layer_norm.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, *rest)


# Inductor decomposes aten.layer_norm by itself; op by op it is the best there is on a CPU.
layer_norm.implementation("aten")(layer_norm.reference)
add_layer_norm.implementation("aten")(add_layer_norm.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    pointers = dict.fromkeys(("x", "residual", "weight", "bias", "out", "total"), f"*{dtype}")
    numbers = {"rows": "i32", "columns": "i32:16", "eps": "fp32"}
    strides = dict.fromkeys(("x_inner", "x_outer", "x_step", "r_inner", "r_outer", "r_step"), "i32:16")
    values = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True, "LOOPED": False, "FOLDED": False, "ROWS": 1}
    values |= constexprs
    return CompileExample(name, _layer_norm_kernel, {**pointers, **numbers, **strides}, values, num_warps=8)


COMPILE_EXAMPLES = (
    _example("1024", "bf16", ROWS=2, BLOCK=1024),
    _example("no residual, 4096", "fp16", HAS_RESIDUAL=False, BLOCK=4096),
    _example("looped", "fp32", LOOPED=True, FOLDED=True, BLOCK=8192),
    _example("looped, no residual", "bf16", HAS_RESIDUAL=False, LOOPED=True, BLOCK=2048),
)
