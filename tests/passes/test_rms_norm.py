"""RMSNorm: every form that models spell, and what looks like one and is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.passes.rms_norm import FuseRMSNorm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def compiled(monkeypatch):
    """compiled(program, *inputs) -> (result, report), with only this fusion and no lowering (seconds a test)."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("fxopt.backend.compile_graph", lambda module, inputs, options: aot_eager(module, inputs))

    def run(program, *inputs, dynamic=False, fusions=("rms_norm",), **options):
        torch._dynamo.reset()
        with fxopt.record() as rec, torch.no_grad():
            options = {"fusions": list(fusions), **options}
            out = torch.compile(program, backend="fxopt", dynamic=dynamic, fullgraph=True, options=options)(*inputs)
        return out, rec

    return run


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def leaves(out):
    return out if isinstance(out, tuple) else (out,)


def check(compiled, program, *inputs, sites=1, op="rms_norm", **options):
    out, rec = compiled(program, *inputs, **options)
    assert rec.counts().get("rms_norm", 0) == sites, misses(rec)
    if sites:
        assert op is None or {s.op for s in rec.sites} == {op}
        assert {s.verdict.status for s in rec.sites} == {"equal"}
    for actual, eager in zip(leaves(out), leaves(program(*inputs)), strict=True):
        assert actual.dtype == eager.dtype
        ulp = torch.finfo(eager.dtype).eps
        torch.testing.assert_close(actual, eager, rtol=2 * ulp, atol=2 * ulp)
    return rec


def misses(rec):
    return [(m.reason, m.node) for graph in rec.graphs for m in graph.misses]


def refused(compiled, program, *inputs, reason):
    rec = check(compiled, program, *inputs, sites=0)
    assert any(reason in text for text, _ in misses(rec)), misses(rec)


def norm(h, eps=1e-6):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def t5(x, w):
    n = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * (n.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else n)


def deepseek(x, w):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


FORMS = {
    "llama": lambda x, w: w * norm(x.float()).to(x.dtype),
    "llama, other order": lambda x, w: norm(x.float()).to(x.dtype) * w,
    "olmo": lambda x, w: (w * norm(x.float())).to(x.dtype),
    "nemotron": lambda x, w: (w.float() * norm(x.float())).to(x.dtype),
    "gemma": lambda x, w: (norm(x.float()) * (1.0 + w.float())).type_as(x),
    "gemma, rounded first": lambda x, w: norm(x.float()).to(x.dtype) * (1 + w),
    "t5": t5,
    "no weight": lambda x, w: norm(x.float()).type_as(x),
    "left in float32": lambda x, w: norm(x.float()),
    "root cast": deepseek,
    "F.rms_norm": lambda x, w: nn.functional.rms_norm(x, (16,), w, 1e-6),
    "F.rms_norm, no eps": lambda x, w: nn.functional.rms_norm(x * 1e-3, (16,), w),
    "F.rms_norm, no weight": lambda x, w: nn.functional.rms_norm(x, (16,)),
}

SPELLINGS = {
    "x * x": lambda h: h * torch.rsqrt((h * h).mean(-1, True) + 1e-6),
    "square": lambda h: h * torch.rsqrt(h.square().mean(-1, True) + 1e-6),
    "pow 2.0": lambda h: h * torch.rsqrt(h.pow(2.0).mean(2, True) + 1e-6),
    "root of power": lambda h: h * (h.pow(2).mean(-1, True) + 1e-6).pow(-0.5),
    "power operator": lambda h: h * (h**2).mean(-1, True).add(1e-6) ** -0.5,
    "one over root": lambda h: h * (1 / torch.sqrt(h.pow(2).mean(-1, True) + 1e-6)),
    "over root": lambda h: h / torch.sqrt(h.pow(2).mean(-1, True) + 1e-6),
    "sum over n": lambda h: h * torch.rsqrt(h.pow(2).sum(-1, True) / 16 + 1e-6),
    "sum times 1/n": lambda h: h * torch.rsqrt(h.pow(2).sum(-1, True) * (1 / 16) + 1e-6),
    "sum over size": lambda h: h * torch.rsqrt(h.pow(2).sum(-1, True) / h.shape[-1] + 1e-6),
    "unsqueezed": lambda h: h * torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + 1e-6),
    "eps first": lambda h: torch.rsqrt(1e-6 + h.pow(2).mean(-1, True)) * h,
    "copies": lambda h: h.clone() * torch.rsqrt(h.contiguous().pow(2).mean(-1, True).clone() + 1e-6),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form(compiled, form, dtype):
    check(compiled, FORMS[form], randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(compiled, spelling):
    program = SPELLINGS[spelling]
    check(compiled, lambda x, w: w * program(x), randn(2, 3, 16), randn(16))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 4, 16), (0, 16)], ids=str)
def test_rank(compiled, shape):
    out, rec = compiled(FORMS["llama"], randn(*shape), randn(16))
    assert rec.counts() == {"rms_norm": 1}
    assert out.shape == shape


def test_wide_weight_on_a_narrow_norm_keeps_its_width(compiled):
    x, w = randn(2, 3, 16, dtype=torch.bfloat16), randn(16)
    check(compiled, FORMS["llama"], x, w)
    check(compiled, t5, x, w)


def test_rounding_is_kept_as_the_model_has_it(compiled):
    x, w = randn(2, 3, 16, dtype=torch.bfloat16), randn(16, dtype=torch.bfloat16)
    for form, round_to in (("llama", "torch.bfloat16"), ("olmo", "None"), ("gemma", "None")):
        rec = check(compiled, FORMS[form], x, w)
        assert rec.graphs[0].steps[0].tags["round_to"] == round_to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["llama", "gemma", "t5", "F.rms_norm"])
def test_residual_sum_is_returned(compiled, form, dtype):
    def program(x, r, w):
        h = r + x
        return FORMS[form](h, w), h * 2  # h itself would be returned as h.float() where that is h

    args = randn(2, 3, 16, dtype=dtype), randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype)
    check(compiled, program, *args, op="add_rms_norm")


def test_residual_sum_used_by_the_norm_only(compiled):
    x, r, w = randn(2, 16), randn(2, 16), randn(16)
    check(compiled, lambda x, r, w: FORMS["llama"](x + r, w), x, r, w, op="add_rms_norm")


def test_two_norms_of_one_sum_take_the_add_once(compiled):
    def program(x, r, w, v):
        h = x + r
        return FORMS["llama"](h, w), FORMS["llama"](h, v)

    _, rec = compiled(program, randn(2, 16), randn(2, 16), randn(16), randn(16))
    assert sorted(s.op for s in rec.sites) == ["add_rms_norm", "rms_norm"]


def test_sum_behind_a_shared_cast_stays(compiled):
    def program(x, r, w):
        h = (x + r).float()
        return w * norm(h).to(x.dtype), h

    args = randn(2, 16, dtype=torch.bfloat16), randn(2, 16, dtype=torch.bfloat16), randn(16, dtype=torch.bfloat16)
    check(compiled, program, *args, op="rms_norm")


@pytest.mark.parametrize(
    "add", [lambda x, r: x + r[..., :1], lambda x, r: torch.add(x, r, alpha=2), lambda x, r: x + 1.0]
)
def test_other_adds_are_left_alone(compiled, add):
    check(compiled, lambda x, r, w: FORMS["llama"](add(x, r), w), randn(2, 16), randn(2, 16), randn(16))


@pytest.mark.parametrize("example", list(FuseRMSNorm().examples()), ids=lambda e: e.name)
def test_example(compiled, example):
    rec = check(compiled, example.program, *example.inputs(), sites=example.sites, op=None)
    assert example.refused is None or any(example.refused in reason for reason, _ in misses(rec))


MODELS = [
    "llama.LlamaRMSNorm",
    "mistral.MistralRMSNorm",
    "qwen2.Qwen2RMSNorm",
    "olmo2.Olmo2RMSNorm",
    "gemma.GemmaRMSNorm",
    "gemma3.Gemma3RMSNorm",
    "t5.T5LayerNorm",
    "gpt_oss.GptOssRMSNorm",
    "helium.HeliumRMSNorm",
    "deepseek_v4.DeepseekV4UnweightedRMSNorm",
    "llama4.Llama4TextL2Norm",
    "mamba2.Mamba2RMSNorm",
]


@pytest.mark.parametrize(
    "dtype, dynamic", [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_real_bodies(compiled, name, dtype, dynamic):
    file, _, cls = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    made = getattr(module, cls)
    model = made() if cls.startswith(("DeepseekV4", "Llama4")) else made(16)
    model = model.to(dtype)
    for p in model.parameters():
        nn.init.normal_(p)
    check(compiled, lambda x: model(x), randn(2, 3, 16, dtype=dtype), dynamic=dynamic)


def test_dynamic_shapes_are_not_specialised(compiled):
    def program(x, r, w):
        h = x + r
        return FORMS["llama"](h, w), h * 2

    w = randn(16)
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        fn = torch.compile(program, backend="fxopt", dynamic=True, options={"fusions": ["rms_norm"]})
        for tokens in (3, 5, 7):
            x = randn(2, tokens, 16)
            torch.testing.assert_close(fn(x, x + 1, w), program(x, x + 1, w))
    assert len(rec.graphs) == 1
    assert rec.counts() == {"rms_norm": 1}


def inner_value(x, w):
    v = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(v + 1e-6)), v


REFUSED = {
    "over dim 1": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
        "mean reduces over dim 1, the pattern over the last",
    ),
    "over two dims": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + 1e-6)),
        "mean reduces over dims 1, 2, the pattern over the last",
    ),
    "over all": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean() + 1e-6)),
        "mean reduces over all dims, the pattern over the last",
    ),
    "no keepdim": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6)),
        "mean has keepdim=False, the pattern True",
    ),
    "eps outside the root": (
        lambda x, w: w * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6)),
        "mean is used by sqrt, in the pattern by add",
    ),
    "cubed": (
        lambda x, w: w * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6)),
        "(pow with the number 3) where the pattern has square",
    ),
    "absolute": (
        lambda x, w: w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)),
        "abs_1 where the pattern has square",
    ),
    "another x": (
        lambda x, w: w * ((x + w) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "where x is",
    ),
    "inner value returned": (inner_value, "the inner value mean is returned"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(compiled, case):
    program, reason = REFUSED[case]
    refused(compiled, program, randn(16, 16, 16), randn(16), reason=reason)


def test_a_sum_is_not_a_mean(compiled):
    check(compiled, lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), randn(2, 16), sites=0)
    check(compiled, lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6), randn(2, 16), sites=0)


def test_statistics_in_bfloat16_are_refused(compiled):
    refused(compiled, lambda x: norm(x), randn(2, 16, dtype=torch.bfloat16), reason="is computed in bfloat16")


def test_statistics_in_float64_are_refused_for_float32(compiled):
    refused(compiled, lambda x: norm(x.double()).float(), randn(2, 16), reason="is computed in float64")


def test_float64_stays_float64(compiled):
    check(compiled, lambda x, w: w * norm(x), randn(2, 16).double(), randn(16).double())


@pytest.mark.parametrize("shape", [(1,), (3, 16), (3, 1), ()], ids=str)
def test_what_is_no_weight_stays_outside(compiled, shape):
    """The norm alone is fused; the product with something of another shape remains."""
    rec = check(compiled, lambda x, w: w * norm(x), randn(2, 3, 16), randn(*shape))
    assert rec.graphs[0].steps[0].tags["weight"] == "none"


def test_a_weight_of_one_element_for_rows_of_one(compiled):
    rec = check(compiled, lambda x, w: w * norm(x), randn(3, 1), randn(1))
    assert rec.graphs[0].steps[0].tags["weight"] == "plain"


def test_the_norm_of_a_transposed_tensor_in_bfloat16(compiled):
    def program(x):
        heads = x.view(2, 5, 4, 16).transpose(1, 2)
        return heads * torch.rsqrt(heads.float().square().mean(-1, keepdim=True) + 1e-6).to(heads.dtype)

    check(compiled, program, randn(2, 5, 64, dtype=torch.bfloat16))


def test_norm_used_with_two_weights_is_fused_without(compiled):
    def program(x, w, v):
        n = norm(x)
        return w * n, v * n

    rec = check(compiled, program, randn(2, 16), randn(16), randn(16))
    assert rec.graphs[0].steps[0].tags["weight"] == "none"


def test_write_to_x_between_is_seen(compiled):
    def program(x, w):
        h = x.float()
        y = h + 1
        x.add_(1.0)
        return w * norm(h).to(x.dtype), y

    x, w = randn(2, 16, dtype=torch.bfloat16), randn(16, dtype=torch.bfloat16)
    out, rec = compiled(program, x.clone(), w)
    torch.testing.assert_close(out, program(x.clone(), w))
    assert rec.counts() == {}
    assert any("writes to" in reason for reason, _ in misses(rec))


def test_gradients(compiled):
    x, w = randn(2, 16).requires_grad_(), randn(16).requires_grad_()
    torch._dynamo.reset()
    with fxopt.record() as rec:
        fn = torch.compile(FORMS["llama"], backend="fxopt", options={"fusions": ["rms_norm"]})
        fn(x, w).square().sum().backward()
    assert rec.counts() == {"rms_norm": 1}
    grads = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    FORMS["llama"](x, w).square().sum().backward()
    torch.testing.assert_close(grads, (x.grad, w.grad))
