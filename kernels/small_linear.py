"""A linear layer of few rows with what stands around it: y = act(norm(x) Wᵀ + b) + r, in one launch.

Bytes: the weight once, 2 · N · K in bfloat16; FLOPs: 2 · M · N · K. A decode step reads each weight once and is bound
by that; what remains to be gained are launches, the gaps between them, and the tails of small grids. The RMSNorm before
the layer, its bias, an activation and the residual add after it take no launch of their own here.

Where N is small and there are several rows, the columns are cut into SPLIT parts whose sums are added by a second
kernel, in a fixed order: results don't depend on which program finishes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _small_matmul, _triton, gated_mlp, rms_norm
from fxopt.kernels._small_matmul import TILE_ROWS as TILE_ROWS
from fxopt.kernels._small_matmul import constants, flat, guess, launch, pays, product, rows_of, served
from fxopt.kernels._triton import CompileExample, after_launch, jit, tl
from fxopt.kernels.gated_mlp import ACTIVATIONS, activate
from fxopt.ops import Config, Target, fused_op


@fused_op(
    "small_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str? activation=None,"
    " Tensor? norm_weight=None, Scalar? eps=None, Scalar weight_offset=0.0, ScalarType? round_to=None,"
    " int most_rows=0) -> Tensor",
    sources=[_triton.__file__, _small_matmul.__file__, gated_mlp.__file__, rms_norm.__file__],
    contiguous=True,
)
def small_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    most_rows: int = 0,
) -> Tensor:
    """act(norm(x) Wᵀ + b) + r for `x` [..., K], `weight` [N, K], `bias` [N] and `residual` [..., N].

    With `eps`, x is RMS-normed first: `norm_weight`, `eps`, `weight_offset` and `round_to` are those of `rms_norm`, and
    the result has the weight's dtype. `activation` is one of `ACTIVATIONS` or None. `most_rows` is the number of rows
    up to which the kernel is to be used, 0: where it is believed to pay. Raises ValueError for an activation of another
    name.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if eps is not None:
        x = rms_norm.rms_norm.reference(x, norm_weight, eps, weight_offset, round_to, weight.dtype)
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


@small_linear.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any) -> Tensor:
    y = weight.new_empty((*x.shape[:-1], weight.shape[0]))
    return y if residual is None else torch.empty_like(y + residual, memory_format=torch.contiguous_format)


def _objection(target: Target, x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    bias, residual, _, norm_weight, eps, *_ = rest
    if any(t is not None and t.dtype != x.dtype for t in (bias, residual, norm_weight)):
        return "the Triton kernel takes operands of one dtype"
    if residual is not None and residual.dim() != x.dim():
        return "the Triton kernel takes a residual of the result's shape"
    return _small_matmul.objection(target, x, (weight,), eps is not None)


def _configs(x: Tensor, weight: Tensor, *rest: Any) -> Iterable[Config]:
    n, k = weight.shape
    return _small_matmul.configs(rows_of(x), n, k)


@jit
def _ended(  # type: ignore[no-untyped-def]
    total, b, r, y, row, output, live, n, r_row,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of a tile, each rounded as the model's own ops round."""
    kind: tl.constexpr = y.dtype.element_ty
    if BIAS:
        total += tl.load(b + output, mask=output < n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        total = activate(total.to(kind).to(tl.float32), ACTIVATION)
    if RESIDUAL:
        added = tl.load(r + row[:, None] * r_row + output[None, :], mask=live, other=0.0).to(tl.float32)
        total = total.to(kind).to(tl.float32) + added
    tl.store(y + row[:, None] * n + output[None, :], total.to(kind), mask=live)


@jit
def _small_linear_kernel(  # type: ignore[no-untyped-def]
    x, norm, w, b, r, y, sums, rows, n, k, span, x_row, stride, r_row, eps, offset,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, DOT: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all rows a program, or its share of their sums: columns `span` * part and on."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first = part * span
    after_launch(PDL)
    total = product(
        x, w, norm, rows, n, k, first, min(first + span, k), x_row, stride, output, eps, offset,
        NORM, WEIGHTED, DOT, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (output < n)[None, :]
    if SPLIT == 1:
        _ended(total, b, r, y, row, output, live, n, r_row, BIAS, ACTIVATION, RESIDUAL)
    else:
        tl.store(sums + (part * rows + row[:, None]) * n + output[None, :], total, mask=live)


@jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    sums, b, r, y, rows, n, r_row,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts' sums added in order, and what ends the layer."""
    after_launch(PDL)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (output < n)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + (part * rows + row[:, None]) * n + output[None, :], mask=live, other=0.0)
    _ended(total, b, r, y, row, output, live, n, r_row, BIAS, ACTIVATION, RESIDUAL)


@small_linear.implementation("triton", opaque=True, when=_objection, pays=pays, configs=_configs)
def _(x: Tensor, weight: Tensor, *rest: Any, config: Config | None = None) -> Tensor:
    bias, residual, activation, norm_weight, eps, weight_offset, _, _ = rest
    shape = (*x.shape[:-1], weight.shape[0])
    rows, (n, k) = x.numel() // max(x.shape[-1], 1), weight.shape
    if not n or not served(x, eps is not None):
        return small_linear.reference(x, weight, *rest)
    x = flat(x)
    added = x if residual is None else flat(residual.expand(shape))
    chosen = dict(config or guess(rows, n, k, x.dtype.itemsize))
    values, split = constants(rows, chosen), chosen["SPLIT"] if rows > 1 else 1  # the norm is of the row as a whole
    y = x.new_empty((rows, n))
    sums = y if split == 1 else x.new_empty((split, rows, n), dtype=torch.float32)
    span = _triton.ceil_div(_triton.ceil_div(k, split), values["BLOCK_K"]) * values["BLOCK_K"]
    ends = {"BIAS": bias is not None, "ACTIVATION": activation or "", "RESIDUAL": residual is not None}
    b = weight if bias is None else bias.contiguous()
    norm = weight if norm_weight is None else norm_weight.contiguous()
    blocks = _triton.ceil_div(n, values["BLOCK_N"])
    _small_linear_kernel[(blocks, split)](
        x, norm, weight, b, added, y, sums, rows, n, k, span, x.stride(0), weight.stride(0), added.stride(0),
        float(eps or 0.0), float(weight_offset), NORM=eps is not None, WEIGHTED=norm_weight is not None, **ends,
        SPLIT=split, **values, num_warps=chosen["num_warps"], **launch(x, blocks * split, rows),
    )  # fmt: skip
    if split > 1:
        _sum_kernel[(_triton.ceil_div(n, 64),)](
            sums, b, added, y, rows, n, added.stride(0), **ends, SPLIT=split, BLOCK_M=values["BLOCK_M"], BLOCK_N=64,
            **launch(x, _triton.ceil_div(n, 64), rows),
        )  # fmt: skip
    return y.view(shape)


# A matmul and what Inductor fuses around it, as the model has them: for many rows nothing is to be gained.
small_linear.implementation("decomposed")(small_linear.reference)


def _example(name: str, dtype: str, rows: int, pdl: int = 0, **config: int) -> CompileExample:
    signature = dict.fromkeys(("x", "norm", "w", "b", "r", "y"), f"*{dtype}") | {"rows": "i32", "sums": "*fp32"}
    signature |= dict.fromkeys(("n", "k", "span", "x_row", "stride", "r_row"), "i32:16")
    signature |= {"eps": "fp32", "offset": "fp32"}
    chosen = guess(rows, 4096, 4096, 4 if dtype == "fp32" else 2) | config
    ends = {"NORM": rows == 1, "WEIGHTED": rows == 1, "BIAS": True, "ACTIVATION": "silu", "RESIDUAL": True}
    values = {**ends, "SPLIT": chosen["SPLIT"], **constants(rows, chosen), "PDL": pdl}
    return CompileExample(
        name, _small_linear_kernel, signature, values, chosen["num_warps"], capability=90 if pdl else 80
    )


def _sum_example() -> CompileExample:
    signature = {"sums": "*fp32", **dict.fromkeys(("b", "r", "y"), "*bf16"), "rows": "i32", "n": "i32:16"}
    ends = {"BIAS": True, "ACTIVATION": "", "RESIDUAL": True}
    values = {**ends, "SPLIT": 4, "BLOCK_M": 64, "BLOCK_N": 64, "PDL": 0}
    return CompileExample("sum of 4 parts", _sum_kernel, signature | {"r_row": "i32:16"}, values)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("one row", "bf16", 1), _example("one row, launched early", "bf16", 1, pdl=2),
        _example("one row, 16 outputs", "fp16", 1, BLOCK_N=16, BLOCK_K=256, STAGES=3),
        _example("16 rows", "bf16", 16, BLOCK_N=16, BLOCK_K=256, STAGES=5),
        _example("8 rows, the weight on the left", "bf16", 8, BLOCK_N=64, SWAP=1, STAGES=5),
        _example("64 rows in parts", "fp16", 64, BLOCK_N=64, BLOCK_K=64, SPLIT=4, SWAP=1, STAGES=5),
        _example("4 rows in float32", "fp32", 4), _sum_example(),
    )
)  # fmt: skip
