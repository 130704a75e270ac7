"""RMSNorm: y = x / sqrt(mean(x²) + eps) · (offset + w), over the last dimension; with a residual added first if wanted.

Bytes: x once in, y once out (the residual once more in, the sum once more out). FLOPs: 4 an element, so bandwidth is
the limit everywhere. Spelled out in eager mode the same takes 6 to 8 passes over memory.

Models differ in where they round (Zhang and Sennrich, arXiv:1910.07467, leave it open), and each order is kept:

    Llama, T5   w * n.to(bf16)               round_to=bf16
    OLMo        (w.float() * n).to(bf16)     out_dtype=bf16
    Gemma       ((1 + w.float()) * n).to(bf16)   weight_offset=1, out_dtype=bf16
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.ops import Target, fused_op


@fused_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset=0.0, ScalarType? round_to=None,"
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
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset=0.0,"
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


# The reference is already what Inductor fuses best: one reduction and one pointwise tail, each cast free in registers.
rms_norm.implementation("decomposed")(rms_norm.reference)
add_rms_norm.implementation("decomposed")(add_rms_norm.reference)
