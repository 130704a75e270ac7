"""GroupNorm, alone and with the SiLU behind it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.group_norm import FuseGroupNorm

pytestmark = pytest.mark.usefixtures("without_inductor")


def check(program, *inputs, sites=1, silu=None):
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        options = {"fusions": ["group_norm"]}
        out = torch.compile(program, backend="fxopt", fullgraph=True, options=options)(*inputs)
    assert rec.counts().get("group_norm", 0) == sites, rec.misses
    assert {s.verdict.status for s in rec.sites} <= {"equal"}
    assert silu is None or rec.graphs[0].steps[0].tags["silu"] == str(silu)
    torch.testing.assert_close(out, program(*inputs))
    return rec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resnet_block(dtype):
    block = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)).to(dtype)
    check(lambda x: block[1](block[0](x)), torch.randn(2, 8, 3, 5, dtype=dtype), silu=True)
    check(block, torch.randn(2, 8, 3, 5, dtype=dtype), sites=2)


def test_a_result_used_twice_keeps_its_silu_apart():
    check(lambda x: (lambda n: F.silu(n) + n)(F.group_norm(x, 2)), torch.randn(2, 4, 3), silu=False)


def test_dynamic_sizes():
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        norm = nn.GroupNorm(2, 4)
        compiled = torch.compile(norm, backend="fxopt", options={"fusions": ["group_norm"]})
        for size in (3, 5, 7):
            x = torch.randn(2, 4, size, size + 1)
            for dim in (2, 3):
                torch._dynamo.mark_dynamic(x, dim)
            torch.testing.assert_close(compiled(x), norm(x))
    assert len(rec.graphs) == 1
    assert rec.counts() == {"group_norm": 1}


@pytest.mark.parametrize("example", list(FuseGroupNorm().examples()), ids=lambda e: e.name)
def test_example(example):
    rec = check(example.program, *example.inputs(), sites=example.sites)
    assert example.refused is None or any(example.refused in miss.reason for miss in rec.misses)


def test_parameters_of_another_dtype_are_refused():
    x, w = torch.randn(2, 4, 3).bfloat16(), torch.randn(4)
    rec = check(lambda x, w: F.group_norm(x, 2, w), x, w, sites=0)
    assert any("w is torch.float32" in miss.reason for miss in rec.misses)


def test_gradients():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    x = torch.randn(2, 4, 3, requires_grad=True)
    torch._dynamo.reset()
    with fxopt.record() as rec:
        torch.compile(model, backend="fxopt", options={"fusions": ["group_norm"]})(x).square().sum().backward()
    assert rec.counts() == {"group_norm": 1}
    wide = x.detach().double().requires_grad_()
    model.double()(wide).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_it_is_verified_at_small_sizes_with_its_own_channels_and_groups():
    rec = check(nn.GroupNorm(32, 96), torch.randn(1, 96, 64, 48))
    assert "48 as 20, 64 as 24" in rec.sites[0].verdict.detail
