"""GroupNorm: each group of channels of a sample normalised by its own mean and variance; SiLU after it if wanted.

    y = act((x − mean) / √(var + eps) · w + b)

(Wu and He, arXiv:1803.08494; diffusion models put a SiLU behind nearly every one.) Bytes: x once in, y once out, x once
more where a group does not fit into registers; FLOPs: 8 an element, so bandwidth is the limit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, tl
from fxopt.ops import Target, fused_op


@fused_op(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, Scalar eps, bool silu=False) -> Tensor",
    sources=[_triton.__file__],
    contiguous=True,
)
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = False
) -> Tensor:
    """GroupNorm of `x` [N, C, ...] in `groups` groups of channels, `weight` and `bias` [C]; then silu if wanted."""
    normed = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(normed) if silu else normed


@group_norm.fake
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def _triton_objection(
    target: Target, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *_: object
) -> str | None:
    others = [t for t in (weight, bias) if t is not None]
    return _triton.needs_gpu(target) or _triton.norm_objection(x, *others)


@jit
def _group_norm_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, groups, channels, pixels, size, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group of a sample a program: `size` consecutive elements, `pixels` of them in each of its `channels` channels.

    Welford's sums a block at a time (Chan, Golub and LeVeque's merge): the mean of large values costs no digits.
    """
    group = tl.program_id(0).to(tl.int64)
    first = (group % groups) * channels
    x += group * size
    out += group * size
    count, mean, squares = 0.0, 0.0, 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < size
        wide = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        here = tl.minimum(size - start, BLOCK).to(tl.float32)
        average = tl.sum(wide, 0) / here
        apart = tl.where(live, wide - average, 0.0)
        total = count + here
        delta = average - mean
        squares += tl.sum(apart * apart, 0) + delta * delta * (count * here / total)
        mean += delta * (here / total)
        count = total
    scale = tl.rsqrt(squares / count + eps)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < size
        normed = (tl.load(x + at, mask=live, other=0.0).to(tl.float32) - mean) * scale
        channel = first + at // pixels
        if HAS_WEIGHT:
            normed *= tl.load(weight + channel, mask=live, other=0.0).to(tl.float32)
        if HAS_BIAS:
            normed += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)
        if SILU:
            normed = normed.to(out.dtype.element_ty).to(tl.float32)
            normed = normed * tl.sigmoid(normed)
        tl.store(out + at, normed.to(out.dtype.element_ty), mask=live)


@group_norm.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    samples, channels = x.shape[0], x.shape[1] // groups
    size = out.numel() // (samples * groups)
    block = min(_triton.next_power_of_2(size), 4096)
    _group_norm_kernel[(samples * groups,)](
        x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), out,
        groups, channels, size // channels, size, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SILU=silu, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


# Inductor decomposes aten.group_norm into a reduction and a pointwise tail, and fuses the activation into that.
group_norm.implementation("decomposed")(group_norm.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    signature = dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
    signature |= dict.fromkeys(("groups", "channels", "pixels"), "i32") | {"size": "i32:16", "eps": "fp32"}
    return CompileExample(name, _group_norm_kernel, signature, constexprs, num_warps=8)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("affine, SiLU", "bf16", HAS_WEIGHT=True, HAS_BIAS=True, SILU=True, BLOCK=4096),
        _example("plain", "fp32", HAS_WEIGHT=False, HAS_BIAS=False, SILU=False, BLOCK=1024),
    )
)  # fmt: skip
