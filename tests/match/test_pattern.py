"""Patterns: what tracing makes of a function, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fxopt.match.pattern import CAST, ONE_OF, UPCAST, OneOf, Opt, PatternError, alternatives, cast, trace, upcast
from fxopt.match.spelling import read


def targets(pattern):
    return [n.target for n in pattern.graph.nodes if n.op == "call_function"]


def test_numbers_become_variables():
    def pattern(x, scale: float, n: int):
        return x.mul(scale).add(1.5).sum(-1) * n

    traced = trace(pattern)
    assert list(traced.variables) == ["x", "scale", "n"]
    mul, add, _, last = (n for n in traced.graph.nodes if n.op == "call_function")
    assert mul.args[1] is traced.variables["scale"]
    assert add.args[1] == 1.5
    assert last.args[1] is traced.variables["n"]


@pytest.mark.parametrize("literal", [0.7310585786, 0.2689414214, 7919, 1.0])
def test_a_number_of_the_pattern_is_never_taken_for_a_variable(literal):
    traced = trace(lambda x, eps: x + literal)
    (add,) = (n for n in traced.graph.nodes if n.op == "call_function")
    assert add.args[1] == literal

    def pattern(x, eps: float):
        return (x + literal) * eps

    add, mul = (n for n in trace(pattern).graph.nodes if n.op == "call_function")
    assert add.args[1] == literal
    assert not isinstance(mul.args[1], float)


def test_a_number_computed_from_a_variable_is_refused():
    def pattern(x, eps: float):
        return x + 2 * eps

    with pytest.raises(PatternError, match="computed from a variable"):
        trace(pattern)


def test_another_path_for_another_number_is_refused():
    def pattern(x, eps: float):
        return x.sin() if eps > 0.5 else x.cos()

    with pytest.raises(PatternError, match="another path"):
        trace(pattern)


def test_sizes_of_the_trace_are_refused():
    with pytest.raises(PatternError, match="sizes of the trace"):
        trace(lambda x: x.view(x.shape[0], -1).sin())


def test_new_tensors_are_refused():
    with pytest.raises(PatternError, match="creates a tensor"):
        trace(lambda x: x + torch.ones(1))


def test_an_output_beside_the_first_is_refused():
    with pytest.raises(PatternError, match="on the way to the first"):
        trace(lambda x: (x.sin(), x.cos()))
    assert len(trace(lambda x: ((s := x.sin()).cos(), s)).outputs) == 2


def test_alternatives_are_one_node():
    def pattern(x, w):
        return OneOf("form", product=x * w, quotient=x / w, plain=x)

    (node,) = (n for n in trace(pattern).graph.nodes if n.target is ONE_OF)
    tag, names, values = alternatives(node)
    assert (tag, names) == ("form", ["product", "quotient", "plain"])
    assert [read(v).op if v.op == "call_function" else v.op for v in values] == ["mul", "div", "placeholder"]


def test_optional_parts_and_casts():
    traced = trace(lambda x, b: cast("out", Opt("bias", upcast(x) + b, upcast(x))))
    assert {ONE_OF, CAST, UPCAST} <= set(targets(traced))


def test_alternatives_of_different_shapes_are_refused():
    with pytest.raises(PatternError, match="one shape"):
        trace(lambda x: OneOf("form", row=x.sum(-1), all=x))


def test_dimensions_are_counted_from_the_end():
    (node,) = (n for n in trace(lambda x: x.mean(2, keepdim=True)).graph.nodes if n.op == "call_function")
    assert node.args[1] == [-1]
    (node,) = (n for n in trace(lambda x: x.transpose(1, 2)).graph.nodes if n.op == "call_function")
    assert node.args[1:] == (-2, -1)


def test_shapes_for_the_trace():
    assert len(targets(trace(lambda x, y: x @ y, {"x": (2, 3), "y": (3, 4)}))) == 1
    with pytest.raises(RuntimeError):
        trace(lambda x, y: x @ y)


def test_tracing_is_unmoved_by_what_surrounds_it():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch._subclasses.FakeTensorMode(), torch.inference_mode():
        inside = trace(lambda x, y: x @ y, {"y": (2, 8, 4)})
    assert targets(inside) == targets(trace(lambda x, y: x @ y, {"y": (2, 8, 4)}))
