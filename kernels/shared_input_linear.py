"""Linear layers that read the same input: y_i = x W_iᵀ + b_i for q, k and v, or gate and up, in one launch.

Bytes for few rows: every weight once; FLOPs: 2 · M · N · K. A decode step reads each weight once, so what remains to be
gained beyond bandwidth are the gaps between launches and the tails of small grids: k and v alone do not fill a GPU. The
weights stay where they are: the kernel takes a pointer to each, nothing is merged or copied. The RMSNorm before them,
if they alone read it, takes no launch of its own.

One row is a matrix-vector product without tensor cores; up to 64 rows are one tile of them. `gated_linear` computes the
same outputs of both layers in one program and ends in the gated activation: gate and up never reach memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _small_matmul, _triton, gated_mlp, rms_norm
from fxopt.kernels._small_matmul import TILE_ROWS as TILE_ROWS
from fxopt.kernels._small_matmul import constants, flat, guess, launch, pays, product, rows_of, served
from fxopt.kernels._triton import CompileExample, after_launch, jit, tl
from fxopt.kernels.gated_mlp import activate, gated_activation
from fxopt.ops import Config, Target, fused_op

_SOURCES = [_triton.__file__, _small_matmul.__file__, gated_mlp.__file__, rms_norm.__file__]
_NORM = "Tensor? norm_weight=None, Scalar? eps=None, Scalar weight_offset=0.0, ScalarType? round_to=None"


def _normed(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float | None, offset: float, round_to: Any
) -> Tensor:
    return x if eps is None else rms_norm.rms_norm.reference(x, norm_weight, eps, offset, round_to, weight.dtype)


@fused_op(
    f"linear_pair(Tensor x, Tensor w0, Tensor w1, Tensor? b0=None, Tensor? b1=None, {_NORM}, int most_rows=0)"
    " -> (Tensor, Tensor)",
    sources=_SOURCES,
    contiguous=True,
)
def linear_pair(
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    b0: Tensor | None = None,
    b1: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    most_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Two linear layers of `x` [..., K] with weights [N_i, K] and biases [N_i].

    With `eps`, x is RMS-normed first: `norm_weight`, `eps`, `weight_offset` and `round_to` are those of `rms_norm`, and
    its result has the weights' dtype. `most_rows` is the number of rows up to which the kernel is to be used,
    0: where it is believed to pay.
    """
    x = _normed(x, w0, norm_weight, eps, weight_offset, round_to)
    return F.linear(x, w0, b0), F.linear(x, w1, b1)


@fused_op(
    "linear_triple(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor? b0=None, Tensor? b1=None, Tensor? b2=None,"
    f" {_NORM}, int most_rows=0) -> (Tensor, Tensor, Tensor)",
    sources=_SOURCES,
    contiguous=True,
)
def linear_triple(
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    b0: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    most_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three linear layers of `x`; see `linear_pair`."""
    x = _normed(x, w0, norm_weight, eps, weight_offset, round_to)
    return F.linear(x, w0, b0), F.linear(x, w1, b1), F.linear(x, w2, b2)


@fused_op(
    "gated_linear(Tensor x, Tensor gate, Tensor up, str activation, Tensor? gate_bias=None, Tensor? up_bias=None,"
    f" {_NORM}, int most_rows=0) -> Tensor",
    sources=_SOURCES,
    contiguous=True,
)
def gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    round_to: torch.dtype | None = None,
    most_rows: int = 0,
) -> Tensor:
    """act(x Gᵀ) * (x Uᵀ) with weights [N, K] both; `activation` and its errors are those of `gated_activation`.

    The norm before them is that of `linear_pair`.
    """
    x = _normed(x, gate, norm_weight, eps, weight_offset, round_to)
    return gated_activation.reference(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), activation)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


@linear_pair.fake
def _(x: Tensor, w0: Tensor, w1: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty(x, w0), _empty(x, w1)


@linear_triple.fake
def _(x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, w0), _empty(x, w1), _empty(x, w2)


@gated_linear.fake
def _(x: Tensor, gate: Tensor, up: Tensor, activation: str, *rest: Any) -> Tensor:
    return _empty(x, gate)


def _objection(target: Target, x: Tensor, weights: Sequence[Tensor], rest: Sequence[Any]) -> str | None:
    """Why the kernel can't serve these arguments, or None."""
    if any(isinstance(t, Tensor) and t.dtype != x.dtype for t in rest):
        return "the Triton kernel takes operands of one dtype"
    return _small_matmul.objection(target, x, tuple(weights), rest[-4] is not None)


def _of_pair(target: Target, x: Tensor, w0: Tensor, w1: Tensor, *rest: Any) -> str | None:
    return _objection(target, x, (w0, w1), rest)


def _of_triple(target: Target, x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> str | None:
    return _objection(target, x, (w0, w1, w2), rest)


def _of_gated(target: Target, x: Tensor, gate: Tensor, up: Tensor, activation: str, *rest: Any) -> str | None:
    return _objection(target, x, (gate, up), rest)


def _configs(x: Tensor, *weights: Any) -> Iterable[Config]:
    """What is worth a measurement: no cutting of columns, for there are several layers to fill a GPU."""
    wide = sum(w.shape[0] for w in weights if isinstance(w, Tensor) and w.dim() == 2)
    return _small_matmul.configs(rows_of(x), wide, x.shape[-1], split=False)


@jit
def _biased(total, b, output, n, biased):  # type: ignore[no-untyped-def]
    return total + tl.load(b + output, mask=(output < n) & (biased > 0), other=0.0).to(tl.float32)[None, :]


@jit
def _gated_linear_kernel(  # type: ignore[no-untyped-def]
    x, norm, w0, w1, b0, b1, y, rows, n, k, x_row, s0, s1, eps, offset,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    DOT: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program: both layers' products, one after the other, and the activation in registers."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    after_launch(PDL)
    gate = product(
        x, w0, norm, rows, n, k, 0, k, x_row, s0, output, eps, offset,
        NORM, WEIGHTED, DOT, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    up = product(
        x, w1, norm, rows, n, k, 0, k, x_row, s1, output, eps, offset,
        NORM, WEIGHTED, DOT, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    kind: tl.constexpr = y.dtype.element_ty
    gate = _biased(gate, b0, output, n, BIAS0).to(kind).to(tl.float32)  # as the layers round them
    up = _biased(up, b1, output, n, BIAS1).to(kind).to(tl.float32)
    row = tl.arange(0, BLOCK_M)
    result = activate(gate, ACTIVATION).to(kind).to(tl.float32) * up
    live = (row < rows)[:, None] & (output < n)[None, :]
    tl.store(y + row[:, None] * n + output[None, :], result.to(kind), mask=live)


@jit
def _shared_linear_kernel(  # type: ignore[no-untyped-def]
    x, norm, w0, w1, w2, b0, b1, b2, y0, y1, y2, rows, n0, n1, n2, k, x_row, s0, s1, s2, blocks0, blocks1, eps, offset,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr,
    DOT: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one of the layers a program, for all rows. Which layer is decided once, before the loop."""
    block = tl.program_id(0)
    w, b, y, n, stride, biased = w0, b0, y0, n0, s0, BIAS0
    if block >= blocks0 + blocks1:
        block -= blocks0 + blocks1
        w, b, y, n, stride, biased = w2, b2, y2, n2, s2, BIAS2
    elif block >= blocks0:
        block -= blocks0
        w, b, y, n, stride, biased = w1, b1, y1, n1, s1, BIAS1
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    after_launch(PDL)
    total = product(
        x, w, norm, rows, n, k, 0, k, x_row, stride, output, eps, offset,
        NORM, WEIGHTED, DOT, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    total = _biased(total, b, output, n, biased)
    row = tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (output < n)[None, :]
    tl.store(y + row[:, None] * n + output[None, :], total.to(y.dtype.element_ty), mask=live)


def _norm_arguments(x: Tensor, norm: Sequence[Any]) -> tuple[Tensor, dict[str, Any]]:
    """The pointer to the norm's weight, and the rest of what the kernels take."""
    weight, eps, offset, _ = norm
    values = {"eps": float(eps or 0.0), "offset": float(offset)}
    return x if weight is None else weight.contiguous(), values | {
        "NORM": eps is not None,
        "WEIGHTED": weight is not None,
    }


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Sequence[Any],
    config: Config | None,
) -> list[Tensor]:
    source = flat(x)
    rows, k = source.shape
    wide = sum(w.shape[0] for w in weights)
    chosen = dict(config or guess(rows, wide, k, x.dtype.itemsize, split=False))
    values = constants(rows, chosen)
    outs = [x.new_empty((rows, w.shape[0])) for w in weights]
    blocks = [_triton.ceil_div(w.shape[0], values["BLOCK_N"]) for w in weights]
    spare = [0] * (3 - len(weights))  # a pair has no third layer
    padded = [*weights, *(weights[0] for _ in spare)]
    terms = [w if b is None else b.contiguous() for b, w in zip([*biases, *(None for _ in spare)], padded, strict=True)]
    factor, normed = _norm_arguments(source, norm)
    _shared_linear_kernel[(sum(blocks),)](
        source, factor, *padded, *terms, *outs, *(outs[0] for _ in spare), rows, *(w.shape[0] for w in weights), *spare,
        k, source.stride(0), *(w.stride(0) for w in padded), blocks[0], blocks[1], **normed,
        **{f"BIAS{i}": int(i < len(biases) and biases[i] is not None) for i in range(3)},
        **values, num_warps=chosen["num_warps"], **launch(source, sum(blocks), rows),
    )  # fmt: skip
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


@linear_pair.implementation("triton", opaque=True, when=_of_pair, pays=pays, configs=_configs)
def _(x: Tensor, w0: Tensor, w1: Tensor, *rest: Any, config: Config | None = None) -> tuple[Tensor, Tensor]:
    if not served(x, rest[-4] is not None):
        return linear_pair.reference(x, w0, w1, *rest)
    first, second = _launch(x, (w0, w1), rest[:2], rest[2:6], config)
    return first, second


@linear_triple.implementation("triton", opaque=True, when=_of_triple, pays=pays, configs=_configs)
def _(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, *rest: Any, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if not served(x, rest[-4] is not None):
        return linear_triple.reference(x, w0, w1, w2, *rest)
    first, second, third = _launch(x, (w0, w1, w2), rest[:3], rest[3:7], config)
    return first, second, third


@gated_linear.implementation("triton", opaque=True, when=_of_gated, pays=pays, configs=_configs)
def _(x: Tensor, gate: Tensor, up: Tensor, activation: str, *rest: Any, config: Config | None = None) -> Tensor:
    if not served(x, rest[-4] is not None):
        return gated_linear.reference(x, gate, up, activation, *rest)
    source = flat(x)
    rows, k = source.shape
    chosen = dict(config or guess(rows, 2 * gate.shape[0], k, x.dtype.itemsize, split=False))
    values = constants(rows, chosen)
    out = x.new_empty((rows, gate.shape[0]))
    factor, normed = _norm_arguments(source, rest[2:6])
    terms = [w if b is None else b.contiguous() for b, w in zip(rest[:2], (gate, up), strict=True)]
    blocks = _triton.ceil_div(gate.shape[0], values["BLOCK_N"])
    _gated_linear_kernel[(blocks,)](
        source, factor, gate, up, *terms, out, rows, gate.shape[0], k, source.stride(0), gate.stride(0), up.stride(0),
        **normed, BIAS0=int(rest[0] is not None), BIAS1=int(rest[1] is not None), ACTIVATION=activation,
        **values, num_warps=chosen["num_warps"], **launch(source, blocks, rows),
    )  # fmt: skip
    return out.view(*x.shape[:-1], gate.shape[0])


# Separate matmuls, as the model has them: for many rows nothing is to be gained.
linear_pair.implementation("decomposed")(linear_pair.reference)
linear_triple.implementation("decomposed")(linear_triple.reference)
gated_linear.implementation("decomposed")(gated_linear.reference)


def _example(name: str, dtype: str, rows: int, norm: bool = False, pdl: int = 0, **config: int) -> CompileExample:
    names = ("x", "norm", "w0", "w1", "w2", "b0", "b1", "b2", "y0", "y1", "y2")
    signature = dict.fromkeys(names, f"*{dtype}") | {"rows": "i32", "eps": "fp32", "offset": "fp32"}
    signature |= dict.fromkeys(("n0", "n1", "n2", "k", "x_row", "s0", "s1", "s2"), "i32:16")
    signature |= dict.fromkeys(("blocks0", "blocks1"), "i32")
    chosen = guess(rows, 4096, 4096, 4 if dtype == "fp32" else 2, split=False) | config
    values = {"BIAS0": 1, "BIAS1": 0, "BIAS2": 1, "NORM": norm, "WEIGHTED": norm, "PDL": pdl}
    values |= constants(rows, chosen)
    return CompileExample(
        name, _shared_linear_kernel, signature, values, chosen["num_warps"], capability=90 if pdl else 80
    )


def _gated_example(name: str, dtype: str, rows: int, pdl: int = 0, **config: int) -> CompileExample:
    signature = dict.fromkeys(("x", "norm", "w0", "w1", "b0", "b1", "y"), f"*{dtype}") | {"rows": "i32"}
    signature |= dict.fromkeys(("n", "k", "x_row", "s0", "s1"), "i32:16") | {"eps": "fp32", "offset": "fp32"}
    chosen = guess(rows, 4096, 4096, 4 if dtype == "fp32" else 2, split=False) | config
    ends = {"BIAS0": 0, "BIAS1": 0, "ACTIVATION": "silu", "NORM": rows == 1, "WEIGHTED": rows == 1, "PDL": pdl}
    return CompileExample(
        name, _gated_linear_kernel, signature, ends | constants(rows, chosen), chosen["num_warps"],
        capability=90 if pdl else 80,
    )  # fmt: skip


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("one row", "bf16", 1), _example("one row, normed", "bf16", 1, norm=True, STAGES=3),
        _example("one row, launched early", "bf16", 1, norm=True, pdl=2),
        _example("16 rows", "bf16", 16),
        _example("64 rows", "fp16", 64, BLOCK_N=64, BLOCK_K=64, SWAP=1), _example("4 rows in float32", "fp32", 4),
        _gated_example("gated, one row", "bf16", 1), _gated_example("gated, 64 rows", "bf16", 64),
        _gated_example("gated, 16 rows, launched early", "bf16", 16, pdl=1),
        _gated_example("gated, 8 rows, the weight on the left", "bf16", 8, BLOCK_N=64, SWAP=1),
    )
)  # fmt: skip
