"""Linear layers that read the same input: y_i = x W_iᵀ + b_i for q, k and v, or gate and up, in one launch.

Bytes for few rows: every weight once; FLOPs: 2 · M · N · K. A decode step reads each weight once, so what remains to be
gained beyond bandwidth are the gaps between launches and the tails of small grids: k and v alone do not fill a GPU. The
weights stay where they are: the kernel takes a pointer to each, nothing is merged or copied.

One row is a matrix-vector product without tensor cores; up to 64 rows are one tile of them. `gated_linear` computes the
same outputs of both layers in one program and ends in the gated activation: gate and up never reach memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.symbols import hint, is_static
from fxopt.kernels import _triton, gated_mlp
from fxopt.kernels._triton import CompileExample, jit, tl
from fxopt.kernels.gated_mlp import activate, gated_activation
from fxopt.ops import Target, fused_op

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: rows that one tile of the kernel holds
TILE_ROWS = 64


@fused_op(
    "linear_pair(Tensor x, Tensor w0, Tensor w1, Tensor? b0=None, Tensor? b1=None, int most_rows=0)"
    " -> (Tensor, Tensor)",
    sources=[_triton.__file__, gated_mlp.__file__],
    contiguous=True,
)
def linear_pair(
    x: Tensor, w0: Tensor, w1: Tensor, b0: Tensor | None = None, b1: Tensor | None = None, most_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Two linear layers of `x` [..., K] with weights [N_i, K] and biases [N_i].

    `most_rows` is the number of rows up to which the kernel may be used (and no more than `TILE_ROWS`).
    """
    return F.linear(x, w0, b0), F.linear(x, w1, b1)


@fused_op(
    "linear_triple(Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor? b0=None, Tensor? b1=None, Tensor? b2=None,"
    " int most_rows=0) -> (Tensor, Tensor, Tensor)",
    sources=[_triton.__file__, gated_mlp.__file__],
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
    most_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three linear layers of `x`; see `linear_pair`."""
    return F.linear(x, w0, b0), F.linear(x, w1, b1), F.linear(x, w2, b2)


@fused_op(
    "gated_linear(Tensor x, Tensor gate, Tensor up, str activation, Tensor? gate_bias=None, Tensor? up_bias=None,"
    " int most_rows=0) -> Tensor",
    sources=[_triton.__file__, gated_mlp.__file__],
    contiguous=True,
)
def gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    most_rows: int = 0,
) -> Tensor:
    """act(x Gᵀ) * (x Uᵀ) with weights [N, K] both; `activation` and its errors are those of `gated_activation`."""
    return gated_activation.reference(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), activation)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@linear_pair.fake
def _(
    x: Tensor, w0: Tensor, w1: Tensor, b0: Tensor | None = None, b1: Tensor | None = None, most_rows: int = 0
) -> tuple[Tensor, Tensor]:
    return _empty(x, w0), _empty(x, w1)


@linear_triple.fake
def _(
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    b0: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    most_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, w0), _empty(x, w1), _empty(x, w2)


@gated_linear.fake
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    most_rows: int = 0,
) -> Tensor:
    return _empty(x, gate)


def _objection(target: Target, x: Tensor, weights: Sequence[Tensor], most_rows: int) -> str | None:
    """Why the kernel doesn't serve these arguments, or None."""
    rows = hint(x.numel() // x.shape[-1])
    if rows > min(most_rows, TILE_ROWS):
        return f"one launch for all is used up to {min(most_rows, TILE_ROWS)} rows; there are {rows}"
    if objection := _triton.needs_gpu(target):
        return objection
    if x.dtype not in _DTYPES or any(w.dtype != x.dtype for w in weights):
        return f"the Triton kernel takes one dtype of {', '.join(map(str, _DTYPES))}"
    if not all(is_static(size) for w in weights for size in w.shape):
        return "the Triton kernel is specialised on the weights' shapes, which are dynamic here"
    if any(w.stride(-1) != 1 for w in weights):
        return "the Triton kernel reads weights row by row, and these are transposed in memory"
    return None


def _pair_objection(target: Target, x: Tensor, w0: Tensor, w1: Tensor, *rest: Any) -> str | None:
    return _objection(target, x, (w0, w1), rest[-1])


def _triple_objection(target: Target, x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> str | None:
    return _objection(target, x, (w0, w1, w2), rest[-1])


def _gated_objection(target: Target, x: Tensor, gate: Tensor, up: Tensor, *rest: Any) -> str | None:
    return _objection(target, x, (gate, up), rest[-1])


@jit
def _product(  # type: ignore[no-untyped-def]
    x, w, b, rows, n, k, x_row, stride, output, biased,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All rows of x times BLOCK_N rows of w, in float32, the bias added."""
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    weight = w + output.to(tl.int64)[:, None] * stride + inner[None, :]
    if DOT:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        source = x + row[:, None] * x_row + inner[None, :]
        for start in range(0, k, BLOCK_K):
            inside = start + inner < k
            part = tl.load(weight + start, mask=(output < n)[:, None] & inside[None, :], other=0.0)
            given = tl.load(source + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            total = tl.dot(given, tl.trans(part), total, input_precision="ieee")
    else:
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, k, BLOCK_K):
            inside = start + inner < k
            part = tl.load(weight + start, mask=(output < n)[:, None] & inside[None, :], other=0.0)
            given = tl.load(x + start + inner, mask=inside, other=0.0)
            products += part.to(tl.float32) * given.to(tl.float32)[None, :]
        total = tl.sum(products, 1)[None, :]
    bias = tl.load(b + output, mask=(output < n) & (biased > 0), other=0.0).to(tl.float32)
    return total + bias[None, :]


@jit
def _gated_linear_kernel(  # type: ignore[no-untyped-def]
    x, w0, w1, b0, b1, y, rows, n, k, x_row, s0, s1,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, ACTIVATION: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs a program: both layers' products, one after the other, and the activation in registers."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = _product(x, w0, b0, rows, n, k, x_row, s0, output, BIAS0, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
    up = _product(x, w1, b1, rows, n, k, x_row, s1, output, BIAS1, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
    kind: tl.constexpr = y.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)  # as the layers round them
    row = tl.arange(0, BLOCK_M)
    result = activate(gate, ACTIVATION) * up
    live = (row < rows)[:, None] & (output < n)[None, :]
    tl.store(y + row[:, None] * n + output[None, :], result.to(kind), mask=live)


@jit
def _shared_linear_kernel(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, b0, b1, b2, y0, y1, y2, rows, n0, n1, n2, k, x_row, s0, s1, s2, blocks0, blocks1,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
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
    total = _product(x, w, b, rows, n, k, x_row, stride, output, biased, DOT, BLOCK_M, BLOCK_N, BLOCK_K)
    row = tl.arange(0, BLOCK_M)
    live = (row < rows)[:, None] & (output < n)[None, :]
    tl.store(y + row[:, None] * n + output[None, :], total.to(y.dtype.element_ty), mask=live)


def _flat(x: Tensor) -> Tensor:
    """The rows of `x`, their elements side by side."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _blocks(rows: int, k: int) -> dict[str, Any]:
    """The kernels' constants for so many rows."""
    if rows == 1:
        return {"DOT": False, "BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": min(512, max(16, _triton.next_power_of_2(k)))}
    return {"DOT": True, "BLOCK_M": max(16, _triton.next_power_of_2(rows)), "BLOCK_N": 32, "BLOCK_K": 128}


def _launch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    flat = _flat(x)
    rows, k = flat.shape
    if rows > TILE_ROWS or not rows:  # a dynamic number of rows can be anything
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    outs = [x.new_empty((rows, w.shape[0])) for w in weights]
    values = _blocks(rows, k)
    blocks = [_triton.ceil_div(w.shape[0], values["BLOCK_N"]) for w in weights]
    spare = [0] * (3 - len(weights))  # a pair has no third layer
    padded = [*weights, *(weights[0] for _ in spare)]
    terms = [b if b is not None else w for b, w in zip([*biases, *(None for _ in spare)], padded, strict=True)]
    _shared_linear_kernel[(sum(blocks),)](
        flat, *padded, *terms, *outs, *(outs[0] for _ in spare), rows, *(w.shape[0] for w in weights), *spare,
        k, flat.stride(0), *(w.stride(0) for w in padded), blocks[0], blocks[1],
        *(int(b is not None) for b in biases), *spare, **values, num_warps=4,
    )  # fmt: skip
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


@linear_pair.implementation("triton", opaque=True, when=_pair_objection)
def _(x: Tensor, w0: Tensor, w1: Tensor, b0: Tensor | None, b1: Tensor | None, most_rows: int) -> tuple[Tensor, Tensor]:
    first, second = _launch(x, (w0, w1), (b0, b1))
    return first, second


@linear_triple.implementation("triton", opaque=True, when=_triple_objection)
def _(
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    b0: Tensor | None,
    b1: Tensor | None,
    b2: Tensor | None,
    most_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = _launch(x, (w0, w1, w2), (b0, b1, b2))
    return first, second, third


@gated_linear.implementation("triton", opaque=True, when=_gated_objection)
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    most_rows: int,
) -> Tensor:
    flat = _flat(x)
    rows, k = flat.shape
    if rows > TILE_ROWS or not rows:  # a dynamic number of rows can be anything
        return gated_linear.reference(x, gate, up, activation, gate_bias, up_bias)
    out = x.new_empty((rows, gate.shape[0]))
    values = _blocks(rows, k)
    terms = [b if b is not None else w for b, w in ((gate_bias, gate), (up_bias, up))]
    _gated_linear_kernel[(_triton.ceil_div(gate.shape[0], values["BLOCK_N"]),)](
        flat, gate, up, *terms, out, rows, gate.shape[0], k, flat.stride(0), gate.stride(0), up.stride(0),
        int(gate_bias is not None), int(up_bias is not None), activation, **values, num_warps=4,
    )  # fmt: skip
    return out.view(*x.shape[:-1], gate.shape[0])


# Separate matmuls, as the model has them: for many rows nothing is to be gained.
linear_pair.implementation("decomposed")(linear_pair.reference)
linear_triple.implementation("decomposed")(linear_triple.reference)
gated_linear.implementation("decomposed")(gated_linear.reference)


def _example(name: str, dtype: str, rows: int) -> CompileExample:
    names = ("x", "w0", "w1", "w2", "b0", "b1", "b2", "y0", "y1", "y2")
    signature = dict.fromkeys(names, f"*{dtype}") | {"rows": "i32"}
    signature |= dict.fromkeys(("n0", "n1", "n2", "k", "x_row", "s0", "s1", "s2"), "i32:16")
    signature |= dict.fromkeys(("blocks0", "blocks1"), "i32")
    values = {"BIAS0": 1, "BIAS1": 0, "BIAS2": 1, **_blocks(rows, 4096)}
    return CompileExample(name, _shared_linear_kernel, signature, values, num_warps=4)


def _gated_example(name: str, dtype: str, rows: int) -> CompileExample:
    signature = dict.fromkeys(("x", "w0", "w1", "b0", "b1", "y"), f"*{dtype}") | {"rows": "i32"}
    signature |= dict.fromkeys(("n", "k", "x_row", "s0", "s1"), "i32:16")
    values = {"BIAS0": 0, "BIAS1": 0, "ACTIVATION": "silu", **_blocks(rows, 4096)}
    return CompileExample(name, _gated_linear_kernel, signature, values, num_warps=4)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("one row", "bf16", 1), _example("16 rows", "bf16", 16),
        _example("64 rows", "fp16", 64), _example("4 rows in float32", "fp32", 4),
        _gated_example("gated, one row", "bf16", 1), _gated_example("gated, 64 rows", "bf16", 64),
    )
)  # fmt: skip
