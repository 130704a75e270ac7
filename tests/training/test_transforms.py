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
    assert not rec.graphs or any(graph.sites or graph.reason or graph.turned_away for graph in rec.graphs)


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
