"""Linear layers of one input: which are taken together, and when."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.shared_input_linear import FuseSharedInputLinear

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def run():
    """run(program, *inputs, most_rows=...) -> report, the result compared with eager mode's."""

    def check(program, *inputs, most_rows=16, devices=("cpu",), dynamic=False):
        fxopt.register(FuseSharedInputLinear(most_rows=most_rows, devices=devices))
        torch._dynamo.reset()
        with fxopt.record() as rec, torch.no_grad():
            options = {"fusions": ["gated_mlp", "rms_norm", "shared_input_linear"]}
            compiled = torch.compile(program, backend="fxopt", dynamic=dynamic, fullgraph=True, options=options)
            torch.testing.assert_close(compiled(*inputs), program(*inputs))
        assert {s.verdict.status for s in rec.sites} <= {"equal"}
        return rec

    yield check
    fxopt.unregister("shared_input_linear")


class Heads(nn.Module):
    def __init__(self, count=3, bias=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 8 * (i + 1), bias=bias and i != 1) for i in range(count))

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count, ops", [
    (2, ["linear_pair"]), (3, ["linear_triple"]), (4, ["linear_pair", "linear_pair"]),
    (5, ["linear_pair", "linear_triple"]), (1, []),
])  # fmt: skip
def test_how_many_are_taken_together(run, count, ops, bias):
    rec = run(Heads(count, bias), torch.randn(1, 3, 16))
    assert sorted(site.op for site in rec.sites) == ops


class MLP(nn.Module):
    def __init__(self, bias, router):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 8, bias=bias), nn.Linear(16, 8)
        self.router = nn.Linear(16, 2) if router else None

    def forward(self, x):
        routed = self.router(x).sum(-1, keepdim=True) if self.router else 1.0
        return F.silu(self.gate(x)) * self.up(x) * routed


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router", [False, True])
def test_gate_and_up_take_in_the_activation(run, bias, router):
    rec = run(MLP(bias, router), torch.randn(1, 3, 16))
    assert [site.op for site in rec.sites] == ["gated_linear"]


class Normed(nn.Module):
    def __init__(self, inner, returned=False):
        super().__init__()
        self.norm, self.inner, self.returned = nn.RMSNorm(16, eps=1e-5), inner, returned

    def forward(self, x):
        h = self.norm(x)
        return (self.inner(h), h) if self.returned else self.inner(h)


@pytest.mark.parametrize("inner, ops", [
    (Heads(2), ["linear_pair"]), (Heads(3, bias=True), ["linear_triple"]), (MLP(True, False), ["gated_linear"]),
    (Heads(4), ["linear_pair", "linear_pair", "rms_norm"]), (MLP(False, True), ["gated_linear", "rms_norm"]),
])  # fmt: skip
def test_a_norm_that_only_they_read_is_taken_in(run, inner, ops):
    assert sorted(site.op for site in run(Normed(inner), torch.randn(1, 16)).sites) == ops
    for kept in (run(Normed(inner, returned=True), torch.randn(1, 16)), run(Normed(inner), torch.randn(1, 3, 16))):
        assert [site.op for site in kept.sites].count("rms_norm") == 1


def test_a_gate_that_is_used_elsewhere_stays_in_memory(run):
    def program(x, v, w):
        gate = F.linear(x, v)
        return F.silu(gate) * F.linear(x, w), gate

    rec = run(program, torch.randn(1, 16), torch.randn(8, 16), torch.randn(8, 16))
    assert sorted(site.op for site in rec.sites) == ["gated_activation", "linear_pair"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_many_rows_are_refused(run, dynamic):
    rec = run(Heads(), torch.randn(5, 4, 16), dynamic=dynamic)
    assert rec.counts() == {}
    assert any("up to 16 rows; there are 20" in miss.reason for miss in rec.misses)


def test_off_by_default(run):
    assert run(Heads(), torch.randn(1, 16), most_rows=0).counts() == {}
    assert run(Heads(), torch.randn(1, 16), devices=("cuda",)).counts() == {}
    assert FuseSharedInputLinear().most_rows is None
    assert run(Heads(), torch.randn(1, 16), most_rows=None).counts() == {}


def test_layers_of_other_inputs_stay(run):
    def program(x, y, v, w):
        return F.linear(x, v), F.linear(y, w)

    args = torch.randn(1, 16), torch.randn(1, 16), torch.randn(4, 16), torch.randn(4, 16)
    assert run(program, *args).counts() == {}


def test_a_weight_that_is_made_of_the_other_result_stays(run):
    def program(x, v):
        y = F.linear(x, v)
        return y, F.linear(x, v * y.sum())

    rec = run(program, torch.randn(1, 16), torch.randn(4, 16))
    assert rec.counts() == {}
    assert any("before the input" in miss.reason or "also used" in miss.reason for miss in rec.misses)


def test_gradients(run):
    fxopt.register(FuseSharedInputLinear(most_rows=16, devices=("cpu",)))
    torch._dynamo.reset()
    model, x = Heads(bias=True), torch.randn(3, 16)
    with fxopt.record() as rec:
        compiled = torch.compile(model, backend="fxopt", options={"fusions": ["shared_input_linear"]})
        sum(y.square().sum() for y in compiled(x)).backward()
    assert rec.counts() == {"shared_input_linear": 1}
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(y.square().sum() for y in model.double()(x.double())).backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), p.grad, rtol=1e-4, atol=1e-5)
