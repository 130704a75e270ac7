"""Branches and loops: their graphs are normalised and fused in, with eager mode's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as hop_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import fxopt

aten = torch.ops.aten

pytestmark = pytest.mark.usefixtures("without_inductor")


def attend(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(-1, -2) * 0.5, -1) @ x


def branch(x, flag):
    return torch.cond(flag.sum() > 0, lambda x: attend(x.sin()), lambda x: attend(x).cos(), (x,))


def nested(x, flag):
    def inner(x):
        return torch.cond(x.sum() > 0, attend, torch.clone, (x,))

    return torch.cond(flag.sum() > 0, inner, lambda x: x.exp(), (x,))


def loop(x, flag):
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, attend(y)), (torch.tensor(0), x))[1]


def mapped(x, flag):
    return hop_map(attend, x)


def scanned(x, flag):
    def step(carry, part):
        made = attend(carry + part)
        return made, made * 2

    return scan(step, x[0].clone(), x)[1]


PROGRAMS = {"cond": (branch, 2), "cond in cond": (nested, 1), "map": (mapped, 1), "scan": (scanned, 1)}


def results(run, x, flag, differentiated):
    x = x.clone().requires_grad_(differentiated)
    out = run(x, flag)
    return [out, *(torch.autograd.grad(out.sin().sum(), x) if differentiated else ())]


def check(program, sites, differentiated=False, dtype=torch.float64, **tolerance):
    x = torch.randn(2, 3, 4, dtype=dtype)
    torch._dynamo.reset()
    with fxopt.record() as rec:
        compiled = torch.compile(program, backend="fxopt", fullgraph=True)
        for flag in (torch.ones(2), -torch.ones(2)):
            ours, eager = (results(run, x, flag, differentiated) for run in (compiled, program))
            torch.testing.assert_close(ours, eager, **tolerance)
    assert rec.counts() == {"attention": sites}, [g.reason for g in rec.graphs]


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_fusions_apply_inside(name, differentiated):
    check(*PROGRAMS[name], differentiated)


def test_fusions_apply_inside_a_loop():
    check(loop, 1)


@pytest.mark.parametrize("program, sites", [(branch, 2), (loop, 1)])
def test_under_autocast(program, sites):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(program, sites, dtype=torch.bfloat16, rtol=0.05, atol=0.05)


def test_a_branch_with_a_transform(captured):
    def program(x, flag):
        return torch.cond(flag.sum() > 0, lambda x: torch.vmap(torch.cumsum, (0, None))(x, 0), torch.clone, (x,))

    x = torch.randn(3, 4)
    torch.testing.assert_close(captured.run(program, x, torch.ones(2)), x.cumsum(1))


def test_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(branch, backend="fxopt", dynamic=True)
    with fxopt.record() as rec:
        for rows in (3, 5, 6):
            x = torch.randn(2, rows, 4)
            torch.testing.assert_close(compiled(x, torch.ones(2)), branch(x, torch.ones(2)))
    assert rec.counts() == {"attention": 2}


def test_a_layer_in_a_branch():
    """Weights are operands of the branch: nothing of them is kept."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(4, eps=1e-5)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.norm(x), lambda x: x * 2, (x,))

    model, x = Gated(), torch.rand(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxopt")
    with fxopt.record() as rec, torch.no_grad():
        for factor in (1.0, 3.0):
            model.norm.weight.mul_(factor)
            torch.testing.assert_close(compiled(x), model.norm(x))
    assert rec.counts() == {"rms_norm": 1}


@pytest.mark.slow
def test_with_inductor(monkeypatch):
    monkeypatch.undo()
    for program, sites in ((branch, 2), (loop, 1), (mapped, 1)):
        check(program, sites, dtype=torch.float32, rtol=1e-4, atol=1e-5)
    check(branch, 2, differentiated=True, dtype=torch.float32, rtol=1e-4, atol=1e-5)
