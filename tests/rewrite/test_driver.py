"""The driver: what fits is replaced, what is not legal stays, what fails is undone, and the model always runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fxopt
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.ops import fused_op
from fxopt.rewrite.fusion import Fusion

aten = torch.ops.aten


@fused_op("test_sin_cos(Tensor x) -> Tensor")
def sin_cos(x):
    return x.sin().cos()


@sin_cos.fake
def _(x):
    return torch.empty_like(x)


@sin_cos.implementation("decomposed")
def _(x):
    return x.sin().cos()


@dataclass(frozen=True)
class FuseSinCos(Fusion):
    """cos(sin(x)) -> test_sin_cos(x)"""

    anchors = (aten.cos.default,)
    scale: float = 1.0

    def find(self, node, scope):
        sin = node.args[0]
        if sin.target is not aten.sin.default:
            return Miss("cos of something other than sin", sin, 1)
        return Match((node,), frozenset({node, sin}), {"x": sin.args[0]})

    def rewrite(self, match):
        return match.call(sin_cos, match["x"])


@pytest.fixture
def compiled(without_inductor):
    """compiled(program, *inputs, fusion=...) -> (result, report); the fusion is registered for the test only."""
    names = []

    def run(program, *inputs, fusion=None, dynamic=None, **options):
        fusion = fusion or FuseSinCos()
        fxopt.register(fusion)
        names.append(fusion.name)
        torch._dynamo.reset()
        with fxopt.record() as rec:
            out = torch.compile(
                program, backend="fxopt", dynamic=dynamic, options={"fusions": [fusion.name], **options}
            )(*inputs)
        return out, rec

    yield run
    for name in names:
        fxopt.unregister(name)


x = torch.randn(3, 5)


def check(compiled, program, sites, *inputs, **options):
    inputs = inputs or (x,)
    copies = [i.clone() for i in inputs]
    out, rec = compiled(program, *inputs, **options)
    torch.testing.assert_close(out, program(*copies))
    assert rec.counts().get("sin_cos", 0) == sites
    return rec


def test_replaces_every_site(compiled):
    rec = check(compiled, lambda x: x.sin().cos() + (x + 1).sin().cos(), 2)
    assert [s.op for s in rec.sites] == ["test_sin_cos"] * 2
    assert all(s.implementation == "decomposed" for s in rec.sites)
    assert all("in <lambda>" in s.source or "lambda" in s.source for s in rec.sites)


def test_provenance_names_what_was_replaced_and_the_rule(compiled):
    rec = check(compiled, lambda x: x.sin().cos(), 1)
    (step,) = rec.graphs[0].steps
    assert step.replaced == ("sin", "cos")
    assert "test_driver.py:" in step.rule
    assert step.verdict.status == "equal"


def test_refuses_an_inner_value_used_outside(compiled):
    def program(x):
        s = x.sin()
        return s.cos(), s

    rec = check(compiled, program, 0)
    assert "inner value sin is returned" in rec.graphs[0].misses[0].reason


def test_refuses_a_write_between_the_nodes(compiled):
    def program(x):
        y = x.clone()
        s = y.view(-1).sin()
        y.zero_()
        return s.cos() + 0 * y.sum()

    rec = check(compiled, program, 0)
    assert "zero_ writes to a value" in rec.graphs[0].misses[0].reason


def test_a_write_to_the_input_before_the_replacement_stands_is_refused(compiled):
    def program(x):
        s = x.sin()
        x.add_(1)
        return s.cos()

    rec = check(compiled, program, 0)
    assert "writes to a value" in rec.graphs[0].misses[0].reason


def test_refuses_across_a_grad_mode_switch(compiled):
    def program(x):
        s = x.sin()
        with torch.no_grad():
            c = s.cos()
        return c

    fresh = x.clone().requires_grad_()
    rec = check(compiled, program, 0, fresh)
    assert "lies between" in rec.graphs[0].misses[0].reason


def test_near_misses_name_node_reason_and_line(compiled):
    rec = check(compiled, lambda x: x.tan().cos(), 0)
    (miss,) = rec.graphs[0].misses
    assert (miss.fusion, miss.node, miss.reason) == ("sin_cos", "tan", "cos of something other than sin")
    assert "x.tan().cos()" in miss.source


def test_with_symbolic_shapes(compiled):
    rec = check(compiled, lambda x: x.sin().cos() * x.shape[0], 1, dynamic=True)
    assert rec.graphs[0].steps[0].verdict.status == "equal"


def test_inside_training(compiled):
    program = lambda x: x.sin().cos().sum()  # noqa: E731
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    out, rec = compiled(program, mine)
    out.backward()
    program(theirs).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert rec.counts() == {"sin_cos": 1}


def test_after_a_graph_break(compiled):
    def program(x):
        y = x.sin().cos()
        torch._dynamo.graph_break()
        return y.sin().cos()

    rec = check(compiled, program, 2)
    assert len(rec.graphs) == 2


@dataclass(frozen=True)
class WrongNumbers(FuseSinCos):
    """cos(sin(x)) -> sin(cos(x)): wrong on purpose"""

    def rewrite(self, match):
        return match.call(aten.sin.default, match.call(aten.cos.default, match["x"]))


@dataclass(frozen=True)
class WrongShape(FuseSinCos):
    """cos(sin(x)) -> sum(x): wrong on purpose"""

    def rewrite(self, match):
        return match.call(aten.sum.default, match["x"])


@dataclass(frozen=True)
class Raises(FuseSinCos):
    """cos(sin(x)) -> an exception"""

    def rewrite(self, match):
        match.call(aten.sin.default, match["x"])
        raise RuntimeError("out of ideas")


@dataclass(frozen=True)
class FindRaises(FuseSinCos):
    """an exception while looking"""

    def find(self, node, scope):
        raise KeyError("lost")


@pytest.mark.parametrize(
    "fusion, words",
    [(WrongNumbers(), ""), (WrongShape(), "shape"), (Raises(), "out of ideas")],
    ids=["numbers", "shape", "raises"],
)
def test_a_wrong_rewrite_is_undone_and_the_model_is_right(compiled, fusion, words):
    program = lambda x: x.sin().cos() + 1  # noqa: E731
    out, rec = compiled(program, x, fusion=fusion)
    torch.testing.assert_close(out, program(x))
    (step,) = rec.graphs[0].steps
    assert not step.applied
    assert step.verdict.status == "failed"
    assert words in step.verdict.detail
    assert not rec.sites


def test_a_fusion_that_raises_while_looking_is_contained(compiled):
    out, rec = compiled(lambda x: x.sin().cos(), x, fusion=FindRaises())
    torch.testing.assert_close(out, x.sin().cos())
    assert "KeyError" in rec.graphs[0].misses[0].reason


@dataclass(frozen=True)
class Endless(Fusion):
    """neg(x) -> neg(neg(neg(x))): applies to its own results"""

    anchors = (aten.neg.default,)

    def find(self, node, scope):
        return Match((node,), frozenset({node}), {"x": node.args[0]})

    def rewrite(self, match):
        neg = aten.neg.default
        return match.call(neg, match.call(neg, match.call(neg, match["x"])))


def test_a_rule_that_never_ends_is_stopped(compiled, caplog):
    with caplog.at_level("WARNING"):
        out, rec = compiled(lambda x: -x, x, fusion=Endless())
    torch.testing.assert_close(out, -x)
    assert "fusion endless stopped after" in caplog.text
    assert len(rec.graphs[0].steps) < 20


@dataclass(frozen=True)
class RaiseTan(Fusion):
    """sin(x) / cos(x) -> tan(x)"""

    stage = "raise"
    anchors = (aten.div.Tensor,)

    def find(self, node, scope):
        sin, cos = node.args
        if sin.target is not aten.sin.default or cos.target is not aten.cos.default:
            return None
        return Match((node,), frozenset({node, sin, cos}), {"x": sin.args[0]})

    def rewrite(self, match):
        return match.call(aten.tan.default, match["x"])


def test_a_raised_form_that_nothing_fuses_gets_its_own_nodes_back(compiled):
    fxopt.register(RaiseTan())
    try:
        out, rec = compiled(lambda x: x.sin() / x.cos() + x.sin().cos(), x)
    finally:
        fxopt.unregister(RaiseTan().name)
    torch.testing.assert_close(out, x.sin() / x.cos() + x.sin().cos())
    raised = [s for s in rec.graphs[0].steps if s.fusion == "raise_tan"]
    assert [s.applied for s in raised] == [False]
    assert "nothing fused" in raised[0].verdict.detail
    assert "tan" not in rec.graphs[0].after


def test_strides_of_a_returned_value_are_the_originals(compiled):
    out, _ = compiled(lambda x: x.sin().cos().t(), x)
    assert out.stride() == x.sin().cos().t().stride()
