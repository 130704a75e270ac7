"""L2 norm: x divided by its Euclidean length over one dimension, with the four places where models put eps.

    max      x / max(‖x‖, eps)        F.normalize
    outside  x / (‖x‖ + eps)
    sum      x / √(Σ x² + eps)        gated delta nets
    floor    x / √max(Σ x², eps)

Bytes: x once in, y once out; FLOPs: 3 an element, so bandwidth is the limit. F.normalize computes in x's dtype, and
what training keeps of it is as narrow; where a model casts to float32 first, `compute` says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, row_start, tl
from fxopt.ops import Target, fused_op

EPS_IN = ("max", "outside", "sum", "floor")


@fused_op(
    "l2_norm(Tensor x, int dim, Scalar eps, str eps_in, ScalarType? compute=None, ScalarType? out_dtype=None)"
    " -> Tensor",
    sources=[_triton.__file__],
)
def l2_norm(
    x: Tensor,
    dim: int,
    eps: float,
    eps_in: str,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x` divided by its length over `dim`; `eps_in` is one of `EPS_IN`.

    Computed in `compute` (x's dtype, if none is given) and rounded to `out_dtype` if given. Raises ValueError for
    another `eps_in`.
    """
    if eps_in not in EPS_IN:
        raise ValueError(f"eps_in is {eps_in!r}; there are {', '.join(map(repr, EPS_IN))}")
    wide = x if compute is None else x.to(compute)
    if eps_in == "max":
        result = wide / torch.linalg.vector_norm(wide, 2, dim, True).clamp_min(eps)
    elif eps_in == "outside":
        length = torch.linalg.vector_norm(wide, 2, dim, True)
        result = wide / (length + eps if eps else length)
    elif eps_in == "sum":
        result = wide * torch.rsqrt(wide.square().sum(dim, True) + eps)
    else:
        result = wide / torch.sqrt(wide.square().sum(dim, True).clamp_min(eps))
    return result if out_dtype is None else result.to(out_dtype)


@l2_norm.fake
def _(
    x: Tensor,
    dim: int,
    eps: float,
    eps_in: str,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype or compute)


def _triton_objection(target: Target, x: Tensor, dim: int, *rest: object) -> str | None:
    if torch.float64 in rest:
        return "the Triton kernel computes in float32"
    if dim not in (-1, x.dim() - 1):
        return "the Triton kernel normalises the last dimension"
    return _triton.needs_gpu(target) or _triton.norm_objection(x)


@jit
def _l2_norm_kernel(  # type: ignore[no-untyped-def]
    x, out, rows, columns, eps, x_inner, x_outer, x_step,
    EPS_IN: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, float32 throughout; a row longer than BLOCK is read twice (the second time from L2)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x += row_start(row, x_inner, x_outer, x_step, FOLDED)
    squares = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, columns, BLOCK):
        live = (row < rows) & (start + column < columns)
        wide = tl.load(x + start + column, mask=live, other=0.0).to(tl.float32)
        squares += tl.sum(wide * wide, 1)[:, None]
    if EPS_IN == "max":
        length = tl.maximum(tl.sqrt(squares), eps)
    elif EPS_IN == "outside":
        length = tl.sqrt(squares) + eps
    elif EPS_IN == "sum":
        length = tl.sqrt(squares + eps)
    else:
        length = tl.sqrt(tl.maximum(squares, eps))
    for start in range(0, columns, BLOCK):
        live = (row < rows) & (start + column < columns)
        wide = tl.load(x + start + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out + row * columns + start + column, (wide / length).to(out.dtype.element_ty), mask=live)


@l2_norm.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(
    x: Tensor, dim: int, eps: float, eps_in: str, compute: torch.dtype | None, out_dtype: torch.dtype | None
) -> Tensor:
    out = x.new_empty(x.shape, dtype=out_dtype or compute or x.dtype)
    if out.numel() == 0:
        return out
    columns = x.shape[-1]
    rows = out.numel() // columns
    block, rows_each, warps = _triton.norm_blocks(columns)
    x, *fold = _triton.as_rows(x)
    _l2_norm_kernel[(_triton.ceil_div(rows, rows_each),)](
        x, out, rows, columns, eps, *fold, EPS_IN=eps_in, FOLDED=_triton.folded(rows, fold[0]), ROWS=rows_each,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


# One reduction and one pointwise tail: Inductor fuses both with their neighbours.
l2_norm.implementation("decomposed")(l2_norm.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    signature = {"x": f"*{dtype}", "out": f"*{dtype}", "rows": "i32", "columns": "i32:16", "eps": "fp32"}
    signature |= dict.fromkeys(("x_inner", "x_outer", "x_step"), "i32:16")
    return CompileExample(name, _l2_norm_kernel, signature, constexprs, num_warps=4)


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("F.normalize, heads of 128", "bf16", EPS_IN="max", FOLDED=True, ROWS=16, BLOCK=128),
        _example("sum", "fp32", EPS_IN="sum", FOLDED=False, ROWS=1, BLOCK=4096),
    )
)  # fmt: skip
