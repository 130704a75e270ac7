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
def _rotate(  # type: ignore[no-untyped-def]
    block, x, out, cos, sin, rows, n1, n2,
    x0, x1, x2, x_lane, c0, c1, c2, c_lane, s0, s1, s2, s_lane, sign,
    LANES: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, READ_HALVES: tl.constexpr,
    WRITE_HALVES: tl.constexpr, HALF_TABLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of all LANES lanes; each lane of the result reads both lanes of its pair, the second from L1."""
    row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (lane < LANES)
    i0, i1, i2 = row // (n1 * n2), (row // n2) % n1, row % n2
    x += i0 * x0 + i1 * x1 + i2 * x2
    at = lane - START
    turned = live & (at >= 0) & (at < WIDTH)
    half: tl.constexpr = WIDTH // 2
    if WRITE_HALVES:
        pair, second = at % half, at >= half
    else:
        pair, second = at // 2, at % 2 == 1
    if READ_HALVES:
        a, b = pair, pair + half
    else:
        a, b = 2 * pair, 2 * pair + 1
    own, other = tl.where(second, b, a) + START, tl.where(second, a, b) + START
    place = pair if HALF_TABLES else at
    inside = (at >= 0) & (at < WIDTH)
    straight = tl.load(x + tl.where(inside, own, lane) * x_lane, mask=live, other=0.0).to(tl.float32)
    crossed = tl.load(x + other * x_lane, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + i0 * c0 + i1 * c1 + i2 * c2 + place * c_lane, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + i0 * s0 + i1 * s1 + i2 * s2 + place * s_lane, mask=turned, other=0.0).to(tl.float32)
    s = tl.where(second, s, -s) * sign
    result = tl.where(inside, straight * c + crossed * s, straight)
    tl.store(out + row * LANES + lane, result.to(out.dtype.element_ty), mask=live)


@jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q, q_out, q_rows, q_n1, q_n2, q0, q1, q2, q_lane, qc0, qc1, qc2, qs0, qs1, qs2,
    k, k_out, k_rows, k_n1, k_n2, k0, k1, k2, k_lane, kc0, kc1, kc2, ks0, ks1, ks2,
    cos, sin, c_lane, s_lane, sign, q_blocks,
    LANES: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, READ_HALVES: tl.constexpr,
    WRITE_HALVES: tl.constexpr, HALF_TABLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first `q_blocks` programs rotate q, the others k: one launch for both."""
    block = tl.program_id(0)
    if block < q_blocks:
        _rotate(
            block, q, q_out, cos, sin, q_rows, q_n1, q_n2,
            q0, q1, q2, q_lane, qc0, qc1, qc2, c_lane, qs0, qs1, qs2, s_lane, sign,
            LANES, WIDTH, START, READ_HALVES, WRITE_HALVES, HALF_TABLES, ROWS, BLOCK,
        )  # fmt: skip
    else:
        _rotate(
            block - q_blocks, k, k_out, cos, sin, k_rows, k_n1, k_n2,
            k0, k1, k2, k_lane, kc0, kc1, kc2, c_lane, ks0, ks1, ks2, s_lane, sign,
            LANES, WIDTH, START, READ_HALVES, WRITE_HALVES, HALF_TABLES, ROWS, BLOCK,
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
    block = _triton.next_power_of_2(lanes)
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
        WRITE_HALVES=written == "halves", HALF_TABLES=half_tables, ROWS=rows, BLOCK=block, num_warps=4,
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
    return CompileExample(name, _rotary_kernel, signature, {**values, "ROWS": 8, "BLOCK": 128, **constexprs})


COMPILE_EXAMPLES = (
    () if tl is None else (
        _example("Llama, heads of 128", "bf16"),
        _example("interleaved, partial", "fp16", LANES=96, WIDTH=64, READ_HALVES=False, WRITE_HALVES=False),
        _example("tables of pairs", "fp32", HALF_TABLES=True, LANES=64, WIDTH=64, ROWS=16, BLOCK=64),
    )
)  # fmt: skip
