"""Rotary position embedding: pairs of lanes of q and k are turned by an angle that depends on the position.

    a' = a · cos − b · sin
    b' = b · cos + a · sin

(Su et al., arXiv:2104.09864.) Which lanes make a pair differs: (i, i + n/2) in Llama and GPT-NeoX, "halves";
(2i, 2i + 1) in GPT-J, "interleaved"; DeepSeek reads the latter and writes the former. Bytes: q and k once in and out,
and the tables, which all heads share; FLOPs: 3 an element, so bandwidth is the limit.

The rotation is computed in `compute` (x's dtype, if none is given) under type promotion with the tables; lanes that are
not rotated are passed through in that dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.graph.symbols import is_static
from fxopt.kernels import _triton
from fxopt.kernels._triton import CompileExample, jit, tl
from fxopt.ops import Target, fused_op

#: how lanes are paired: where a pair's lanes are read, and where they are written
PAIRS = {
    "halves": ("halves", "halves"),
    "interleaved": ("interleaved", "interleaved"),
    "interleaved to halves": ("interleaved", "halves"),
}


@fused_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, str pairs='halves', bool half_tables=False, bool last=False,"
    " bool inverse=False, ScalarType? compute=None, ScalarType? out_dtype=None) -> Tensor",
    sources=[_triton.__file__],
    contiguous=True,
)
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: str = "halves",
    half_tables: bool = False,
    last: bool = False,
    inverse: bool = False,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the first n lanes of `x` [..., d] (the last n if `last`) by tables that broadcast to [..., n].

    `pairs` is one of `PAIRS`. Tables hold a number for each lane of the result, or with `half_tables` one for each pair
    ([..., n/2]). `inverse` turns the other way. Raises ValueError for another `pairs`.
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs is {pairs!r}; there are {', '.join(map(repr, PAIRS))}")
    wide = x if compute is None else x.to(compute)
    width = cos.shape[-1] * (2 if half_tables else 1)
    start = wide.shape[-1] - width if last else 0
    part = wide.narrow(-1, start, width)
    read, written = PAIRS[pairs]
    a, b = _parted(part, read)
    sin = -sin if inverse else sin
    if half_tables:
        rotated = _joined(a * cos - b * sin, b * cos + a * sin, written)
    else:
        straight = part if read == written else _joined(a, b, written)
        rotated = straight * cos + _joined(-b, a, written) * sin
    if width != x.shape[-1]:  # lanes are static wherever a fusion makes the op
        rest = wide.narrow(-1, 0 if last else width, x.shape[-1] - width)
        rotated = torch.cat((rest, rotated) if last else (rotated, rest), -1)
    return rotated if out_dtype is None else rotated.to(out_dtype)


@fused_op(
    "rotary_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, str pairs='halves', bool half_tables=False,"
    " bool last=False, bool inverse=False, ScalarType? compute=None, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
    sources=[_triton.__file__],
    contiguous=True,
)
def rotary_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: str = "halves",
    half_tables: bool = False,
    last: bool = False,
    inverse: bool = False,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(rotary(q), rotary(k)) with the same tables, which broadcast to both."""
    rest = (cos, sin, pairs, half_tables, last, inverse, compute, out_dtype)
    return rotary.reference(q, *rest), rotary.reference(k, *rest)


def _parted(x: Tensor, how: str) -> tuple[Tensor, Tensor]:
    if how == "halves":
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., ::2], x[..., 1::2]


def _joined(a: Tensor, b: Tensor, how: str) -> Tensor:
    return torch.cat((a, b), -1) if how == "halves" else torch.stack((a, b), -1).flatten(-2)


def _result_dtype(
    x: Tensor, cos: Tensor, sin: Tensor, compute: torch.dtype | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    if out_dtype is not None:
        return out_dtype
    return torch.promote_types(compute or x.dtype, torch.promote_types(cos.dtype, sin.dtype))


@rotary.fake
def _(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: str = "halves",
    half_tables: bool = False,
    last: bool = False,
    inverse: bool = False,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=_result_dtype(x, cos, sin, compute, out_dtype))


@rotary_pair.fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: str = "halves",
    half_tables: bool = False,
    last: bool = False,
    inverse: bool = False,
    compute: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    return (
        q.new_empty(q.shape, dtype=_result_dtype(q, cos, sin, compute, out_dtype)),
        k.new_empty(k.shape, dtype=_result_dtype(k, cos, sin, compute, out_dtype)),
    )


def _triton_objection(target: Target, x: Tensor, *rest: object) -> str | None:
    if objection := _triton.needs_gpu(target):
        return objection
    tensors = [x, *(t for t in rest if isinstance(t, Tensor))]
    if any(t.dtype not in (torch.float32, torch.bfloat16, torch.float16) for t in tensors) or torch.float64 in rest:
        return "the Triton kernel computes in float32"
    if any(t.dim() > 4 for t in tensors):
        return "the Triton kernel takes up to three dimensions before the lanes"
    if not all(is_static(t.shape[-1]) for t in tensors):
        return "the Triton kernel is specialised on the number of lanes, which is dynamic here"
    return None


@jit
def _pairs(  # type: ignore[no-untyped-def]
    x, stride, live, other, HALVES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Both lanes of each pair of WIDTH lanes from `x` on, float32 [ROWS, BLOCK]: two halves, or side by side."""
    pair = tl.arange(0, BLOCK)[None, :]
    if HALVES:
        first = tl.load(x + pair * stride, mask=live & (pair < WIDTH // 2), other=other).to(tl.float32)
        second = tl.load(x + (pair + WIDTH // 2) * stride, mask=live & (pair < WIDTH // 2), other=other).to(tl.float32)
    else:
        lane = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(x + lane * stride, mask=live & (lane < WIDTH), other=other).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    return first, second


@jit
def _table(  # type: ignore[no-untyped-def]
    x, stride, live, other,
    HALVES: tl.constexpr, HALF_TABLES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A table's numbers for both lanes of each pair."""
    if HALF_TABLES:
        pair = tl.arange(0, BLOCK)[None, :]
        first = tl.load(x + pair * stride, mask=live & (pair < WIDTH // 2), other=other).to(tl.float32)
        second = first
    else:
        first, second = _pairs(x, stride, live, other, HALVES, WIDTH, ROWS, BLOCK)
    return first, second


@jit
def _rotate(  # type: ignore[no-untyped-def]
    block, x, out, cos, sin, rows, n1, n2,
    x0, x1, x2, x_lane, c0, c1, c2, c_lane, s0, s1, s2, s_lane, sign,
    LANES: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, READ_HALVES: tl.constexpr,
    WRITE_HALVES: tl.constexpr, HALF_TABLES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """ROWS rows, of each BLOCK pairs, both lanes at a time; the other lanes (REST holds them) are copied.

    With WIDE rows are numbered in 64 bits, in which a division takes several times as long.
    """
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    if WIDE:
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    live = row < rows
    i0, i1, i2 = (row // (n1 * n2)).to(tl.int64), (row // n2 % n1).to(tl.int64), (row % n2).to(tl.int64)
    x += i0 * x0 + i1 * x1 + i2 * x2
    out += row.to(tl.int64) * LANES
    a, b = _pairs(x + START * x_lane, x_lane, live, 0.0, READ_HALVES, WIDTH, ROWS, BLOCK)
    cos += i0 * c0 + i1 * c1 + i2 * c2
    sin += i0 * s0 + i1 * s1 + i2 * s2
    c_a, c_b = _table(cos, c_lane, live, 1.0, WRITE_HALVES, HALF_TABLES, WIDTH, ROWS, BLOCK)
    s_a, s_b = _table(sin, s_lane, live, 0.0, WRITE_HALVES, HALF_TABLES, WIDTH, ROWS, BLOCK)
    first = (a * c_a - b * (s_a * sign)).to(out.dtype.element_ty)
    second = (b * c_b + a * (s_b * sign)).to(out.dtype.element_ty)
    if WRITE_HALVES:
        pair = tl.arange(0, BLOCK)[None, :]
        tl.store(out + START + pair, first, mask=live & (pair < WIDTH // 2))
        tl.store(out + START + WIDTH // 2 + pair, second, mask=live & (pair < WIDTH // 2))
    else:
        lane = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(first, second), (ROWS, 2 * BLOCK))
        tl.store(out + START + lane, both, mask=live & (lane < WIDTH))
    if WIDTH != LANES:
        lane = tl.arange(0, REST)[None, :] + (0 if START else WIDTH)
        there = live & (lane < (START if START else LANES))
        copied = tl.load(x + lane * x_lane, mask=there, other=0.0)
        tl.store(out + lane, copied.to(out.dtype.element_ty), mask=there)


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, q_out, q_rows, q_n1, q_n2, q0, q1, q2, q_lane, qc0, qc1, qc2, qs0, qs1, qs2,
    k, k_out, k_rows, k_n1, k_n2, k0, k1, k2, k_lane, kc0, kc1, kc2, ks0, ks1, ks2,
    cos, sin, c_lane, s_lane, sign, q_blocks,
    LANES: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, READ_HALVES: tl.constexpr,
    WRITE_HALVES: tl.constexpr, HALF_TABLES: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """The first `q_blocks` programs rotate q, the others k: one launch for both."""
    block = tl.program_id(0)
    if block < q_blocks:
        _rotate(
            block, q, q_out, cos, sin, q_rows, q_n1, q_n2,
            q0, q1, q2, q_lane, qc0, qc1, qc2, c_lane, qs0, qs1, qs2, s_lane, sign,
            LANES, WIDTH, START, READ_HALVES, WRITE_HALVES, HALF_TABLES, WIDE, ROWS, BLOCK, REST,
        )  # fmt: skip
    else:
        _rotate(
            block - q_blocks, k, k_out, cos, sin, k_rows, k_n1, k_n2,
            k0, k1, k2, k_lane, kc0, kc1, kc2, c_lane, ks0, ks1, ks2, s_lane, sign,
            LANES, WIDTH, START, READ_HALVES, WRITE_HALVES, HALF_TABLES, WIDE, ROWS, BLOCK, REST,
        )  # fmt: skip


def _strides(t: Tensor, like: Tensor) -> tuple[int, ...]:
    """The strides of the three dimensions before the lanes, 0 where `t` is broadcast to `like`."""
    wide = t.expand(*like.shape[:-1], t.shape[-1])
    return (*(0,) * (4 - wide.dim()), *wide.stride()[:-1])


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """(rows, n1, n2): the rows of `x`, the last two of its three leading dimensions."""
    leading = (*(1,) * (4 - x.dim()), *x.shape[:-1])
    return leading[0] * leading[1] * leading[2], leading[1], leading[2]


def _launch(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    pairs: str,
    half_tables: bool,
    last: bool,
    inverse: bool,
    compute: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    given = [q] if k is None else [q, k]
    outs = [x.new_empty(x.shape, dtype=_result_dtype(x, cos, sin, compute, out_dtype)) for x in given]
    lanes, width = q.shape[-1], cos.shape[-1] * (2 if half_tables else 1)
    block, rest = _triton.next_power_of_2(width // 2), _triton.next_power_of_2(lanes - width)
    rows = max(1, 1024 // block)
    described: list[Any] = []
    blocks = []
    for x, out in zip(given, outs, strict=True):
        blocks.append(_triton.ceil_div(_sizes(x)[0], rows))
        described += [x, out, *_sizes(x), *_strides(x, x), x.stride(-1), *_strides(cos, x), *_strides(sin, x)]
    if k is None:
        described += described
    if sum(blocks) == 0 or lanes == 0:
        return outs
    read, written = PAIRS[pairs]
    _rotary_kernel[(sum(blocks),)](
        *described, cos, sin, cos.stride(-1), sin.stride(-1), -1.0 if inverse else 1.0, blocks[0],
        LANES=lanes, WIDTH=width, START=lanes - width if last else 0, READ_HALVES=read == "halves",
        WRITE_HALVES=written == "halves", HALF_TABLES=half_tables, WIDE=sum(blocks) * rows >= 1 << 31, ROWS=rows,
        BLOCK=block, REST=rest, num_warps=4,
    )  # fmt: skip
    return outs


@rotary.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(x: Tensor, *rest: Any) -> Tensor:
    return _launch(x, None, *rest)[0]


@rotary_pair.implementation("triton", opaque=True, when=_triton_objection, pays=_triton.inductor_fuses)
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    made = _launch(q, k, *rest)
    return made[0], made[1]


# Inductor makes one loop of the reference, cats included, and goes on from there: to the cache's write, or the scale.
rotary.implementation("decomposed")(rotary.reference)
rotary_pair.implementation("decomposed")(rotary_pair.reference)


def _example(name: str, dtype: str, **constexprs: Any) -> CompileExample:
    pointers = dict.fromkeys(("q", "q_out", "k", "k_out", "cos", "sin"), f"*{dtype}")
    signature: dict[str, str] = {}
    for x in ("q", "k"):
        signature |= {x: pointers[x], f"{x}_out": pointers[x]} | dict.fromkeys(
            (f"{x}_rows", f"{x}_n1", f"{x}_n2"), "i32"
        )
        signature |= dict.fromkeys((f"{x}0", f"{x}1", f"{x}2"), "i32:16") | {f"{x}_lane": "i32"}
        signature |= dict.fromkeys((f"{x}{t}{i}" for t in "cs" for i in range(3)), "i32:16")
    signature |= {"cos": pointers["cos"], "sin": pointers["sin"], "c_lane": "i32", "s_lane": "i32"}
    signature |= {"sign": "fp32", "q_blocks": "i32"}
    values = {"LANES": 128, "WIDTH": 128, "START": 0, "READ_HALVES": True, "WRITE_HALVES": True, "HALF_TABLES": False}
    values |= {"WIDE": False, "REST": 1}
    return CompileExample(name, _rotary_kernel, signature, {**values, "ROWS": 16, "BLOCK": 64, **constexprs})


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("Llama, heads of 128", "bf16"),
        _example("interleaved, partial", "fp16", LANES=96, WIDTH=64, READ_HALVES=False, WRITE_HALVES=False,
                 BLOCK=32, REST=32, WIDE=True),
        _example("tables of pairs", "fp32", HALF_TABLES=True, LANES=64, WIDTH=64, ROWS=32, BLOCK=32),
    )
)  # fmt: skip
