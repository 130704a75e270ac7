"""Plugins that break their contract in every way we could think of: contained, reported by name, the model right."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fxopt
from fxopt import Fusion, Match, fused_op
from fxopt.rewrite import guard

aten = torch.ops.aten


@dataclass(frozen=True)
class Base(Fusion):
    """cos(sin(x)) -> something bad"""

    anchors = (aten.cos.default,)

    def find(self, node, scope):
        sin = node.args[0]
        return Match((node,), frozenset({node, sin}), {"x": sin.args[0]}) if sin.target is aten.sin.default else None

    def rewrite(self, match):
        return self.right(match)

    @staticmethod
    def right(match):
        return match.call(aten.cos.default, match.call(aten.sin.default, match["x"]))


def bad(**methods):
    """A fusion called Bad with these methods in place of its own."""
    return dataclass(frozen=True)(type("Bad", (Base,), {"__doc__": Base.__doc__, **methods}))()


def raises(*_):
    raise RuntimeError("out of ideas")


def endless(*_):
    while True:
        pass


def stubborn(*_):
    while True:
        try:
            sum(range(1000))
        except Exception:  # of whatever kind
            continue


def swallows(*_):
    try:
        endless()
    except BaseException:
        endless()


def erases(self, match):
    made = self.right(match)
    (output,) = match.outputs
    output.replace_all_uses_with(made)
    match.graph.erase_node(output)
    return made


def rewires(self, match):
    made = self.right(match)
    for user in list(match.outputs[0].users):
        user.replace_input_with(match.outputs[0], made)
    return made


def inserts(self, match):
    with match.graph.inserting_before(match.outputs[0]):
        match.graph.call_function(aten.neg.default, (match["x"],))
    return self.right(match)


def retargets(self, match):
    match["x"].graph.output_node().prev.target = aten.neg.default
    return self.right(match)


def looks_and_inserts(self, node, scope):
    with node.graph.inserting_before(node):
        node.graph.call_function(aten.neg.default, (node.args[0],))
    return Base.find(self, node, scope)


def writes_to_its_input(self, match):
    made = self.right(match)
    match.call(aten.mul_.Tensor, match["x"], 2.0)
    return made


def writes_to_a_view(self, match):
    made = self.right(match)
    match.call(aten.zero_.default, match.call(aten.alias.default, match["x"]))
    return made


def too_many(self, match):
    return self.right(match), match["x"]


def nothing(self, match):
    return None


@fused_op("test_bad_writer(Tensor x) -> Tensor")
def writer(x):
    result = x.sin().cos()
    x.zero_()
    return result


@writer.fake
def _(x):
    return torch.empty_like(x)


@fused_op("test_bad_kernel(Tensor x) -> Tensor")
def crooked(x):
    return x.sin().cos()


@crooked.fake
def _(x):
    return torch.empty_like(x)


@crooked.implementation("crooked")
def _(x):
    return x.sin().cos() + 1e-3


@fused_op("test_bad_fake(Tensor x) -> Tensor")
def misshapen(x):
    return x.sin().cos()


@misshapen.fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.float64)


UNDONE = {
    "raises in rewrite": ({"rewrite": raises}, "out of ideas"),
    "wrong shape": ({"rewrite": lambda self, m: m.call(aten.sum.default, m["x"])}, "shape"),
    "wrong dtype": ({"rewrite": lambda self, m: m.call(aten.to.dtype, m["x"], torch.int64)}, "dtype"),
    "wrong numbers": ({"rewrite": lambda self, m: m.call(aten.sin.default, m["x"])}, "other values"),
    "wrong kernel": ({"rewrite": lambda self, m: m.call(crooked, m["x"])}, "less exact"),
    "wrong fake": ({"rewrite": lambda self, m: m.call(misshapen, m["x"])}, "float64"),
    "the input itself": ({"rewrite": lambda self, m: m["x"]}, ""),
    "too many results": ({"rewrite": too_many}, "1 values to replace, 2"),
    "no result": ({"rewrite": nothing}, ""),
    "writes to its input": ({"rewrite": writes_to_its_input}, "writes to"),
    "writes to a view of it": ({"rewrite": writes_to_a_view}, "writes to"),
    "an op that writes": ({"rewrite": lambda self, m: m.call(writer, m["x"])}, "writes to one of its arguments"),
    "endless rewrite": ({"rewrite": endless}, "no answer within"),
}

MISSED = {
    "raises in find": ({"find": raises}, "out of ideas"),
    "raises in check": ({"check": raises}, "out of ideas"),
    "endless find": ({"find": endless}, "no answer within"),
    "endless find that catches": ({"find": stubborn}, "no answer within"),
    "endless find that catches all once": ({"find": swallows}, "no answer within"),
    "a match of nothing": ({"find": lambda self, n, s: Match((), frozenset(), {})}, ""),
}

LEFT_OUT = {
    "erases": ({"rewrite": erases}, "erased"),
    "rewires": ({"rewrite": rewires}, "changed"),
    "inserts": ({"rewrite": inserts}, "inserted neg"),
    "retargets": ({"rewrite": retargets}, "changed"),
    "inserts while looking": ({"find": looks_and_inserts}, "while it looked"),
}


@pytest.fixture
def run(without_inductor, monkeypatch, caplog):
    """run(fusion): the report of a model in which it has a site, whose result is right, and whose input is unharmed."""
    monkeypatch.setattr(guard, "SECONDS", 0.3)

    def compile_and_compare(fusion, **options):
        fxopt.register(fusion)
        x = torch.randn(3, 5)
        given = x.clone()

        def program(x):
            return x.sin().cos() + torch.nn.functional.layer_norm(x, (5,)) * 2

        try:
            with fxopt.record() as rec, caplog.at_level("WARNING", logger="fxopt"):
                out = torch.compile(program, backend="fxopt", options=options)(given)
        finally:
            fxopt.unregister(fusion.name)
        torch.testing.assert_close(out, program(x))
        assert torch.equal(given, x)
        assert rec.counts() == {"layer_norm": 1}  # the good fusions are not harmed
        assert "fusion bad" in caplog.text
        return rec

    return compile_and_compare


@pytest.mark.parametrize("methods, words", UNDONE.values(), ids=UNDONE.keys())
def test_undone(methods, words, run):
    rec = run(bad(**methods))
    (step,) = [s for s in rec.steps if s.fusion == "bad"]
    assert not step.applied
    assert words in step.verdict.detail


@pytest.mark.parametrize("methods, words", MISSED.values(), ids=MISSED.keys())
def test_missed(methods, words, run):
    (miss,) = [m for m in run(bad(**methods)).misses if m.fusion == "bad"]
    assert words in miss.reason


@dataclass(frozen=True)
class Bad(fxopt.PatternFusion):
    """A pattern that can't be traced."""

    def pattern(self, x):
        return x.no_such_method()

    def rewrite(self, match):
        raise AssertionError("never matched")


@pytest.mark.parametrize("fusion", [Bad(), bad(anchors=property(raises))], ids=["pattern", "anchors"])
def test_one_that_can_not_say_where_to_look(fusion, run):
    assert not [s for s in run(fusion).steps if s.fusion == "bad"]


@pytest.mark.parametrize("methods, words", LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_left_out(methods, words, run):
    rec = run(bad(**methods))
    (note,) = rec.graphs[0].notes
    assert "the fusion bad " in note
    assert words in note


def test_one_that_applies_to_its_own_results_is_stopped(run):
    run(bad(find=lambda self, node, scope: Match((node,), frozenset({node}), {"x": node.args[0]}), rewrite=regrow))


def regrow(self, match):
    return match.call(aten.cos.default, match["x"])


def test_without_verification_the_graph_is_still_guarded(run):
    assert "left out" in run(bad(rewrite=erases), verify="off").graphs[0].notes[0]


def test_the_second_entry_names_it_too(without_inductor, caplog):
    fusion = bad(rewrite=erases)
    fxopt.register(fusion)
    try:
        x = torch.randn(4, 3, 5)
        with fxopt.record() as rec, torch.inference_mode():
            out = torch.compile(torch.func.vmap(lambda v: v.sin().cos()), backend="fxopt")(x)
    finally:
        fxopt.unregister("bad")
    torch.testing.assert_close(out, x.sin().cos())
    assert "the fusion bad erased" in caplog.text + str([g.notes for g in rec.graphs])


def test_the_second_entry_loses_that_one_only(without_inductor, monkeypatch):
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "the test says so")
    q = torch.randn(2, 3, 4, 8)

    def program(q):
        return (q @ q.mT).softmax(-1) @ q, q.sin().cos()

    fxopt.register(bad(rewrite=erases))
    try:
        with fxopt.record() as rec, torch.inference_mode():
            out = torch.compile(program, backend="fxopt")(q)
    finally:
        fxopt.unregister("bad")
    torch.testing.assert_close(out, program(q))
    (graph,) = rec.graphs
    assert rec.counts() == {"attention": 1}
    assert [note for note in graph.notes if "left out: the fusion bad erased" in note]
    assert len(graph.parts) == 1
