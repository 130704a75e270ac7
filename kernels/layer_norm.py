"""LayerNorm: y = (x - mean(x)) / sqrt(var(x) + eps) · w + b, over the last dimensions; with a residual added first
if wanted.

Bytes: x once in, y once out (the residual once more in, the sum once more out). FLOPs: 8 an element, so bandwidth is
the limit everywhere. The variance is the biased one (Ba, Kiros and Hinton, arXiv:1607.06450). It is computed from
differences to the mean, never as E[x²] - E[x]², which loses every digit where |mean| is large beside the deviation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.ops import fused_op


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


# Inductor decomposes aten.layer_norm by itself; op by op it is the fastest there is on a CPU.
layer_norm.implementation("aten")(layer_norm.reference)
add_layer_norm.implementation("aten")(add_layer_norm.reference)
