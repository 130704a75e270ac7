"""fxopt.explain on small models, through the real backend with a toy fusion; Inductor is left out where not needed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import fxopt.backend
from fxopt.graph.query import is_call
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.ops import fused_op
from fxopt.rewrite.fusion import Fusion
from fxopt.rewrite.plugins import register, unregister
from fxopt.view.explain import explain
from fxopt.view.record import record

aten = torch.ops.aten


@fused_op("view_test_relu_cos(Tensor x) -> Tensor")
def relu_cos(x: Tensor) -> Tensor:
    return x.cos().relu()


@relu_cos.fake
def _(x):
    return torch.empty_like(x)


@relu_cos.implementation("triton", opaque=True, when=lambda target, x: "there is no such kernel")
def _(x):
    raise AssertionError


relu_cos.implementation("decomposed")(relu_cos.reference)


@dataclass(frozen=True)
class FuseReluCos(Fusion):
    """relu(cos(x)) -> view_test_relu_cos(x)"""

    anchors = (aten.relu,)

    def find(self, node, scope):
        inner = node.args[0]
        if not is_call(inner, aten.cos):
            return Miss(f"what relu is taken of is {inner.name}, not a cosine", inner, 1)
        return Match((node,), frozenset({node, inner}), {"x": inner.args[0]})

    def rewrite(self, match):
        return match.call(relu_cos, match["x"])


@pytest.fixture(autouse=True)
def _toy_fusion():
    register(FuseReluCos())
    yield
    unregister("relu_cos")
    torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch):
    monkeypatch.setattr(fxopt.backend, "compile_graph", lambda module, inputs, options: module.forward)


class Layer(nn.Module):
    def __init__(self, breaks=False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.breaks = breaks

    def forward(self, x):
        x = self.linear(x).cos().relu()
        if self.breaks:
            torch._dynamo.graph_break()
        return x.sin().relu()


def model(breaks=False):
    return nn.Sequential(Layer(), Layer(breaks)).eval()


X = torch.ones(2, 4)


def test_what_fused_and_what_did_not(no_inductor):
    shown = str(explain(model(), X))
    assert "2 sites fused (relu_cos 2)" in shown
    assert "fused: relu_cos -> view_test_relu_cos, computed by decomposed, 2 times" in shown
    assert "not by triton: there is no such kernel" in shown
    assert "test_explain.py" in shown
    assert "in forward: x = self.linear(x).cos().relu()" in shown
    assert "in 0 ... 1" in shown
    assert "not fused: relu_cos: what relu is taken of is sin, not a cosine" in shown


def test_the_text_is_the_same_every_time(no_inductor):
    toy = model()
    assert str(explain(toy, X)) == str(explain(toy, X))


def test_another_shape_is_explained_as_itself(no_inductor):
    toy = model(breaks=True)
    first, other = (explain(toy, torch.ones(n, 4)).report for n in (2, 5))  # not a recompile with a symbolic dimension
    assert [graph.nodes for graph in other.graphs] == [graph.nodes for graph in first.graphs]
    assert all('"f32[5, 4]"' in graph.before for graph in other.graphs)


def test_graph_breaks_are_named(no_inductor):
    explained = explain(model(breaks=True), X)
    assert len(explained.breaks) == 1
    assert "test_explain.py" in explained.breaks[0]
    assert "torch._dynamo.graph_break()" in explained.breaks[0]
    assert "graph breaks" in str(explained)
    assert len(explained.report.graphs) >= 2


@dataclass(frozen=True)
class RaiseSquare(Fusion):
    """square(x) -> x * x"""

    stage = "raise"
    anchors = (aten.square,)

    def find(self, node, scope):
        return Match((node,), frozenset({node}), {"x": node.args[0]})

    def rewrite(self, match):
        return match.call(aten.mul.Tensor, match["x"], match["x"])


def test_a_raised_form_that_nothing_fused_is_no_failure(no_inductor):
    register(RaiseSquare())
    try:
        explained = explain(torch.square, X)
    finally:
        unregister("raise_square")
    assert [(step.fusion, step.applied) for step in explained.report.steps] == [("raise_square", False)]
    assert "undone" not in str(explained)
    assert "raise_square" not in str(explained.report)


@dataclass(frozen=True)
class FuseWrongly(Fusion):
    """sin(x) -> relu(cos(x)), which is wrong"""

    anchors = (aten.sin,)

    def find(self, node, scope):
        return Match((node,), frozenset({node}), {"x": node.args[0]})

    def rewrite(self, match):
        return match.call(relu_cos, match["x"])


def test_a_wrong_rewrite_is_told_as_undone(no_inductor):
    register(FuseWrongly())
    try:
        explained = explain(torch.sin, X)
    finally:
        unregister("wrongly")
    assert "undone: wrongly: failed verification" in str(explained)
    assert "1 rewrite undone" in str(explained.report)
    assert explained.report.counts() == {}


def test_no_graph_is_said(no_inductor):
    assert "no graph was captured" in str(explain(lambda x: 1, X))


def test_functions_and_compiled_ones(no_inductor):
    def function(x, scale=1.0):
        return (x * scale).cos().relu()

    assert explain(function, X, scale=2.0).report.counts() == {"relu_cos": 1}
    assert explain(torch.compile(function, backend="eager"), X).report.counts() == {"relu_cos": 1}
    assert explain(torch.compile(model(), backend="eager"), X).report.counts() == {"relu_cos": 2}


@pytest.mark.parametrize("breaks", [False, True])
def test_the_users_compiled_code_is_left_alone(breaks, no_inductor):
    toy = model(breaks)
    compiled = torch.compile(toy, backend="fxopt")
    with record() as first:
        compiled(X)
    explain(toy, X)
    with record() as again:
        compiled(X)
    assert first.graphs
    assert again.graphs == []  # nothing was compiled again


@pytest.mark.skipif(
    "isolate_recompiles" not in (torch.compile.__kwdefaults__ or {}), reason="needs torch.compile(isolate_recompiles=)"
)
def test_explaining_often_does_not_use_up_the_recompile_limit(no_inductor):
    toy = model(breaks=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        counts = [len(explain(toy, X).report.graphs) for _ in range(4)]
    assert len(set(counts)) == 1


def test_code_from_no_file_is_not_said_to_come_from_here(no_inductor):
    scope = {}
    exec("def inner(x):\n    return x.cos().relu()\ndef outer(x):\n    return inner(x)", scope)
    shown = str(explain(scope["outer"], X))
    assert "fused: relu_cos" in shown
    assert "at source line unknown" in shown


def test_random_state_and_grad_mode_are_the_callers(no_inductor):
    modes = []

    def function(x):
        return (x + torch.rand(4)).cos().relu()

    class Watch(nn.Module):
        def forward(self, x):
            modes.append(torch.is_grad_enabled())
            return function(x)

    before = torch.random.get_rng_state()
    explain(Watch(), X)
    with torch.no_grad():
        explain(Watch(), X)
    assert modes == [True, False]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_outer_recorder_hears_it_too(no_inductor):
    with record() as rec:
        explained = explain(model(), X)
    assert rec.counts() == explained.report.counts()


def test_what_the_call_raises_is_raised(no_inductor):
    with pytest.raises((RuntimeError, torch._dynamo.exc.TorchDynamoException), match=r"shapes|size"):
        explain(model(), torch.ones(2, 3))


def test_with_inductor():
    with torch.no_grad():
        explained = explain(model(), X)
    assert explained.report.counts() == {"relu_cos": 2}
    assert "inductor" in str(explained)
