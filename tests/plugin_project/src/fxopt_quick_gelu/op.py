"""quick_gelu(x, slope) = x * sigmoid(slope * x), elementwise.

Bytes: x once in, the result once out. The reference below is the test oracle, the fallback and (by its autograd) the
backward; add faster ways with `@quick_gelu.implementation(...)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt import fused_op


@fused_op("quick_gelu(Tensor x, float slope) -> Tensor")
def quick_gelu(x: Tensor, slope: float) -> Tensor:
    """x * sigmoid(slope * x), in the dtype of x (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return x * torch.sigmoid(slope * x)


@quick_gelu.fake
def _(x: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


quick_gelu.implementation("decomposed")(quick_gelu.reference)  # pointwise: Inductor fuses it with its neighbours
