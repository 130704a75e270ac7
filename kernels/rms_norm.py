"""RMSNorm: y = x / sqrt(mean(x²) + eps) · (offset + w), over the last dimension; with a residual added first if wanted.

Bytes: x once in, y once out (the residual once more in, the sum once more out). FLOPs: 4 an element, so bandwidth is
the limit everywhere. Spelled out in eager mode the same takes 6 to 8 passes over memory.

Models differ in where they round (Zhang and Sennrich, arXiv:1910.07467, leave it open), and each order is kept:

    Llama, T5   w * n.to(bf16)               round_to=bf16
    OLMo        (w.float() * n).to(bf16)     out_dtype=bf16
    Gemma       ((1 + w.float()) * n).to(bf16)   weight_offset=1, out_dtype=bf16
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, row_start, summed, tl
from fxopt.ops import Config, Target, fused_op


@fused_op(
    "rms_norm(Tensor x, Tensor? weight, Scalar eps, Scalar weight_offset=0.0, ScalarType? round_to=None,"
    " ScalarType? out_dtype=None) -> Tensor",
    sources=[_triton.__file__],
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm over the last dimension of `x` [..., n] with `weight` [n].

    The norm is computed in float32 (float64 for float64), rounded to `round_to` if given, multiplied by
    `weight_offset + weight` and cast to `out_dtype` if given. Without `round_to` the weight takes part in float32.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_to is not None:
        normed = normed.to(round_to)
    if weight is not None:
        factor = weight.to(compute) if round_to is None else weight
        normed = normed * (factor + weight_offset if weight_offset != 0.0 else factor)
    return normed if out_dtype is None else normed.to(out_dtype)


@fused_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Scalar eps, Scalar weight_offset=0.0,"
    " ScalarType? round_to=None, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    sources=[_triton.__file__],
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the sum is rounded to its own dtype before it is normed."""
    total = x + residual
    return rms_norm.reference(total, weight, eps, weight_offset, round_to, out_dtype), total


def _result_dtype(
    x: torch.dtype, weight: Tensor | None, round_to: torch.dtype | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    compute = torch.float64 if x == torch.float64 else torch.float32
    if round_to is None:
        return compute
    return round_to if weight is None else torch.promote_types(round_to, weight.dtype)


@rms_norm.fake
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=_result_dtype(x.dtype, weight, round_to, out_dtype))


@add_rms_norm.fake
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.empty_like(total, dtype=_result_dtype(total.dtype, weight, round_to, out_dtype)), total


def _aten_objection(
    target: Target,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_to: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> str | None:
    """F.rms_norm computes in float32 and rounds once, at the end, to x's dtype; its result is contiguous."""
    if target.compiled:
        return "Inductor fuses the decomposed form with its neighbours"
    if not x.is_contiguous():
        return "F.rms_norm would change the strides of x"
    if weight_offset != 0.0:
        return "F.rms_norm has no weight offset"
    if weight is not None and (weight.dtype != x.dtype or weight.dim() != 1):
        return "F.rms_norm needs a 1-D weight in x's dtype"
    if _result_dtype(x.dtype, weight, round_to, out_dtype) != x.dtype:
        return "F.rms_norm returns x's dtype"
    if round_to is not None and x.dtype not in (torch.float32, torch.float64) and weight is not None:
        return "F.rms_norm doesn't round before the weight is applied"
    return None


@rms_norm.implementation("aten", when=_aten_objection)
def _(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_to: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _triton_objection(target: Target, x: Tensor, *rest: object) -> str | None:
    others = [t for t in rest if isinstance(t, Tensor)]
    return _triton.needs_gpu(target) or _triton.norm_objection(x, *others)


@jit
def _weighted(  # type: ignore[no-untyped-def]
    normed, factor, offset,
    HAS_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, ROUND_TO: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """What is normed, rounded and times the weight."""
    if ROUND_TO is not None:
        normed = normed.to(ROUND_TO).to(tl.float32)
    if HAS_WEIGHT:
        if HAS_OFFSET:
            shifted = factor.to(tl.float32) + offset
            factor = shifted if ROUND_TO is None else shifted.to(factor.dtype)
        normed = (normed * factor.to(tl.float32)).to(PRODUCT)
    return normed


@jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, out, total,
    rows, columns, eps, offset,
    x_inner, x_outer, x_step, r_inner, r_outer, r_step,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROUND_TO: tl.constexpr, PRODUCT: tl.constexpr, LOOPED: tl.constexpr, FOLDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, float32 throughout; a row longer than BLOCK is read twice (the second time from L2).

    Of a shorter one the weight is asked for before the sum of squares, which would wait for memory a second time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x += row_start(row, x_inner, x_outer, x_step, FOLDED)
    if HAS_RESIDUAL:
        residual += row_start(row, r_inner, r_outer, r_step, FOLDED)
    live = (row < rows) & (column < columns)
    wide = summed(x + column, residual + column, total, live, HAS_RESIDUAL)
    factor = wide
    if not LOOPED:
        if HAS_WEIGHT:
            factor = tl.load(weight + column, mask=column < columns, other=0.0)
        if HAS_RESIDUAL:
            tl.store(total + row * columns + column, wide.to(total.dtype.element_ty), mask=live)
    squares = tl.sum(wide * wide, 1)[:, None]
    if LOOPED:
        for start in range(BLOCK, columns, BLOCK):
            live = (row < rows) & (start + column < columns)
            wide = summed(x + start + column, residual + start + column, total, live, HAS_RESIDUAL)
            squares += tl.sum(wide * wide, 1)[:, None]
    scale = tl.rsqrt(squares / tl.cast(columns, tl.float32) + eps)
    if LOOPED:
        for start in range(0, columns, BLOCK):
            at = start + column
            live = (row < rows) & (at < columns)
            wide = summed(x + at, residual + at, total, live, HAS_RESIDUAL)
            if HAS_RESIDUAL:
                tl.store(total + row * columns + at, wide.to(total.dtype.element_ty), mask=live)
            factors = 1.0
            if HAS_WEIGHT:
                factors = tl.load(weight + at, mask=at < columns, other=0.0)
            normed = _weighted(wide * scale, factors, offset, HAS_WEIGHT, HAS_OFFSET, ROUND_TO, PRODUCT)
            tl.store(out + row * columns + at, normed.to(out.dtype.element_ty), mask=live)
    else:
        normed = _weighted(wide * scale, factor, offset, HAS_WEIGHT, HAS_OFFSET, ROUND_TO, PRODUCT)
        tl.store(out + row * columns + column, normed.to(out.dtype.element_ty), mask=live)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    round_to: torch.dtype | None,
    out_dtype: torch.dtype | None,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(normed, sum or x), contiguous."""
    total = x
    if residual is not None:
        x, residual = torch.broadcast_tensors(x, residual)
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    out = x.new_empty(x.shape, dtype=_result_dtype(total.dtype, weight, round_to, out_dtype))
    if out.numel() == 0:
        return out, total
    product = torch.float32 if round_to is None else _result_dtype(total.dtype, weight, round_to, None)
    columns = x.shape[-1]
    rows = out.numel() // columns
    block, rows_each, warps = _triton.norm_blocks(columns)
    if config:
        block, rows_each, warps = config["BLOCK"], config["ROWS"], config["num_warps"]
    x, *x_fold = _triton.as_rows(x)
    summand, *r_fold = _triton.as_rows(x if residual is None else residual)
    _rms_norm_kernel[(_triton.ceil_div(rows, rows_each),)](
        x, summand, x if weight is None else weight.contiguous(), out, total,
        rows, columns, eps, weight_offset, *x_fold, *r_fold,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_OFFSET=weight_offset != 0.0,
        ROUND_TO=None if round_to is None else _triton.triton_dtype(round_to),
        PRODUCT=_triton.triton_dtype(product),
        LOOPED=block < columns, FOLDED=_triton.folded(rows, x_fold[0], r_fold[0]),
        ROWS=rows_each, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, total


def _configs(x: Tensor, *_: Any) -> Iterable[Config]:
    """Whole rows with more or fewer threads, and rows in parts (read twice, the second time from L2)."""
    whole = _triton.next_power_of_2(x.shape[-1])
    for block in sorted({min(whole, 16384), min(whole, 2048)}):
        rows = max(1, 2048 // block)
        for warps in (2, 4, 8, 16, 32):
            if 4 <= block * rows // (32 * warps) <= 64:  # elements a thread
                yield {"BLOCK": block, "ROWS": rows, "num_warps": warps}


@rms_norm.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses, configs=_configs)
def _(x: Tensor, *rest: Any, config: Config | None = None) -> Tensor:
    return _launch(x, None, *rest, config=config)[0]


@add_rms_norm.implementation(
    "triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses, configs=_configs
)
def _(x: Tensor, residual: Tensor, *rest: Any, config: Config | None = None) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, *rest, config=config)


# The reference is already what Inductor fuses best: one reduction and one pointwise tail, each cast free in registers.
rms_norm.implementation("decomposed")(rms_norm.reference)
add_rms_norm.implementation("decomposed")(add_rms_norm.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    pointers = dict.fromkeys(("x", "residual", "weight", "out", "total"), f"*{dtype}")
    numbers = {"rows": "i32", "columns": "i32:16", "eps": "fp32", "offset": "fp32"}
    strides = dict.fromkeys(("x_inner", "x_outer", "x_step", "r_inner", "r_outer", "r_step"), "i32:16")
    flags = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_OFFSET": False, "LOOPED": False, "FOLDED": False}
    values = {**flags, "ROWS": 1, **constexprs}
    return CompileExample(name, _rms_norm_kernel, {**pointers, **numbers, **strides}, values, num_warps=8)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("Llama, 4096", "bf16", ROUND_TO=tl.bfloat16, PRODUCT=tl.bfloat16, BLOCK=4096),
        _example("Gemma, heads of 128", "fp16", ROUND_TO=None, PRODUCT=tl.float32, HAS_OFFSET=True, ROWS=16, BLOCK=128),
        _example("looped", "fp32", ROUND_TO=None, PRODUCT=tl.float32, LOOPED=True, FOLDED=True, BLOCK=8192),
        _example("looped, rounded", "bf16", ROUND_TO=tl.bfloat16, PRODUCT=tl.bfloat16, LOOPED=True, BLOCK=2048),
    )
)  # fmt: skip
