"""Rotary embeddings: every spelling found in models, q and k together, and what only looks like a rotation."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.passes.rotary import FuseRotary

pytestmark = pytest.mark.usefixtures("without_inductor")


def run(program, *inputs, dynamic=False, **options):
    """`dynamic` makes the number of tokens, 20, symbolic."""
    torch._dynamo.reset()
    for t in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(t, t.shape.index(20))
    with fxopt.record() as rec, torch.no_grad():
        options = {"fusions": ["rotary"], **options}
        out = torch.compile(program, backend="fxopt", fullgraph=True, options=options)(*inputs)
    return out, rec


def check(program, *inputs, sites=1, op="rotary", dynamic=False, **tags):
    out, rec = run(program, *inputs, dynamic=dynamic)
    assert rec.counts().get("rotary", 0) == sites, rec.misses
    assert {s.verdict.status for s in rec.sites} <= {"equal"}, rec
    assert {s.op for s in rec.sites} <= {op}
    for step in rec.graphs[0].steps:
        assert tags.items() <= step.tags.items()
    eager = program(*inputs)
    for actual, expected in zip(*((t,) if torch.is_tensor(t) else t for t in (out, eager)), strict=True):
        assert actual.dtype == expected.dtype
        ulp = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=2 * ulp, atol=2 * ulp * expected.abs().max().item())
    return rec


def inputs(lanes=32, tables=32, heads=4, dtype=torch.float32, table_dtype=None):
    x = torch.randn(2, 20, heads, lanes).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(2, 20, tables).to(table_dtype or dtype) for _ in range(2))
    return x, cos, sin


def half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def half_by_chunks(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], dim=-1)


def half_by_split(x):
    a, b = x.split(x.shape[-1] // 2, -1)
    return torch.cat([b.neg(), a], dim=3)


def half_by_view(x):
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat((-b, a), -1)


def neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def neighbours_by_view(x):
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-b, a], dim=-1).reshape(x.shape)


def whole(turn):
    def program(x, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return x * cos + turn(x) * sin

    return program


def partial(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([part * cos + half(part) * sin, rest], -1)


def partial_at_the_end(x, cos, sin):
    rest, part = x.split([x.shape[-1] - cos.shape[-1], cos.shape[-1]], -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([rest, part * cos + neighbours(part) * sin], -1)


def direct(x, cos, sin):
    a, b = torch.chunk(x, 2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def direct_neighbours(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((a * cos - b * sin, sin * a + cos * b), dim=-1).flatten(-2)


def deepseek(x, cos, sin):
    b, h, s, d = x.shape
    x = x.reshape(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d)
    return x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1)


def mistral4(x, cos, sin):
    cos, sin = (t[..., : t.shape[-1] // 2].unsqueeze(1) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def glm(x, cos, sin):
    cos, sin = (t.unsqueeze(1)[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([part * cos + neighbours(part) * sin, rest], -1)


def inverse(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((b, -a), -1) * sin.unsqueeze(1)


def llama4(x, cos, sin):
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    angles = torch.complex(cos.float(), sin.float()).unsqueeze(1)
    return torch.view_as_real(z * angles).flatten(3).type_as(x)


FORMS = {
    "halves": (whole(half), 32, {"pairs": "halves"}),
    "chunks": (whole(half_by_chunks), 32, {"pairs": "halves"}),
    "split": (whole(half_by_split), 32, {"pairs": "halves"}),
    "view": (whole(half_by_view), 32, {"pairs": "halves"}),
    "neighbours": (whole(neighbours), 32, {"pairs": "interleaved"}),
    "neighbours by view": (whole(neighbours_by_view), 32, {"pairs": "interleaved"}),
    "partial": (partial, 24, {"pairs": "halves"}),
    "partial at the end": (partial_at_the_end, 24, {"pairs": "interleaved"}),
    "GPT-OSS": (direct, 16, {"pairs": "halves"}),
    "privacy filter": (direct_neighbours, 16, {"pairs": "interleaved"}),
    "DeepSeek": (deepseek, 32, {"pairs": "interleaved to halves"}),
    "Mistral 4": (mistral4, 32, {"pairs": "interleaved to halves"}),
    "GLM": (glm, 24, {"pairs": "interleaved"}),
    "nanochat": (inverse, 32, {"pairs": "halves"}),
    "Llama 4": (llama4, 16, {"pairs": "complex"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    program, tables, tags = FORMS[form]
    check(program, *inputs(tables=tables), **tags)


@pytest.mark.parametrize("form", ["halves", "neighbours by view", "partial", "GPT-OSS", "DeepSeek", "Llama 4"])
def test_form_in_bfloat16_with_dynamic_shapes(form):
    program, tables, tags = FORMS[form]
    check(program, *inputs(tables=tables, dtype=torch.bfloat16), dynamic=True, **tags)


CASTS = {
    "x wide, result narrow": lambda x, c, s: (x.float() * c + half(x.float()) * s).to(x.dtype),
    "turned, then wide": lambda x, c, s: (x.float() * c + half(x).float() * s).to(x.dtype),
    "tables wide": lambda x, c, s: (x * c.float() + half(x) * s.float()).to(x.dtype),
    "left wide": lambda x, c, s: x.float() * c + half(x.float()) * s,
    "narrow within partial": lambda x, c, s: torch.cat(
        [x[..., :0], (x.float() * c + half(x).float() * s).to(x.dtype)], -1
    ),
}


@pytest.mark.parametrize("casts", CASTS)
def test_casts(casts):
    x, cos, sin = inputs(dtype=torch.bfloat16)
    check(CASTS[casts], x, cos[:, None], sin[:, None])


def llama(q, k, cos, sin):
    return whole(half)(q, cos, sin), whole(half)(k, cos, sin)


def shared(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


@pytest.mark.parametrize("dynamic", [False, True])
def test_q_and_k_share_an_op(dynamic):
    q, cos, sin = inputs()
    check(shared, q, q[:, :2].clone(), cos, sin, op="rotary_pair", dynamic=dynamic)


def test_tables_of_their_own_are_left_apart():
    q, cos, sin = inputs()
    check(llama, q, q[:, :2].clone(), cos, sin, sites=2)


def test_what_depends_on_the_first_is_left_apart():
    def program(q, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = q * cos + half(q) * sin
        k = q.relu()
        return q, k * cos + half(k) * sin

    check(program, *inputs(), sites=2)


def test_three_with_the_same_tables():
    def program(q, k, v, cos, sin):
        return *shared(q, k, cos[0], sin[0]), v * cos[0].unsqueeze(1) + half(v) * sin[0].unsqueeze(1)

    def same(q, k, v, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return tuple(x * cos + half(x) * sin for x in (q, k, v))

    q, cos, sin = inputs()
    _, rec = run(same, q, q + 1, q + 2, cos, sin)
    assert sorted(s.op for s in rec.sites) == ["rotary", "rotary_pair"]


def test_rotated_lanes_alone_where_they_are_joined_later():
    def program(x, cos, sin):
        rest, part = x.split([8, 24], -1)
        part = part * cos.unsqueeze(1) + half(part) * sin.unsqueeze(1)
        return torch.cat([rest.expand(2, 4, 20, 8), part], -1), part

    check(program, *inputs(tables=24))


@pytest.mark.parametrize("example", list(FuseRotary().examples()), ids=lambda e: e.name)
def test_example(example):
    _, rec = run(example.program, *example.inputs())
    assert rec.counts().get("rotary", 0) == example.sites, rec.misses
    assert example.refused is None or any(example.refused in miss.reason for miss in rec.misses)


def sum_over_lanes(x, c, s):
    return x * c + half(x) * x.sum(-1, keepdim=True)


OTHERS = {
    "no sign": lambda x, c, s: x * c + torch.cat((x[..., 16:], x[..., :16]), -1) * s,
    "both signs": lambda x, c, s: x * c + torch.cat((-x[..., 16:], -x[..., :16]), -1) * s,
    "difference of another": lambda x, c, s: torch.cat(((x * c - x * s)[..., :16], (x * c + x * s)[..., 16:]), -1),
    "unequal parts": lambda x, c, s: x * c + torch.cat((-x[..., 8:], x[..., :8]), -1) * s,
    "a scale only": lambda x, c, s: x + half(x) * s,
    "one number a row": sum_over_lanes,
    "over heads": lambda x, c, s: x * c + torch.cat((-x[:, 2:], x[:, :2]), 1) * s,
    "doubled": lambda x, c, s: x * c + half(x) * s * 2 - x * c,
}


@pytest.mark.parametrize("other", OTHERS)
def test_left_alone(other):
    x, cos, sin = inputs()
    check(OTHERS[other], x, cos[:, None], sin[:, None], sites=0)


def test_another_mixture_of_lanes_is_a_near_miss():
    def quarters(x, cos, sin):
        a, b, c, d = x.chunk(4, -1)
        return x * cos[:, None] + torch.cat((-b, a, -d, c), -1) * sin[:, None]

    rec = check(quarters, *inputs(), sites=0)
    assert any("no rotation of pairs" in miss.reason for miss in rec.misses)


def test_parts_in_different_dtypes_are_refused():
    x, cos, sin = inputs(dtype=torch.bfloat16)
    rec = check(lambda x, c, s: x * c + half(x).float() * s, x, cos[:, None], sin[:, None].float(), sites=0)
    assert any("different dtypes" in miss.reason for miss in rec.misses)


def test_dynamic_shapes_are_not_specialised():
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        compiled = torch.compile(shared, backend="fxopt", options={"fusions": ["rotary"]})
        for tokens in (3, 5, 7):
            args = [torch.randn(2, heads, tokens, 32) for heads in (4, 2)] + [torch.randn(2, tokens, 32)] * 2
            for t in args:
                torch._dynamo.mark_dynamic(t, t.dim() - 2)
            torch.testing.assert_close(compiled(*args), shared(*args))
    assert len(rec.graphs) == 1
    assert rec.counts() == {"rotary": 1}


def test_a_dynamic_number_of_lanes_is_refused():
    torch._dynamo.reset()
    q, cos, sin = inputs()
    with fxopt.record() as rec, torch.no_grad():
        torch.compile(whole(half), backend="fxopt", dynamic=True, options={"fusions": ["rotary"]})(q, cos, sin)
    assert any("the number of lanes is dynamic" in miss.reason for miss in rec.misses)


@pytest.mark.parametrize("form", ["halves", "partial", "DeepSeek", "Llama 4"])
def test_gradients(form):
    program, tables, _ = FORMS[form]
    x, cos, sin = inputs(tables=tables)
    x = x.detach().requires_grad_()
    torch._dynamo.reset()
    with fxopt.record() as rec:
        compiled = torch.compile(program, backend="fxopt", options={"fusions": ["rotary"]})
        compiled(x, cos, sin).square().sum().backward()
    assert rec.counts() == {"rotary": 1}
    wide = x.detach().double().requires_grad_()
    reference = FORMS["privacy filter"][0] if form == "Llama 4" else program
    reference(wide, cos.double(), sin.double()).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_after_a_graph_break():
    def program(q, k, cos, sin):
        q = q + 1
        torch._dynamo.graph_break()
        return shared(q, k, cos, sin)

    torch._dynamo.reset()
    q, cos, sin = inputs()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt", options={"fusions": ["rotary"]})(q, q, cos, sin)
    assert rec.counts() == {"rotary": 1}
    torch.testing.assert_close(out, program(q, q, cos, sin))


def test_a_cast_for_each_of_the_products():
    def program(x, cos, sin):
        x = x.transpose(1, 2)
        return (x.float() * cos + half(x.float()) * sin).to(x.dtype)

    x = torch.randn(2, 5, 4, 32).bfloat16()
    _, cos, sin = inputs(dtype=torch.bfloat16)
    check(program, x, cos[:, None, :5], sin[:, None, :5])


def test_a_cast_before_a_permutation_of_k_alone():
    """The cast of k moves before its transposition, that of q, which is scaled after it, can't: still one op."""

    def program(q, k, cos, sin):
        q, k = q.transpose(1, 2) * 0.5, k.transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        rotated = (x.float() * cos + half(x.float()) * sin for x in (q, k))
        return tuple(x.to(torch.bfloat16) for x in rotated)

    q, cos, sin = inputs(dtype=torch.bfloat16)
    q, k = q.transpose(1, 2).contiguous(), torch.randn(2, 20, 2, 32).bfloat16()
    rec = check(program, q, k, cos, sin, op="rotary_pair")
    assert "aten.to.dtype" not in rec.graphs[0].after  # both casts are the op's


def test_casts_of_two_values_are_not_taken_for_one():
    def program(x, y, cos, sin):
        return x.float() * cos + half(y.float()) * sin

    x, cos, sin = inputs(dtype=torch.bfloat16)
    check(program, x, x + 1, cos[:, None], sin[:, None], sites=0)
