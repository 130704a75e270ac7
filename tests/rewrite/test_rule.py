"""Rules in one line: found in every spelling, put in place, verified like any fusion."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import Miss, Precision, rule
from fxopt.match.pattern import PatternError


@pytest.fixture
def run(without_inductor):
    """run(rule, program, *inputs) -> report; the result is the program's own."""
    names = []

    def compiled(made, program, *inputs, **options):
        names.append(fxopt.register(made).name)
        torch._dynamo.reset()
        with fxopt.record() as rec:
            out = torch.compile(program, backend="fxopt", options={"fusions": [made.name]}, **options)(*inputs)
        torch.testing.assert_close(out, program(*inputs))
        return rec

    yield compiled
    for name in names:
        fxopt.unregister(name)


def applied(rec):
    return [step.fusion for step in rec.steps if step.applied]


x = torch.randn(4, 6)

silu = rule("silu", lambda x: x * torch.sigmoid(x), lambda x: torch.nn.functional.silu(x))


def test_algebra(run):
    rec = run(rule("exp-log", lambda x: x.exp().log(), lambda x: x), lambda x: x.sin().exp().log() + 2, x)
    assert applied(rec) == ["exp-log"]
    assert "exp.default" not in [node.op for node in rec.graphs[0].parts[0].after]


def test_what_the_normal_form_drops_needs_no_rule():
    with pytest.warns(UserWarning, match="rule 'mul-one' will find nothing"):
        rule("mul-one", lambda x: x * 1, lambda x: x)


def test_what_is_returned_as_it_came_is_no_alias_of_the_input(run):
    x = torch.ones(3)
    made = rule("exp-log", lambda x: x.exp().log(), lambda x: x)
    assert applied(run(made, lambda x: x.exp().log(), x))
    out = torch.compile(lambda x: x.exp().log(), backend="fxopt")(x)
    out.add_(1)
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize("program", [lambda x: x.sigmoid() * x, lambda x: x.mul(torch.sigmoid(x))])
def test_found_in_every_spelling(program, run):
    (step,) = [s for s in run(silu, program, x).steps if s.applied]
    assert step.verdict.status == "equal"
    assert "test_rule.py:" in step.rule


def test_near_misses_are_told(run):
    rec = run(silu, lambda x: x * (x + 1).sigmoid(), x)
    assert not applied(rec)
    assert "elsewhere" in rec.misses[0].reason


def square_of_scaled(x, c: float):
    return (x * c) * (x * c)


def test_numbers_are_variables(run):
    made = rule("scale-late", square_of_scaled, lambda x, c: x * x * (c * c))
    rec = run(made, lambda x: (x * 3.0) * (x * 3.0) + (x * 0.5) * (x * 0.5), x)
    assert applied(rec) == ["scale-late"] * 2


def test_dynamic_shapes_and_training(run):
    fresh = torch.randn(4, 6, requires_grad=True)
    assert applied(run(silu, lambda x: x.sigmoid() * x * x.shape[0], fresh, dynamic=True))


def test_a_wrong_rule_is_undone(run):
    rec = run(rule("wrong", lambda x: x.sin().cos(), lambda x: x.cos().sin()), lambda x: x.sin().cos(), x)
    assert not applied(rec)
    assert rec.steps[0].verdict.status == "failed"


def test_a_check_refuses_with_its_reason(run):
    made = rule("narrow", lambda x: x.sin().cos(), lambda x: x.sin().cos(), check=lambda m: Miss("too narrow", m["x"]))
    assert [m.reason for m in run(made, lambda x: x.sin().cos(), x).misses] == ["too narrow"]


def test_an_approximate_rule_runs_only_if_named(without_inductor):
    made = rule("tanh-is-x", lambda x: x.tanh(), lambda x: x, precision=Precision.APPROXIMATE)
    fxopt.register(made)
    try:
        with fxopt.record() as rec:
            torch.compile(lambda x: x.tanh(), backend="fxopt")(x)
    finally:
        fxopt.unregister("tanh-is-x")
    assert not rec.steps


def test_mistakes_are_told_where_the_rule_is_made():
    with pytest.raises(ValueError, match=r"has not: \['y'\]"):
        rule("r", lambda x: x.sin(), lambda x, y: x + y)
    with pytest.raises(ValueError, match="needs a name"):
        rule("", lambda x: x.sin(), lambda x: x)
    with pytest.raises(PatternError, match="creates a tensor"):
        rule("r", lambda x: x.sin() + torch.ones(8), lambda x: x)
