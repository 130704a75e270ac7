"""L2 norms: every spelling found in models, and what looks like one and is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.passes.l2_norm import FuseL2Norm

pytestmark = pytest.mark.usefixtures("without_inductor")


def check(program, *inputs, sites=1, dynamic=False, **tags):
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        options = {"fusions": ["l2_norm"]}
        out = torch.compile(program, backend="fxopt", dynamic=dynamic, fullgraph=True, options=options)(*inputs)
    assert rec.counts().get("l2_norm", 0) == sites, rec.misses
    assert {s.verdict.status for s in rec.sites} <= {"equal"}
    for step in rec.graphs[0].steps:
        assert tags.items() <= step.tags.items()
    eager = program(*inputs)
    assert out.dtype == eager.dtype
    ulp = torch.finfo(eager.dtype).eps
    torch.testing.assert_close(out, eager, rtol=4 * ulp, atol=4 * ulp)
    return rec


FORMS = {
    "F.normalize": (lambda x: F.normalize(x, dim=-1), "max"),
    "F.normalize, dim 1": (lambda x: F.normalize(x, dim=1, eps=1e-6), "max"),
    "norm": (lambda x: x / x.norm(p=2, dim=-1, keepdim=True), "outside"),
    "linalg": (lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), "outside"),
    "linalg.norm, eps": (lambda x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) + 1e-8), "outside"),
    "clamp": (lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12), "max"),
    "delta net": (lambda x: x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6), "sum"),
    "root of the sum": (lambda x: x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), "sum"),
    "CLIP": (lambda x: x / torch.pow(torch.sum(torch.pow(x, 2), dim=-1, keepdim=True), 0.5), "none"),
    "ESM": (lambda x: x / torch.sqrt(torch.clamp((x**2).sum(-1, keepdim=True), min=1e-12)), "clamp"),
}


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    program, eps = FORMS[form]
    check(program, torch.randn(2, 3, 16), eps=eps)


@pytest.mark.parametrize("form", ["F.normalize", "delta net"])
def test_float32_inside_a_narrow_model_with_dynamic_shapes(form):
    program, _ = FORMS[form]
    check(lambda x: program(x.float()).to(x.dtype), torch.randn(2, 3, 16).bfloat16(), dynamic=True)


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16(form):
    check(FORMS[form][0], torch.randn(2, 3, 16).bfloat16())


@pytest.mark.parametrize("example", list(FuseL2Norm().examples()), ids=lambda e: e.name)
def test_example(example):
    rec = check(example.program, *example.inputs(), sites=example.sites)
    assert example.refused is None or any(example.refused in miss.reason for miss in rec.misses)


OTHERS = {
    "over all": lambda x: x / x.norm(),
    "another x": lambda x: (x + 1) / x.norm(dim=-1, keepdim=True),
    "a mean": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "response": lambda x: x * (x.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_left_alone(other):
    check(OTHERS[other], torch.randn(2, 3, 16), sites=0)


@pytest.mark.parametrize("form", ["F.normalize", "delta net"])
def test_gradients(form):
    x = torch.randn(2, 3, 16)
    x[0, 0] = 0.0
    x.requires_grad_()
    torch._dynamo.reset()
    with fxopt.record() as rec:
        compiled = torch.compile(FORMS[form][0], backend="fxopt", options={"fusions": ["l2_norm"]})
        compiled(x)[..., :3].square().sum().backward()
    assert rec.counts() == {"l2_norm": 1}
    wide = x.detach().double().requires_grad_()
    FORMS[form][0](wide)[..., :3].square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
