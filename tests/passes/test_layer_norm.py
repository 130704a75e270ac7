"""LayerNorm: whole, spelled out, with a residual, and what looks like one and is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.layer_norm import FuseLayerNorm

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def compiled(monkeypatch):
    """compiled(program, *inputs) -> (result, report), with the norm fusions and no lowering (seconds a test)."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("fxopt.backend.compile_graph", lambda module, inputs, options: aot_eager(module, inputs))

    def run(program, *inputs, dynamic=False):
        torch._dynamo.reset()
        with fxopt.record() as rec, torch.no_grad():
            options = {"fusions": ["layer_norm", "rms_norm"]}
            out = torch.compile(program, backend="fxopt", dynamic=dynamic, fullgraph=True, options=options)(*inputs)
        return out, rec

    return run


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def misses(rec):
    return [(m.fusion, m.reason) for graph in rec.graphs for m in graph.misses]


def check(compiled, program, *inputs, sites=1, op="layer_norm", **options):
    out, rec = compiled(program, *inputs, **options)
    assert rec.counts() == ({"layer_norm": sites} if sites else {}), misses(rec)
    if sites:
        assert op is None or {s.op for s in rec.sites} == {op}
        assert {s.verdict.status for s in rec.sites} == {"equal"}
    eager = program(*inputs)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (out, eager)), strict=True):
        assert a.dtype == b.dtype
        ulp = torch.finfo(b.dtype).eps
        torch.testing.assert_close(a, b, rtol=2 * ulp, atol=4 * ulp)
    return rec


def spelled(h, eps=1e-5):
    m = h.mean(-1, keepdim=True)
    return (h - m) * torch.rsqrt((h - m).pow(2).mean(-1, keepdim=True) + eps)


def once(h, eps=1e-5):
    d = h - h.mean(-1, keepdim=True)
    return d / torch.sqrt((d * d).mean(-1, keepdim=True) + eps)


def by_var(h, eps=1e-5):
    return (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + eps)


def by_correction(h, eps=1e-5):
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + eps).sqrt()


FORMS = {
    "affine": lambda x, w, b: F.layer_norm(x, (16,), w, b),
    "weight": lambda x, w, b: F.layer_norm(x, (16,), w, None, 1e-6),
    "plain": lambda x, w, b: F.layer_norm(x, (16,)),
    "float32 inside": lambda x, w, b: F.layer_norm(x.float(), (16,), w.float(), b.float()).to(x.dtype),
    "cohere": lambda x, w, b: (w.float() * spelled(x.float())).to(x.dtype),
    "deberta": lambda x, w, b: w * once(x.float()).to(x.dtype) + b,
    "bias first": lambda x, w, b: (b + once(x.float()) * w).to(x.dtype),
    "var": lambda x, w, b: by_var(x.float()).to(x.dtype),
    "correction": lambda x, w, b: (by_correction(x.float()) * w + b).to(x.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_form(compiled, form, dtype):
    x, w, b = randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype), randn(16, dtype=dtype)
    check(compiled, FORMS[form], x, w, b)


@pytest.mark.parametrize("example", list(FuseLayerNorm().examples()), ids=lambda e: e.name)
def test_example(compiled, example):
    check(compiled, example.program, *example.inputs(), sites=example.sites, op=None)


@pytest.mark.parametrize("form", ["affine", "cohere", "deberta"])
def test_residual_sum_is_returned(compiled, form):
    def program(x, r, w, b):
        h = r + x
        return FORMS[form](h, w, b), h * 2

    dtype = torch.bfloat16
    args = [randn(2, 3, 16, dtype=dtype), randn(2, 3, 16, dtype=dtype), randn(16, dtype=dtype), randn(16, dtype=dtype)]
    check(compiled, program, *args, op="add_layer_norm")


def test_over_several_dimensions(compiled):
    check(compiled, lambda x, w, b: F.layer_norm(x, (3, 16), w, b), randn(2, 3, 16), randn(3, 16), randn(3, 16))


@pytest.mark.parametrize(
    "name, sizes",
    [("cohere.CohereLayerNorm", (16,)), ("deberta.DebertaLayerNorm", (16,)), ("olmo.OlmoLayerNorm", (16,))],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_real_bodies(compiled, name, sizes, dynamic):
    file, _, cls = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    model = getattr(module, cls)(*sizes).bfloat16()
    for p in model.parameters():
        nn.init.normal_(p)
    check(compiled, lambda x: model(x), randn(2, 3, 16, dtype=torch.bfloat16), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_module(compiled, dynamic):
    norm = nn.LayerNorm(16)
    check(compiled, lambda x: norm(x), randn(2, 3, 16), dynamic=dynamic)


REFUSED = {
    "biased by n - 1": (
        lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5),
        "var has correction=1, the pattern 0",
    ),
    "mean of another dim": (
        lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(1, correction=0, keepdim=True) + 1e-5),
        "var reduces over dim 1, the pattern over the last",
    ),
    "centred on another dim": (
        lambda x, w, b: (x - x.mean(1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5),
        "mean reduces over dim 1, the pattern over the last",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(compiled, case):
    program, reason = REFUSED[case]
    rec = check(compiled, program, randn(2, 16, 16), randn(16), randn(16), sites=0)
    assert any(reason in text for _, text in misses(rec)), misses(rec)


@pytest.mark.parametrize("width, sites", [(2, 0), (3, 0), (4, 1)])
def test_short_rows_keep_their_spelling_in_training(without_inductor, width, sites):
    """Where two elements are nearly equal, a fused gradient has several times the rounding error of the spelled one."""

    def gradient(program, x):
        x = x.clone().requires_grad_()
        program(x).backward(cotangent.to(x.dtype))
        return x.grad

    x, cotangent = randn(400, width), randn(400, width)
    exact = gradient(spelled, x.double())
    with fxopt.record() as rec:
        actual = gradient(torch.compile(spelled, backend="fxopt"), x)
    assert rec.counts() == ({"layer_norm": sites} if sites else {}), misses(rec)
    own = (gradient(spelled, x) - exact).abs().max()
    assert (actual - exact).abs().max() <= 2 * own + torch.finfo(x.dtype).eps
    if not sites:
        assert any(f"rows of {width}" in reason for _, reason in misses(rec))
    with torch.no_grad(), fxopt.record() as rec:
        torch.compile(spelled, backend="fxopt")(x)
    assert rec.counts() == {"layer_norm": 1}


def test_result_wider_than_x_is_refused(compiled):
    args = randn(2, 16, dtype=torch.bfloat16), randn(16), randn(16)
    rec = check(compiled, lambda x, w, b: spelled(x.float()) * w + b, *args, sites=0)
    assert any("the result is torch.float32, x torch.bfloat16" in text for _, text in misses(rec)), misses(rec)
    # The whole op in float32 needs no rounding, so its input is the wide one.
    check(compiled, lambda x, w, b: F.layer_norm(x.float(), (16,), w, b), *args)


def test_batch_norm_of_running_statistics_is_no_layer_norm(compiled):
    check(compiled, lambda x, m, v: (x - m) * torch.rsqrt(v + 1e-5), randn(2, 16), randn(16), randn(16).abs(), sites=0)
