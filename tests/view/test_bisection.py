"""fxopt.bisect finds the first rewrite that breaks a check, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fxopt
from fxopt import Fusion, Match, fused_op

aten = torch.ops.aten


@fused_op("test_bisect_exp(Tensor x) -> Tensor")
def lying_exp(x):
    return x.exp()


@lying_exp.fake
def _(x):
    return torch.empty_like(x)


@lying_exp.implementation("decomposed")
def _(x):
    return x.exp() if x.shape[-1] != 7 else x.exp() + 1  # right at every size but one, and unchecked there


@dataclass(frozen=True)
class FuseExp(Fusion):
    """exp(x) -> test_bisect_exp(x)"""

    anchors = (aten.exp.default,)

    def find(self, node, scope):
        return Match((node,), frozenset({node}), {"x": node.args[0]})

    def rewrite(self, match):
        return match.call(lying_exp, match["x"])


@pytest.fixture(autouse=True)
def _registered(without_inductor):
    fxopt.register(FuseExp())
    yield
    fxopt.unregister("exp")


class Model(torch.nn.Module):
    """Five exponentials; those with 7 columns are broken by the fusion."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, width) for width in widths)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return [layer(x).exp() for layer in self.layers]


TRUSTING = {"verify": "off"}


def bisect(*widths, **more):
    with torch.no_grad():
        return fxopt.bisect(Model(*widths), torch.randn(3, 5), **{"options": TRUSTING, **more})


@pytest.mark.parametrize("widths, index", [((7, 4, 4), 1), ((4, 4, 7, 4, 7), 3), ((4, 4, 4, 4, 7), 5)])
def test_finds_the_first_bad_one(widths, index):
    found = bisect(*widths)
    assert (found.index, found.total) == (index, len(widths))
    assert found.step.fusion == "exp"
    assert found.tries <= 2 + 3
    for words in (f"rewrite {index} of {len(widths)}", "layer(x).exp()", "test_bisection.py", '"disable": ["exp"]'):
        assert words in str(found), words


def test_nothing_to_find():
    found = bisect(4, 4)
    assert found.step is None
    assert found.tries == 1
    assert str(found) == "the check passes with every rewrite (2 rewrites, 1 compilations)"


def test_not_the_rewrites_fault():
    found = bisect(4, 4, check=lambda out: False)
    assert found.step is None
    assert "without any rewrite too: it returned false" in str(found)


def test_a_check_of_ones_own():
    assert bisect(4, 7, check=lambda out: out[1].min() < 1).index == 2


def test_a_check_that_raises():
    def check(out):
        torch.testing.assert_close(out[1].log().exp() - 1, out[1])

    assert "AssertionError" in bisect(4, 7, check=check).reason


def test_the_verifier_would_not_let_it_pass():
    assert bisect(4, 7, options={"verify": "numeric"}).step is None


def test_model_inputs_and_generators_are_left_as_they_were():
    model, x = Model(7, 4), torch.randn(3, 5)
    kept, state = x.clone(), torch.get_rng_state()

    def in_place(x):
        return model(x.mul_(2))

    with torch.no_grad():
        fxopt.bisect(model, {"x": x}, options=TRUSTING)
        assert model.calls == 0
        assert fxopt.bisect(in_place, (x,), options=TRUSTING).index == 1
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_across_graph_breaks_and_in_training():
    model = Model(4, 7)

    def step(x):
        first = model.layers[0](x).exp()
        torch._dynamo.graph_break()
        loss = first.sum() + model.layers[1](x).exp().sum()
        return loss

    found = fxopt.bisect(step, (torch.randn(3, 5),), options=TRUSTING)
    assert (found.index, found.total) == (2, 2)


def test_a_model_that_fails_eagerly_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fxopt.bisect(Model(4), torch.randn(3, 6))
