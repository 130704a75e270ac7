"""Gated activation: y = act(gate) · up, elementwise: what stands between the matmuls of a gated MLP.

GLU and its relatives (Shazeer, arXiv:2002.05202). Bytes: gate and up once in, y once out; FLOPs: 5 to 20 an element, so
bandwidth is the limit. Spelled out in eager mode silu writes its result and reads it back.

The activation is computed in `compute` (gate's dtype, if none is given), rounded to `round_to` if given, and multiplied
by up under PyTorch's type promotion; the product is rounded to `out_dtype` if given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, row_start, tl
from fxopt.ops import Target, fused_op

#: activations by name
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


@fused_op(
    "gated_activation(Tensor gate, Tensor up, str activation, ScalarType? compute=None, ScalarType? round_to=None,"
    " ScalarType? out_dtype=None) -> Tensor",
    sources=[_triton.__file__],
)
def gated_activation(
    gate: Tensor,
    up: Tensor,
    activation: str,
    compute: torch.dtype | None = None,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """act(gate) * up for `gate` and `up` of one shape; `activation` is one of `ACTIVATIONS`.

    Raises ValueError for an activation of another name.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    active = ACTIVATIONS[activation](gate if compute is None else gate.to(compute))
    product = (active if round_to is None else active.to(round_to)) * up
    return product if out_dtype is None else product.to(out_dtype)


def _result_dtype(
    gate: Tensor,
    up: Tensor,
    compute: torch.dtype | None,
    round_to: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    return out_dtype or torch.promote_types(round_to or compute or gate.dtype, up.dtype)


@gated_activation.fake
def _(
    gate: Tensor,
    up: Tensor,
    activation: str,
    compute: torch.dtype | None = None,
    round_to: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(gate * up, dtype=_result_dtype(gate, up, compute, round_to, out_dtype))


def _triton_objection(target: Target, gate: Tensor, up: Tensor, *rest: object) -> str | None:
    if objection := _triton.needs_gpu(target) or _triton.norm_objection(gate, up):
        return objection
    if any(dtype == torch.float64 for dtype in rest):
        return "the Triton kernel computes in float32"
    return None


@jit
def activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of that name, of float32 numbers."""
    if ACTIVATION == "silu":
        active = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u), without overflow
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        active = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        active = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "relu2":
        active = tl.where(x < 0, 0.0, x * x)
    else:
        active = tl.sigmoid(x)
    return active


@jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, rows, columns,
    g_inner, g_outer, g_step, u_inner, u_outer, u_step,
    ACTIVATION: tl.constexpr, ROUND_TO: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and BLOCK columns a program, in float32 throughout."""
    tiles = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (column < columns)
    g = tl.load(gate + row_start(row, g_inner, g_outer, g_step, FOLDED) + column, mask=live, other=0.0)
    u = tl.load(up + row_start(row, u_inner, u_outer, u_step, FOLDED) + column, mask=live, other=0.0)
    active = activate(g.to(tl.float32), ACTIVATION)
    if ROUND_TO is not None:
        active = active.to(ROUND_TO).to(tl.float32)
    product = active * u.to(tl.float32)
    tl.store(out + row * columns + column, product.to(out.dtype.element_ty), mask=live)


@gated_activation.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(
    gate: Tensor,
    up: Tensor,
    activation: str,
    compute: torch.dtype | None,
    round_to: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    out = gate.new_empty(gate.shape, dtype=_result_dtype(gate, up, compute, round_to, out_dtype))
    if out.numel() == 0:
        return out
    if gate.is_contiguous() and up.is_contiguous() and gate.numel() < 1 << 31:
        gate, up = gate.flatten(), up.flatten()  # one row, whose tiles have no end but its own
    columns = gate.shape[-1]
    rows = out.numel() // columns
    block = min(_triton.next_power_of_2(columns), 1024)
    rows_each = max(1, 1024 // block)
    gate, *g_fold = _triton.as_rows(gate)
    up, *u_fold = _triton.as_rows(up)
    _gated_kernel[(_triton.ceil_div(rows, rows_each) * _triton.ceil_div(columns, block),)](
        gate, up, out, rows, columns, *g_fold, *u_fold,
        ACTIVATION=activation, ROUND_TO=None if round_to is None else _triton.triton_dtype(round_to),
        FOLDED=_triton.folded(rows, g_fold[0], u_fold[0]), ROWS=rows_each, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


# The reference is what Inductor fuses best: it is elementwise, and goes into the loop of what reads it.
gated_activation.implementation("decomposed")(gated_activation.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    pointers = dict.fromkeys(("gate", "up", "out"), f"*{dtype}")
    numbers = dict.fromkeys(("rows",), "i32") | {"columns": "i32:16"}
    strides = dict.fromkeys(("g_inner", "g_outer", "g_step", "u_inner", "u_outer", "u_step"), "i32:16")
    values = {"ROUND_TO": None, "FOLDED": False, **constexprs}
    return CompileExample(name, _gated_kernel, {**pointers, **numbers, **strides}, values)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("silu", "bf16", ACTIVATION="silu", ROUND_TO=tl.bfloat16, ROWS=1, BLOCK=1024),
        _example("gelu", "fp16", ACTIVATION="gelu", ROWS=1, BLOCK=1024),
        _example("gelu_tanh, short rows", "fp32", ACTIVATION="gelu_tanh", FOLDED=True, ROWS=8, BLOCK=128),
        _example("relu2", "bf16", ACTIVATION="relu2", ROWS=1, BLOCK=1024),
    )
)  # fmt: skip
