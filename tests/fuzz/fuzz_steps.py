"""The ordinary steps of a random program: arithmetic, views, casts, reductions, writes in place."""

from __future__ import annotations

import torch

from fuzz_program import Choices, Writer

_UNARY = (
    "torch.tanh({})",
    "-{}",
    "{}.abs()",
    "torch.relu({})",
    "F.silu({})",
    "{}.sigmoid()",
    "{}.square()",
    "{}.sin()",
)
_BINARY = ("{} + {}", "{} * {}", "{} - {}", "torch.maximum({}, {})", "torch.add({}, {}, alpha=2)", "{}.sub({})")
_SCALAR = ("{} * 1", "{} + 1", "{} * 0.5", "{} / 2", "1 - {}", "{} + 0", "{} * 1.0", "{} ** 2", "{} * True", "2 * {}")
_CASTS = ("f32", "bf16", "f16", "f64")
_SAME = (
    "{}.contiguous()", "{}.clone()", "{}.to({}.dtype)", "{}.view_as({})", "{}.expand_as({})", "{}[...]", "{}[:]",
    "torch.ops.aten.alias({})", "{}.reshape({}.shape)", "{}.expand({}.shape)", "F.dropout({}, 0.5, False)",
    "F.dropout({}, 0.0, True)", "{}.detach()", "{}.type_as({})", "{}.to({})", "{}.to('cpu')",
    "{}.to({}.dtype, copy=True)",
    "torch.positive({})", "{}.narrow(0, 0, {}.shape[0])", "{}.permute(*range({}.dim()))", "{}.squeeze()",
    "F.dropout({}, 0.5, False, inplace=True)", "{}.contiguous(memory_format=torch.contiguous_format)",
)  # fmt: skip
_IN_PLACE = (
    "{}.add_({})", "{}.mul_(2)", "{}.copy_({})", "{}.zero_()", "{}.fill_(0.5)", "{}.relu_()", "{}.sub_({}, alpha=2)",
    "{}[0] = 1", "{}[..., :1] = 0.25", "{}[1:].add_(1)", "{}.masked_fill_({} > 0, 0.5)", "{}.clamp_(-1, 1)",
    "{}.t_()", "{}.unsqueeze_(0)", "{}.transpose(0, -1).mul_(0.5)", "{}.view(-1)[::2].zero_()", "{} += 1",
    "{}.div_(2)", "{}.tanh_()", "{}.neg_()", "{}.squeeze_()", "{}.copy_({}.flip(0))", "torch.add({0}, {1}, out={0})",
    "{}.data.add_(1)", "{}.detach().mul_(2)", "{}.swapaxes_(0, -1)", "F.relu({}, inplace=True)", "{}.addcmul_({}, {})",
    "{}.index_fill_(0, torch.tensor([0]), 2.0)", "{}.bernoulli_(0.0)", "{}.pow_(2)", "{}.lerp_({}, 0.5)",
    "{}.set_({})", "{}.resize_({}.shape)", "torch._foreach_add_([{0}, {1}], 1)", "{}.unflatten(-1, (-1, 1)).add_(1)",
)  # fmt: skip


_WITHOUT_GRADIENTS = (
    "={} * 2", "={}.to(f32)", "={}.view_as({})", "={} * 1", "={}.transpose(0, -1)", "={} + {}", "={}[...]",
    "={}.clone()", "{}.mul_(3)", "{}.add_(1)", "{}.zero_()", "={}.detach()", "=F.dropout({}, 0.5, False)",
    "={}.contiguous()",
)  # fmt: skip


def _fill(form: str, *names: str) -> str:
    if "{0}" in form:
        return form.format(*names)
    count = form.count("{}")
    padded = [*names, *([names[-1]] * count)]
    return form.format(*padded[:count])


def unary(w: Writer, c: Choices) -> None:
    w.let(_fill(c.of(_UNARY), c.any(w.names)))


def binary(w: Writer, c: Choices) -> None:
    w.let(_fill(c.of(_BINARY), c.any(w.names), c.any(w.names)))


def scalar(w: Writer, c: Choices) -> None:
    w.let(_fill(c.of(_SCALAR), c.any(w.names)))


def same(w: Writer, c: Choices) -> None:
    """What changes nothing, or little: canonicalisation drops most of it."""
    name = c.any(w.names)
    w.let(_fill(c.of(_SAME), name, name))


def cast(w: Writer, c: Choices) -> None:
    name, dtype = c.any(w.names), c.of(_CASTS)
    if w.tensor(name).is_floating_point() or c.upto(2):
        w.let(_fill(c.of((f"{{}}.to({dtype})", f"{{}}.type({dtype})", f"{{}}.to(dtype={dtype}, copy=True)")), name))


def view(w: Writer, c: Choices) -> None:
    name = c.any(w.names)
    rank = w.tensor(name).dim()
    a, b = c.upto(rank), c.upto(rank)
    kind = c.upto(20)
    text = [
        f"{name}.transpose({a}, {b})",
        f"{name}.reshape(-1)",
        f"{name}.unsqueeze({a})",
        f"{name}.view({', '.join(w.size(name, i) for i in range(rank))})" if rank else f"{name}.view(1)",
        f"{name}.view({w.size(name, 0)}, -1)" if rank else f"{name}.view(())",
        f"{name}[{'::2' if rank else '...'}]",
        f"{name}.select({a}, 0)",
        f"{name}.narrow({a}, 0, 1)",
        f"{name}.permute({', '.join(map(str, reversed(range(rank))))})" if rank else f"{name}.permute(())",
        f"{name}.squeeze({a})",
        f"{name}.flatten({min(a, b)}, {max(a, b)})",
        f"{name}.expand(2, {', '.join(['-1'] * rank)})",
        f"{name}.chunk(2, {a})[{c.upto(2)}]",
        f"{name}.unbind({a})[0]",
        f"{name}.diagonal(0, {a}, {b})",
        f"{name}.mT",
        f"{name}[None, ..., :1]",
        f"{name}.movedim({a}, {b})",
        f"{name}.unflatten({a}, (-1, 1))",
        f"{name}.as_strided({name}.shape, {name}.stride(), {name}.storage_offset())",
    ][kind]
    w.let(text)


def reduce(w: Writer, c: Choices) -> None:
    name = c.any(w.names)
    a = c.upto(w.tensor(name).dim())
    keep = c.of(("True", "False"))
    w.let(
        c.of((
            f"{name}.sum({a}, keepdim={keep})", f"{name}.mean({a}, keepdim={keep})", f"{name}.softmax({a})",
            f"{name}.amax({a}, keepdim={keep})", f"{name}.logsumexp({a}, keepdim={keep})", f"{name}.cumsum({a})",
            f"{name}.var({a}, unbiased=False, keepdim={keep})", f"{name}.sum()", f"{name}.flip({a})",
        ))
    )  # fmt: skip


def product(w: Writer, c: Choices) -> None:
    a, b = c.any(w.names), c.any(w.names)
    w.let(c.of((f"{a} @ {b}", f"{a} @ {b}.mT", f"F.linear({a}, {b})", f"torch.einsum('...ij,...kj->...ik', {a}, {b})")))


def join(w: Writer, c: Choices) -> None:
    a, b = c.any(w.names), c.any(w.names)
    dim = c.upto(w.tensor(a).dim())
    w.let(c.of((f"torch.cat([{a}, {b}], {dim})", f"torch.stack([{a}, {b}], {dim})", f"torch.cat([{a}], {dim})")))


def compare(w: Writer, c: Choices) -> None:
    """A choice by value, of inputs only: a rounded value may fall on either side."""
    inputs = w.program.names
    a, b, x, y = c.any(inputs), c.any(inputs), c.any(w.names), c.any(w.names)
    w.let(
        c.of((f"torch.where({a} > 0, {x}, {y})", f"torch.where({a} > {b}, {x}, 0.5)", f"{x}.masked_fill({a} < 0, 0)"))
    )


def make(w: Writer, c: Choices) -> None:
    """A tensor made inside the program, of a size that another has."""
    name = c.any(w.names)
    rank = w.tensor(name).dim()
    size = w.size(name, c.upto(rank)) if rank else "2"
    w.let(
        c.of((
            f"torch.zeros_like({name})", f"torch.ones({size})", f"torch.arange({size})", "torch.tensor(0.5)",
            f"torch.full(({size},), 0.5)", f"torch.empty_like({name}).fill_(0.25)", "torch.tensor([1.0])",
            f"{name}.new_zeros({size})", "torch.tensor(3)", f"torch.eye({size})", "torch.tensor(0.5).requires_grad_()",
        ))
    )  # fmt: skip


def write_in_place(w: Writer, c: Choices) -> None:
    statement = in_place_statement(w, c)
    w.do(statement)


def in_place_statement(w: Writer, c: Choices) -> str:
    """A statement that writes to some value: an intermediate, a view or an input."""
    return _fill(c.of(_IN_PLACE), c.any(w.names), c.any(w.names))


def bits(w: Writer, c: Choices) -> None:
    """The bits of a value seen as another dtype's: no float64 run tells how exact that must be."""
    name = c.any(w.names)
    if w.tensor(name).dtype in (torch.float32, torch.bfloat16, torch.float16) and name in w.program.names:
        w.program.exact = False
        w.let(c.of((f"{name}.view(i32)", f"{name}.view(torch.int16)", f"{name}.view(i8)")))


def under_no_grad(w: Writer, c: Choices) -> None:
    """A line, or a write, with gradients switched off."""
    name, text = c.any(w.names), c.of(_WITHOUT_GRADIENTS)
    if text.startswith("{}."):
        w.do(f"with torch.no_grad(): {_fill(text, name)}")
    elif w.do(f"with torch.no_grad(): v{w.count} = {_fill(text[1:], name, name)}"):
        w.names.append(f"v{w.count}")
        w.count += 1


STEPS = (
    unary, binary, scalar, same, same, cast, view, view, view, reduce, product, join, compare, make, write_in_place,
    write_in_place, bits, under_no_grad,
)  # fmt: skip
