"""Linear layers of few rows: what is taken in with them, what stays, and where."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxopt
from fxopt.kernels.small_linear import small_linear
from fxopt.ops import Target
from fxopt.passes.shared_input_linear import FuseSharedInputLinear
from fxopt.passes.small_linear import FuseSmallLinear
from fxopt.tune import key, may_pay, session, store

pytestmark = pytest.mark.usefixtures("without_inductor")
FUSIONS = ["rms_norm", "gated_mlp", "shared_input_linear", "small_linear"]


@pytest.fixture
def run():
    """run(program, *inputs, most_rows=...) -> report, the result compared with eager mode's."""

    def check(program, *inputs, most_rows=16, dynamic=False, devices=("cpu",), **options):
        fxopt.register(FuseSmallLinear(most_rows=most_rows, devices=devices))
        torch._dynamo.reset()
        with fxopt.record() as rec, torch.no_grad():
            compiled = torch.compile(
                program, backend="fxopt", dynamic=dynamic, fullgraph=True, options={"fusions": FUSIONS, **options}
            )
            torch.testing.assert_close(compiled(*inputs), program(*inputs))
        assert {s.verdict.status for s in rec.sites} <= {"equal"}
        return rec

    yield check
    fxopt.unregister("small_linear")


@pytest.fixture
def taken(run, monkeypatch):
    """taken(program, *inputs) -> the arguments of each small_linear that are given, by name."""
    names = ["x", "w", "bias", "residual", "activation", "norm_weight", "eps", "weight_offset", "round_to", "most_rows"]
    calls = []
    arguments = FuseSmallLinear._arguments

    def noting(self, match):
        found = arguments(self, match)
        calls.append({n for n, a in zip(names, found, strict=True) if a is not None and a != 0.0} - {"x", "w"})
        return found

    monkeypatch.setattr(FuseSmallLinear, "_arguments", noting)

    def ops(program, *inputs, **more):
        calls.clear()
        rec = run(program, *inputs, **more)
        return [s.op for s in rec.sites], set().union(*calls) - {"most_rows"}

    return ops


def x():
    return torch.randn(1, 3, 16)


W, B, R = torch.randn(8, 16), torch.randn(8), torch.randn(1, 3, 8)


def gelu_spelled(h):
    return 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h**3)))


@pytest.mark.parametrize("program, parts", [
    (lambda x: F.linear(x, W), set()),
    (lambda x: F.linear(x, W, B), {"bias"}),
    (lambda x: F.linear(x, W) + R, {"residual"}),
    (lambda x: R + F.linear(x, W, B), {"bias", "residual"}),
    (lambda x: F.gelu(F.linear(x, W, B)), {"bias", "activation"}),
    (lambda x: gelu_spelled(F.linear(x, W)) + R, {"activation", "residual"}),
    (lambda x: F.relu(F.linear(x, W)).square(), {"activation"}),
    (lambda x: F.linear(F.rms_norm(x, (16,), eps=1e-5), W), {"eps"}),
    (lambda x: F.linear(F.rms_norm(x, (16,), W[0], eps=1e-5), W) + R[:, :1], {"eps", "norm_weight", "residual"}),
])  # fmt: skip
def test_what_is_taken_in(taken, program, parts):
    assert taken(program, x()[:, :1] if "eps" in parts else x()) == (["small_linear"], parts)


def test_a_norm_of_several_rows_keeps_its_launch(taken):
    assert taken(lambda x: F.linear(F.rms_norm(x, (16,), eps=1e-5), W), x()) == (["rms_norm", "small_linear"], set())


@pytest.mark.parametrize("program, left", [
    (lambda x: F.linear(x, W) + R[:, :1], {"residual"}),  # broadcast
    (lambda x: torch.add(F.linear(x, W), R, alpha=2), {"residual"}),
    (lambda x: (y := F.linear(x, W)) + y, {"residual"}),
    (lambda x: F.linear(x, W) + R.double(), {"residual"}),
    (lambda x: ((y := F.linear(x, W)) + R, y), {"residual"}),
    (lambda x: (F.silu(y := F.linear(x, W)), y), {"activation"}),
    (lambda x: F.silu(F.linear(x, W).double()), {"activation"}),
    (lambda x: (F.linear(h := F.rms_norm(x, (16,), eps=1e-5), W), h), {"eps"}),
    (lambda x: F.linear(F.rms_norm(x.double(), (16,), eps=1e-5).float(), W), {"eps"}),
])  # fmt: skip
def test_what_stays(taken, program, left):
    ops, parts = taken(program, x()[:, :1] if "eps" in left else x())
    assert "small_linear" in ops
    assert not parts & left


class Block(nn.Module):
    """Attention's projection, a norm and an MLP as in Llama: the residual stream goes on."""

    def __init__(self):
        super().__init__()
        self.o, self.down, self.norm = nn.Linear(16, 16), nn.Linear(24, 16, bias=False), nn.RMSNorm(16, eps=1e-5)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)

    def forward(self, x, residual):
        total = self.o(x) + residual
        h = self.norm(total)
        return self.down(F.silu(self.gate(h)) * self.up(h)) + total


def test_a_norm_gives_the_residual_add_back(taken):
    ops, parts = taken(Block(), x(), x())
    assert ops == ["small_linear", "rms_norm", "gated_activation", "small_linear"]
    assert parts == {"bias", "residual"}


@pytest.mark.parametrize("first", ["small_linear", "shared_input_linear"])
def test_the_norm_goes_to_the_next_layers_in_any_order(run, first):
    shared = FuseSharedInputLinear(most_rows=16, devices=("cpu",))
    second = FuseSmallLinear(most_rows=16, devices=("cpu",))
    fusions = [second, shared] if first == "small_linear" else [shared, second]
    model, given, residual = Block(), x()[:, :1], x()[:, :1]
    try:
        for fusion in fusions:
            fxopt.register(fusion)
        torch._dynamo.reset()
        with fxopt.record() as rec, torch.no_grad():
            compiled = torch.compile(model, backend="fxopt", options={"fusions": FUSIONS})
            torch.testing.assert_close(compiled(given, residual), model(given, residual))
    finally:
        fxopt.unregister("shared_input_linear")
    assert [site.op for site in rec.sites] == ["small_linear", "gated_linear", "small_linear"]
    assert {site.verdict.status for site in rec.sites} == {"equal"}


def test_the_sum_may_be_read_by_the_norm_alone(taken):
    def program(x, r):
        return F.rms_norm(F.linear(x, W) + r, (8,), eps=1e-5)

    assert taken(program, x(), R) == (["small_linear", "rms_norm"], {"residual"})


def test_a_residual_that_comes_later_stays(run):
    def program(x):
        y = F.linear(x, W)
        return y + y.sum(-1, keepdim=True).expand(1, 3, 8).clone()

    run(program, x())  # equal, whatever was found


def test_layers_that_share_their_input_are_left_alone(run):
    assert run(lambda x: (F.linear(x, W), F.linear(x, W.flip(0))), x()).counts() == {}


@pytest.mark.parametrize("dynamic", [False, True])
def test_many_rows_are_refused(run, dynamic):
    rec = run(lambda x: F.linear(x, W), torch.randn(5, 4, 16), dynamic=dynamic)
    assert rec.counts() == {}
    assert any("up to 16 rows; there are 20" in miss.reason for miss in rec.misses)


def test_dynamic_rows(run):
    assert run(lambda x, r: F.linear(x, W, B) + r, x(), torch.randn(1, 3, 8), dynamic=True).counts() == {
        "small_linear": 1
    }


def test_off_where_nothing_was_measured(run):
    assert FuseSmallLinear().most_rows is None
    assert run(lambda x: F.linear(x, W), x(), most_rows=None).counts() == {}
    assert run(lambda x: F.linear(x, W), x(), most_rows=None, tune="full").counts() == {}  # no kernel for a CPU
    assert run(lambda x: F.linear(x, W), x(), most_rows=0).counts() == {}
    assert run(lambda x: F.linear(x, W), x(), devices=("cuda",)).counts() == {}


@pytest.mark.parametrize("target, rows, believed", [
    (Target(torch.device("cuda"), cuda_graphs=True), 1, True),
    (Target(torch.device("cuda"), cuda_graphs=True), 64, True),
    (Target(torch.device("cuda"), cuda_graphs=True), 65, False),
    (Target(torch.device("cuda")), 1, False),
    (Target(torch.device("cuda"), cuda_graphs=True, opaque=False), 1, False),
    (Target(torch.device("cuda"), cuda_graphs=True, training=True), 1, False),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_where_it_is_believed_to_pay(monkeypatch, target, rows, believed, mode):
    pytest.importorskip("triton")
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    with FakeTensorMode(), session(mode, target):
        given, weight = (torch.empty(n, 16, device="cuda", dtype=torch.bfloat16) for n in (rows, 8))
        assert may_pay(small_linear, given, weight) == believed


def test_on_where_it_was_measured_to_pay(run, monkeypatch):
    """The kernel is made to fit the CPU, and a measurement told."""
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    kernel = small_linear.implementations[0]
    fits = dataclasses.replace(kernel, when=None, run=lambda *args, config=None: small_linear.reference(*args))
    monkeypatch.setattr(small_linear, "implementations", [fits, *small_linear.implementations[1:]])
    target = Target(torch.device("cpu"))
    args = key.concrete(small_linear.bind(x(), W))
    with session("auto", target):
        parts = key.describe(small_linear, target, args, {})
    store.save(key.signature(parts), store.Entry(parts, "triton"))
    with session("auto", target):
        assert may_pay(small_linear, x(), W)
        assert not may_pay(small_linear, x(), W, B)
    store.save(key.signature(parts), store.Entry(parts, "decomposed"))
    with session("full", target):
        assert not may_pay(small_linear, x(), W)
        assert may_pay(small_linear, x(), W, B)  # will be measured


def test_gradients(run):
    fxopt.register(FuseSmallLinear(most_rows=16, devices=("cpu",)))
    torch._dynamo.reset()
    model, given, residual = Block(), x()[:, :1], x()[:, :1]
    with fxopt.record() as rec:
        compiled = torch.compile(model, backend="fxopt", options={"fusions": FUSIONS})
        compiled(given, residual).square().sum().backward()
    assert [site.op for site in rec.sites].count("small_linear") == 2
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.double()(given.double(), residual.double()).square().sum().backward()
    for gradient, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient.double(), p.grad, rtol=1e-4, atol=1e-4)


def test_no_guard_is_added_where_sizes_are_symbolic(run):
    """Rows that depend on data can't be asked for: nothing may be asked of them."""

    def program(x, keep, r):
        kept = x[keep]
        return F.linear(kept, W, B) + r[keep]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        given = torch.randn(6, 16), torch.tensor([True, False, True, True, False, True]), torch.randn(6, 8)
        assert run(program, *given).counts() == {"small_linear": 1}
