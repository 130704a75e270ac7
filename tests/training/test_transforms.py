"""torch.func around a compiled function and inside one: what eager mode gives, fused or with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt

pytestmark = pytest.mark.usefixtures("without_inductor")


def loss(model):
    return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().mean()


def check(ours, eager):
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def compiled(program):
    return torch.compile(program, backend="fxopt")


@pytest.fixture
def model(net):
    return net()


@pytest.fixture
def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_functional_call(model, parameters, recorder, sites):
    x = torch.randn(3, 6, 16)
    halved = {name: p * 0.5 for name, p in parameters.items()}
    check(compiled(loss(model))(halved, x), loss(model)(halved, x))
    assert recorder.counts() == sites


TRANSFORMS = {
    "grad": (torch.func.grad, lambda p: (p, torch.randn(3, 6, 16))),
    "grad_and_value": (torch.func.grad_and_value, lambda p: (p, torch.randn(3, 6, 16))),
    "vmap": (lambda f: torch.vmap(f, (None, 0)), lambda p: (p, torch.randn(3, 1, 6, 16))),
    "gradients of each sample": (
        lambda f: torch.vmap(torch.func.grad(f), (None, 0)),
        lambda p: (p, torch.randn(3, 1, 6, 16)),
    ),
    "vjp": (
        lambda f: lambda p, x: torch.func.vjp(lambda y: f(p, y), x)[1](torch.tensor(2.0)),
        lambda p: (p, torch.randn(3, 6, 16)),
    ),
}


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(model, parameters, name, where):
    transform, make = TRANSFORMS[name]
    inputs = make(parameters)
    eager = transform(loss(model))(*inputs)
    with fxopt.record() as rec:
        program = transform(compiled(loss(model))) if where == "around" else compiled(transform(loss(model)))
        ours = program(*inputs)
    check(ours, eager)
    assert all(graph.normalized or graph.reason for graph in rec.graphs)
    if where == "inside":
        assert [graph.entry for graph in rec.graphs] == ["pre-dispatch"]
        assert not rec.graphs[0].turned_away


@pytest.mark.parametrize("where", ["around", "inside"])
def test_jvp(where):
    norm, (x, tangent) = nn.RMSNorm(16), torch.randn(2, 3, 16)

    def program(x, tangent):
        return torch.func.jvp(compiled(norm) if where == "around" else norm, (x,), (tangent,))

    check((program if where == "around" else compiled(program))(x, tangent), torch.func.jvp(norm, (x,), (tangent,)))


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(transform):
    x = torch.randn(4)
    program = transform(lambda x: F.rms_norm(x, (4,)).pow(3).sum())
    check(compiled(program)(x), program(x))


def test_training_through_a_gradient(net, sites, recorder):
    """A penalty on the gradient: both the network and its derivative are differentiated, and what is left fuses."""
    model, x = net(), torch.randn(3, 6, 16)

    def penalised(model, x):
        slope = torch.func.grad(lambda y: model.blocks[0].between(y).pow(3).sum())(x)
        return model(x).square().mean() + slope.square().mean()

    results = []
    for run in (penalised, compiled(penalised)):
        model.zero_grad()
        run(model, x).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    check(*results)
    assert recorder.counts() == sites


def test_an_ensemble_is_trained(net, recorder):
    """vmap over stacked parameters, as ensembles are trained: gradients flow through the batched ops."""
    models, x = [net() for _ in range(2)], torch.randn(3, 6, 16)
    stacked, buffers = torch.func.stack_module_state(models)

    def program(stacked, x):
        each = torch.vmap(lambda p: torch.func.functional_call(models[0], (p, buffers), (x,)))
        return F.layer_norm(each(stacked), (16,)).pow(3).sum()

    results = []
    for run in (program, compiled(program)):
        results.append(torch.autograd.grad(run(stacked, x), list(stacked.values())))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert recorder.counts()["layer_norm"] >= 1
    assert not recorder.graphs[0].reason


@pytest.mark.slow
def test_with_inductor(monkeypatch, net, recorder):
    monkeypatch.undo()
    torch._dynamo.reset()
    block, x = net().blocks[0], torch.randn(3, 6, 16)

    def program(x):
        each = torch.vmap(lambda row: block.between(row).exp())(x)
        slope = torch.func.grad(lambda y: block.before(y).pow(3).sum())(x)
        return block(x + slope).square().mean() + each.mean()

    results = []
    for run in (program, compiled(program)):
        block.zero_grad()
        run(x).backward()
        results.append({name: p.grad.clone() for name, p in block.named_parameters()})
    check(*results)
    assert recorder.counts()["attention"] == 1
