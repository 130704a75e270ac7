"""Near-patterns of every fusion: written the way models write them, then perturbed in one place or several.

Choice 0 is always the form that fuses; the others change a dimension, the place of eps or of the scale, the shape or
dtype of a mask, the order of operations. All inner values join the program's other values, so later steps may use
them, return them or write to them.
"""

from __future__ import annotations

from fuzz_program import Choices, Writer
from fuzz_steps import in_place_statement

EPS = ("1e-6", "1e-5", "1e-2", "0.0", "1", "-1e-9")
FLOAT = ("f32", "f32", "bf16", "f16")


def _operand(w: Writer, c: Choices, dims: list[int], dtype: str) -> str:
    """A fresh input, or one that went through something first."""
    name = w.input(dims, dtype, memory=c.upto(6) if c.seldom(3) else 0, grad=not c.seldom(5))
    if c.seldom(4):
        return w.let(c.of((f"{name} + 1", f"{name}.clone()", f"{name}.to(f32)", f"torch.tanh({name})"))) or name
    return name


def _interrupt(w: Writer, c: Choices) -> None:
    """Now and then a write slips in between the lines of the pattern."""
    if c.seldom(6):
        w.pending = (c.upto(8), in_place_statement(w, c))


def _shapes(c: Choices) -> list[int]:
    """Which of the case's sizes a normed value has: three dimensions, else one, two or four."""
    return c.of(([0, 1, 3], [1, 3], [3], [0, 2, 1, 3], [0, 1, 2], [1, 1, 1]))


def _stream(w: Writer, c: Choices, dims: list[int], dtype: str) -> str | None:
    """The value to be normed: an input, a sum with a residual in its many forms, or some earlier value."""
    kind = c.upto(6)
    if kind == 5:
        return c.any(w.names)
    x = _operand(w, c, dims, dtype)
    if kind in (0, 1):
        return x
    r = _operand(w, c, c.of((dims, dims, dims[-1:], [*dims[:-1], dims[0]])), c.of((dtype, dtype, "f32")))
    form = c.of(("{x} + {r}", "{r} + {x}", "torch.add({x}, {r}, alpha=2)", "{x} - {r}", "{x} + {x}", "{x} + {r} * 0.5"))
    return w.let(form.format(x=x, r=r))


def rms_norm(w: Writer, c: Choices) -> None:
    dims, dtype = _shapes(c), c.of(FLOAT)
    x = _stream(w, c, dims, dtype)
    _interrupt(w, c)
    if x is None:
        return
    wide = w.let(c.of((f"{x}.to(f32)", f"{x} * 1", f"{x}.double()", f"{x}.to(bf16)"))) if c.upto(2) == 0 else x
    h = wide or x
    dim = c.of(("-1", "-1", "-1", "1", "0", "(-2, -1)", f"{w.tensor(h).dim() - 1}"))
    keep = c.of((", keepdim=True", ", True", "", ", keepdim=False"))
    square = c.of(
        (f"{h}.pow(2)", f"{h} * {h}", f"{h}.square()", f"{h} ** 2", f"{h}.pow(3)", f"{h}.abs()", f"{h} * {x}")
    )
    v = w.let(f"({square}).mean({dim}{keep})") if c.upto(3) else w.let(f"torch.mean({square}, {dim}{keep})")
    if v is None:
        return
    eps = c.of(EPS)
    r = w.let(
        c.of((
            f"torch.rsqrt({v} + {eps})", f"({v} + {eps}).rsqrt()", f"1 / torch.sqrt({v} + {eps})",
            f"torch.rsqrt({v}) + {eps}", f"torch.rsqrt({v} * {eps})", f"torch.rsqrt({v}).add({eps})",
            f"torch.sqrt({v} + {eps})", f"({v} + {eps}).pow(-0.5)", f"torch.rsqrt({v} + {eps} + 1)",
            f"torch.rsqrt(torch.add({v}, {v}))", f"torch.rsqrt({v} - {eps})", f"torch.rsqrt({v}.clamp(min=1e-5))",
        ))
    )  # fmt: skip
    if r is None:
        return
    n = w.let(c.of((f"{h} * {r}", f"{r} * {h}", f"{x} * {r}", f"{h} / {r}", f"{h} * {r} * 2", f"{h} * {r} * {r}")))
    if n is None:
        return
    n = w.let(c.of((f"{n}.to({dtype})", f"{n}.type_as({x})", f"{n}.to(bf16)"))) if c.upto(2) == 0 else n
    _weighted(w, c, n or x, dims, dtype, bias=False)


def layer_norm(w: Writer, c: Choices) -> None:
    dims, dtype = _shapes(c), c.of(FLOAT)
    x = _stream(w, c, dims, dtype)
    _interrupt(w, c)
    if x is None:
        return
    h = (w.let(f"{x}.to(f32)") if c.upto(2) else x) or x
    dim = c.of(("-1", "-1", "-1", "1", "0", "(-2, -1)"))
    keep = c.of((", keepdim=True", ", keepdim=True", ", keepdim=True", ""))
    m = w.let(f"{h}.mean({dim}{keep})")
    d = w.let(c.of((f"{h} - {m}", f"{h} - {m}", f"{m} - {h}", f"{h} + {m}"))) if m else None
    if m is None or d is None:
        return
    v = w.let(
        c.of((
            f"{d}.pow(2).mean({dim}{keep})", f"({d} * {d}).mean({dim}{keep})", f"{h}.var({dim}, unbiased=False{keep})",
            f"{h}.var({dim}, unbiased=True{keep})", f"({h} * {h}).mean({dim}{keep}) - {m} * {m}",
            f"({h} - {m}).pow(2).mean({dim}{keep})", f"{h}.pow(2).mean({dim}{keep})", f"{d}.abs().mean({dim}{keep})",
        ))
    )  # fmt: skip
    if v is None:
        return
    eps = c.of(EPS)
    n = w.let(
        c.of((
            f"{d} * torch.rsqrt({v} + {eps})", f"{d} / torch.sqrt({v} + {eps})", f"{d} / (torch.sqrt({v}) + {eps})",
            f"{h} * torch.rsqrt({v} + {eps})", f"{d} * ({v} + {eps}) ** -0.5", f"{d} / ({v} + {eps})",
        ))
    )  # fmt: skip
    if n is not None:
        _weighted(w, c, n, dims, dtype, bias=True)


def _weighted(w: Writer, c: Choices, n: str, dims: list[int], dtype: str, bias: bool) -> None:
    shape = c.of((dims[-1:], dims[-1:], dims[-1:], dims, dims[-2:], dims[:1], []))
    g = w.input(shape, c.of((dtype, dtype, "f32", "bf16")), memory=c.upto(4) if c.seldom(4) else 0)
    scaled = w.let(
        c.of((
            f"{g} * {n}", f"{n} * {g}", f"(1 + {g}) * {n}", f"{n} * ({g} + 1.0)", f"({g}.to(f32) * {n}).to({dtype})",
            f"{n} * ({g} - 1)", f"{n} / {g}", f"{n} + {g}", f"{n} * {g}.to(f32)",
            f"({g} * 2) * {n}", f"{n} * {g} * {g}",
        ))
    )  # fmt: skip
    if scaled and bias and not c.seldom(4):
        b = w.input(c.of((shape, shape, dims, [])), dtype)
        w.let(c.of((f"{scaled} + {b}", f"{b} + {scaled}", f"{scaled} - {b}")))


def library_norm(w: Writer, c: Choices) -> None:
    """F.layer_norm and F.rms_norm themselves."""
    dims, dtype = _shapes(c), c.of(FLOAT)
    x = _stream(w, c, dims, dtype)
    _interrupt(w, c)
    if x is None or not w.tensor(x).dim():
        return
    last = c.of((1, 1, 1, 2))
    shape = ", ".join(w.size(x, -i) for i in range(last, 0, -1)) if w.tensor(x).dim() >= last else "1"
    g = w.input(dims[-last:], c.of((dtype, dtype, "f32"))) if not c.seldom(3) else "None"
    eps = c.of(EPS)
    if c.upto(2):
        w.let(f"F.rms_norm({x}, ({shape},), {g}, {c.of((eps, 'None'))})")
        return
    b = w.input(dims[-last:], dtype) if not c.seldom(3) else "None"
    before = w.let(f"{x}.to(f32)") if c.seldom(3) else None
    made = w.let(f"F.layer_norm({before or x}, ({shape},), {g}, {b}, {eps})")
    if made and before:
        w.let(f"{made}.to({c.of((dtype, 'bf16'))})")


def attention(w: Writer, c: Choices) -> None:
    """Sizes 0, 1, 2, 3 of the case: batch, tokens, heads, features."""
    dtype = c.of(FLOAT)
    keys = c.of((1, 1, 1, 3))
    heads_last = c.upto(2)
    flat = c.seldom(5)  # three dimensions, for bmm

    def operand(tokens: int, heads: int = 2) -> str | None:
        if flat:
            return _operand(w, c, [0, tokens, 3], dtype)
        if heads_last:
            return w.let(f"{_operand(w, c, [0, tokens, heads, 3], dtype)}.transpose(1, 2)")
        return _operand(w, c, [0, heads, tokens, 3], dtype)

    q, k, v = operand(1), operand(keys), operand(keys)
    if not (q and k and v):
        return
    if c.seldom(5) and not flat:
        k, v = _repeated(w, c, k), _repeated(w, c, v)
        q = w.let(f"torch.cat([{q}, {q}], 1)")
    _interrupt(w, c)
    if c.seldom(4):
        _sdpa(w, c, q, k, v)
        return
    scale = c.of((f"{w.size(k, -1)} ** -0.5", "0.125", "2.0", "0.0", "-1.0", "3"))
    place = c.upto(7)
    if place == 1:
        q = w.let(f"{q} * {scale}") or q
    elif place == 2:
        k = w.let(f"{k} * {scale}") or k
    elif place == 3:
        factor = w.input(c.of(([], [3], [0], [1])), dtype)
        q = w.let(f"{q} * {factor}") or q
    kt = c.of((f"{k}.transpose(-1, -2)", f"{k}.mT", f"{k}.transpose(-2, -1)", f"{k}", f"{k}.permute(0, 2, 1)"))
    s = w.let(c.of((f"{q} @ {kt}", f"torch.matmul({q}, {kt})", f"torch.einsum('...qd,...kd->...qk', {q}, {k})",
                    f"torch.bmm({q}, {kt})", f"({k} @ {q}.mT).mT")))  # fmt: skip
    if s and place in (0, 4):
        s = w.let(f"{s} * {scale}" if place == 0 else f"{s} / 3.0")
    elif s and place == 5:
        s = w.let(f"{s} * {w.input(c.of(([], [2, 1, 1], [1, 1], [keys])), dtype)}")
    s = _masked(w, c, s, keys, dtype, flat) if s and not c.seldom(3) else s
    if not s:
        return
    p = _probabilities(w, c, s, dtype)
    if p and c.seldom(5):
        p = w.let(c.of((f"F.dropout({p}, 0.1, False)", f"F.dropout({p}, 0.0)", f"{p} * 2", f"{p} + 1", f"{p}.mT")))
    o = (
        w.let(c.of((f"{p} @ {v}", f"torch.matmul({p}, {v})", f"torch.bmm({p}, {v})", f"{p} @ {v} * 2", f"{p} @ {k}")))
        if p
        else None
    )
    if o and not flat and c.upto(2):
        o = w.let(f"{o}.transpose(1, 2)")
        if o:
            w.let(c.of((f"{o}.reshape({w.size(o, 0)}, {w.size(o, 1)}, -1)", f"{o}.contiguous()", f"{o}.flatten(2)",
                        f"{o}.contiguous().view({w.size(o, 0)}, {w.size(o, 1)}, -1)")))  # fmt: skip


def _repeated(w: Writer, c: Choices, k: str) -> str:
    b, h, t, d = (w.size(k, i) for i in range(4))
    return w.let(
        c.of((
            f"{k}.repeat_interleave(2, 1)", f"{k}[:, :, None].expand({b}, {h}, 2, {t}, {d}).reshape({b}, -1, {t}, {d})",
            f"{k}.repeat(1, 2, 1, 1)", f"{k}[:, None].expand({b}, 2, {h}, {t}, {d}).reshape({b}, -1, {t}, {d})",
            f"torch.cat([{k}, {k}], 1)",
        ))
    ) or k  # fmt: skip


def _masked(w: Writer, c: Choices, s: str, keys: int, dtype: str, flat: bool) -> str | None:
    queries = 1
    low = c.of((f"torch.finfo({s}.dtype).min", "float('-inf')", "-1e4", "0.0", "-10.0"))
    t, n = w.size(s, -2), w.size(s, -1)
    causal = (f"torch.ones({t}, {n}, dtype=boolean).tril()",
              f"torch.ones({t}, {n}, dtype=boolean).triu(1).logical_not()",
              f"torch.arange({n})[None] <= torch.arange({t})[:, None]", f"torch.ones({t}, {n}, dtype=boolean).tril(-1)",
              f"torch.arange({n})[None] < torch.arange({t})[:, None] + 2",
              f"torch.ones({t}, {n}).tril().to(boolean)")  # fmt: skip
    shapes = ([queries, keys], [0, 2, queries, keys], [2, queries, keys], [keys], [queries, 2], [])
    shape = c.of(shapes[:1] if flat and c.upto(2) else shapes)
    kind = c.upto(7)
    if kind < 2:
        m = w.let(c.of(causal))
    elif kind == 6:
        return w.let(
            c.of((f"torch.tanh({s} / 5.0) * 5.0", f"{s}.clamp(-3, 3)", f"{s} + 1", f"{s} - {s}.amax(-1, keepdim=True)"))
        )
    elif kind == 5:
        m = w.input(shape, c.of((dtype, "f32", "bf16")), memory=c.upto(5))
        return w.let(c.of((f"{s} + {m}", f"{m} + {s}", f"{s} - {m}", f"{s} + {m} * 2", f"{s} * {m}", f"{s} + {m}.mT")))
    else:
        m = w.input(shape, c.of(("boolean", "boolean", "i64")), memory=c.upto(5))
        if w.tensor(m).dtype.is_floating_point is False and w.program.inputs[-1].dtype == "i64":
            m = w.let(f"{m} > 0") or m
    if m is None:
        return None
    return w.let(
        c.of((
            f"{s}.masked_fill(~{m}, {low})", f"torch.where({m}, {s}, {low})", f"{s} + torch.where({m}, 0.0, {low})",
            f"{s}.masked_fill({m} == 0, {low})", f"{s} + (1.0 - {m}.to({dtype})) * {low}",
            f"{s}.masked_fill({m}, {low})",
            f"{s} + {m}", f"torch.where({m}, {low}, {s})", f"{s} * {m} + -1e4 * ~{m}",
            f"{s} + torch.zeros({t}, {n}, dtype={s}.dtype).masked_fill(~{m}, {low})",
        ))
    )  # fmt: skip


def _probabilities(w: Writer, c: Choices, s: str, dtype: str) -> str | None:
    kind = c.upto(6)
    if kind == 5:
        return softmax_by_hand(w, c, s)
    dim = c.of(("-1", "-1", "-1", "-1", "-2", "1", f"{w.tensor(s).dim() - 1}"))
    p = w.let(
        c.of((
            f"F.softmax({s}, {dim})", f"F.softmax({s}, {dim}, dtype=f32)", f"{s}.softmax({dim})",
            f"torch.softmax({s}.to(f32), {dim})", f"F.softmax({s}, {dim}, dtype=f64)", f"F.log_softmax({s}, {dim})",
            f"{s}.sigmoid()",
        ))
    )  # fmt: skip
    return w.let(c.of((f"{p}.to({dtype})", f"{p}.type_as({s})", f"{p}.to({s}.dtype)"))) if p and c.upto(2) == 0 else p


def softmax_by_hand(w: Writer, c: Choices, s: str | None = None) -> str | None:
    s = s or c.any(w.names)
    dim = c.of(("-1", "-1", "-1", "1", "0", "-2"))
    second = c.of((dim, dim, dim, "0", "-1"))
    m = w.let(
        c.of((
            f"{s}.amax({dim}, keepdim=True)", f"{s}.max({dim}, keepdim=True).values", f"{s}.mean({dim}, keepdim=True)",
            f"{s}.amax({dim}, keepdim=True).detach()", f"{s}.amax()", f"{s}.amin({dim}, keepdim=True)",
        ))
    )  # fmt: skip
    e = (
        w.let(c.of((f"torch.exp({s} - {m})", f"({s} - {m}).exp()", f"torch.exp2({s} - {m})", f"torch.exp({s})")))
        if m
        else None
    )
    z = (
        w.let(c.of((f"{e}.sum({second}, keepdim=True)", f"{e}.sum({second}, True)", f"{e}.sum({second})")))
        if e
        else None
    )
    return (
        w.let(c.of((f"{e} / {z}", f"{e} / ({z} + 1)", f"{e} * {z}.reciprocal()", f"{e} / ({z} + 1e-6)"))) if z else None
    )


def _sdpa(w: Writer, c: Choices, q: str, k: str, v: str) -> None:
    extra = [q, k, v]
    if c.upto(2):
        shape = c.of(([1, 1], [0, 2, 1, 1], [2, 1, 1]))
        extra.append(f"attn_mask={w.input(shape, c.of(('boolean', 'f32', 'bf16')), memory=c.upto(5))}")
    extra += c.of(([], ["is_causal=True"], ["scale=0.5"], ["enable_gqa=True"], ["dropout_p=0.0"], ["scale=0.0"]))
    w.let(f"F.scaled_dot_product_attention({', '.join(extra)})")


def dequantised(w: Writer, c: Choices) -> None:
    """Sizes: 0 rows, 3 inputs, 2 outputs."""
    dtype = c.of(FLOAT)
    x = _operand(w, c, c.of(([0, 1, 3], [0, 3], [3])), dtype)
    by_rows = c.upto(4) < 3  # [outputs, inputs], as linear has it
    q = w.input(
        [2, 3] if by_rows else [3, 2], c.of(("i8", "i8", "u8", "i32", "i64")), memory=c.upto(4) if c.seldom(4) else 0
    )
    _interrupt(w, c)
    value = c.of((f"{q}.to({dtype})", f"{q}.to(f32)", f"{q}", f"({q} & 15).to({dtype})", f"({q} >> 4).to({dtype})"))
    s = w.input(c.of(([2], [2], [3], [], [2, 3])), c.of((dtype, dtype, "f32")), memory=c.upto(4) if c.seldom(4) else 0)
    rank = w.tensor(s).dim()
    scale = c.of((f"{s}[:, None]", f"{s}.unsqueeze(-1)", f"{s}", f"{s}[None]", f"{s}.view(-1, 1)")) if rank == 1 else s
    if not by_rows and rank == 1 and c.upto(3):
        scale = s
    z = w.input(c.of(([2], [], [3])), c.of(("i8", dtype))) if c.seldom(3) else None
    zero = (f"{z}[:, None]" if c.upto(2) == 0 else z) if z else None
    weight = w.let(
        c.of((f"{value} * {scale}", f"{scale} * {value}", f"({value} * {scale}).to({dtype})", f"{value} / {scale}",
              f"{value} * {scale} + 1", f"({value} - 8) * {scale}", f"{value} + {scale}"))
        if zero is None
        else c.of((f"({value} - {zero}) * {scale}", f"{value} * {scale} - {zero}",
                   f"{value} * {scale} + {zero}"))
    )  # fmt: skip
    weight = w.let(f"{weight}.to({x}.dtype)") if weight and c.upto(2) == 0 else weight
    if not weight:
        return
    b = w.input([2], dtype) if c.seldom(3) else "None"
    forms = (
        f"F.linear({x}, {weight}, {b})",
        f"{x} @ {weight}.t()",
        f"torch.matmul({x}, {weight}.mT)",
        f"{x} @ {weight}",
    )
    y = w.let(c.of(forms if by_rows else tuple(reversed(forms))))
    if y and c.seldom(3):
        w.let(f"{y} * {s}")


def packed(w: Writer, c: Choices) -> None:
    """Two 4-bit numbers a byte, in groups along the inputs."""
    dtype = c.of(FLOAT)
    q = w.input([2, 3], "u8")
    low, high = w.let(f"{q} & {c.of((15, 15, 15, 7))}"), w.let(f"{q} >> 4")
    both = w.let(
        c.of(
            (
                f"torch.stack([{low}, {high}], -1)",
                f"torch.stack([{high}, {low}], -1)",
                f"torch.cat([{low}, {high}], -1)",
            )
        )
    )
    if both is None:
        return
    n, k = w.size(q, 0), f"2 * {w.size(q, 1)}"
    flat = w.let(f"{both}.reshape({n}, {k})")
    groups = c.of((1, 2, 1, 4))
    s, z = w.input([2, *([3] if c.seldom(5) else [])], dtype), c.upto(3)
    scale = f"{s}[:, None, None]" if w.tensor(s).dim() == 1 else f"{s}[:, :{groups}, None]"
    offset = c.of((" - 8", " - 8", "", f" - {w.input([2], dtype)}[:, None, None]")) if z else " - 8"
    _interrupt(w, c)
    g = w.let(f"({flat}.to({dtype}).view({n}, {groups}, -1){offset}) * {scale}")
    weight = w.let(f"{g}.reshape({n}, {k})") if g else None
    if weight is None:
        return
    x = w.input([0, 1, 3], dtype)
    wide = w.let(f"torch.cat([{x}, {x}], -1)")
    w.let(c.of((f"F.linear({wide}, {weight})", f"{wide} @ {weight}.t()", f"{wide} @ {weight}.mT * 2")))


PATTERNS = (rms_norm, layer_norm, library_norm, attention, attention, softmax_by_hand, dequantised, packed)
