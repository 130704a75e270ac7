"""Scores that are the sum of two products become one product of wider heads."""

from __future__ import annotations

import pytest
import torch

import fxopt

pytestmark = pytest.mark.usefixtures("without_inductor")


def latent(q, k, r, s, v):
    return torch.softmax((q @ k.mT + r @ s.mT) * 0.3, -1) @ v


def scaled_apart(q, k, r, s, v):
    return torch.softmax(q @ k.mT / 3.0 + 2.0 * (r @ s.mT) / 5.0, -1) @ v


def three(q, k, r, s, v):
    return torch.softmax(q @ k.mT + r @ s.mT + (r * 2) @ s.mT, -1) @ v


def twins(q, k, r, s, v):
    """LiLT: both sums go to a softmax of their own."""
    one, two = q @ k.mT / 3.0, r @ s.mT / 2.0
    return torch.softmax(one + two, -1) @ v, torch.softmax(two + one, -1) @ s


def used_elsewhere(q, k, r, s, v):
    one = q @ k.mT
    return torch.softmax(one + r @ s.mT, -1) @ v, one.sum()


def broadcast(q, k, r, s, v):
    return torch.softmax(q @ k.mT + r[:1] @ s[:1].mT, -1) @ v


def subtracted(q, k, r, s, v):
    return torch.softmax(q @ k.mT - r @ s.mT, -1) @ v


def no_softmax(q, k, r, s, v):
    return (q @ k.mT + r @ s.mT) @ v


INPUTS = [torch.randn(2, 3, n, d) for n, d in ((5, 8), (7, 8), (5, 4), (7, 4), (7, 8))]


@pytest.mark.parametrize("program, joined, sites", [
    (latent, 1, 1), (scaled_apart, 1, 1), (three, 2, 1), (twins, 1, 2), (used_elsewhere, 0, 0), (broadcast, 0, 1),
    (subtracted, 0, 1), (no_softmax, 0, 0),
])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_program(program, joined, sites, training):
    inputs = [t.clone().requires_grad_(training) for t in INPUTS]
    with fxopt.record() as rec, torch.set_grad_enabled(training):
        out = torch.compile(program, backend="fxopt", fullgraph=True)(*inputs)
    expected = program(*inputs)
    torch.testing.assert_close(out, expected)
    steps = [s for s in rec.steps if s.fusion == "raise_product_sum" and s.applied]
    assert (len(steps), rec.counts().get("attention", 0)) == (joined, sites), rec
    if training:
        total = lambda outs: sum(o.square().sum() for o in (outs if isinstance(outs, tuple) else (outs,)))  # noqa: E731
        found = [torch.autograd.grad(total(o), inputs, allow_unused=True) for o in (out, expected)]
        torch.testing.assert_close(*[[g for g in grads if g is not None] for grads in found], rtol=1e-4, atol=1e-5)


def test_left_alone_where_nothing_fuses():
    with fxopt.record() as rec, torch.no_grad():
        torch.compile(latent, backend="fxopt", options={"disable": ["attention"]})(*INPUTS)
    assert rec.counts() == {}
    assert not any(s.applied for s in rec.graphs[0].steps)


def test_symbolic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(latent, backend="fxopt", dynamic=True, fullgraph=True)
    for rows, keys in ((5, 7), (9, 4)):
        inputs = [torch.randn(2, 3, n, d) for n, d in ((rows, 8), (keys, 8), (rows, 4), (keys, 4), (keys, 8))]
        with fxopt.record() as rec, torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), latent(*inputs))
    del rec
