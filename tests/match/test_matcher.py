"""The matcher: every spelling of a pattern is found, nothing else is, and a near miss says why."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.graph.scope import Scope
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.pattern import OneOf, Opt, PatternError, cast, upcast
from fxopt.rewrite.pattern_fusion import PatternFusion, traced


def graph_of(program, *inputs, dynamic=False):
    """The normal form of a function, without Dynamo: fake inputs, each dim its own symbol if dynamic."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [mode.from_tensor(i, static_shapes=not dynamic) if isinstance(i, torch.Tensor) else i for i in inputs]
    with mode:
        module = make_fx(program, pre_dispatch=True)(*fakes)
    module.graph.eliminate_dead_code()
    return module.graph


def fusion_of(function, shapes=None):
    @dataclass(frozen=True)
    class Searched(PatternFusion):
        """pattern -> nothing; only searched for in these tests."""

        pattern = staticmethod(function)

        def rewrite(self, match):
            raise NotImplementedError

    Searched.shapes = shapes or {}
    return Searched()


def search(fusion, graph):
    """(matches, misses) at all anchors; overlapping matches are all listed."""
    scope = Scope(graph)
    found = [fusion.find(anchor, scope) for anchor in scope.find(fusion.anchors)]
    return [f for f in found if isinstance(f, Match)], [f for f in found if isinstance(f, Miss)]


def one(pattern, program, *inputs, shapes=None, **options):
    matches, misses = search(fusion_of(pattern, shapes), graph_of(program, *inputs, **options))
    assert len(matches) == 1, misses
    return matches[0]


def none(pattern, program, *inputs, shapes=None, **options):
    matches, misses = search(fusion_of(pattern, shapes), graph_of(program, *inputs, **options))
    assert not matches
    return misses


x, y, z = (torch.randn(2, 3, 8) for _ in range(3))


def test_bindings_and_nodes():
    match = one(lambda x, y: (x * y).tanh(), lambda a, b: (a * b).tanh() + 1, x, y)
    assert {k: v.name for k, v in match.bindings.items()} in ({"x": "a_1", "y": "b_1"}, {"x": "b_1", "y": "a_1"})
    assert {n.name for n in match.nodes} == {"mul", "tanh"}
    assert [n.name for n in match.outputs] == ["tanh"]


COMMUTED = [
    lambda a, b: (a.sin() * b.cos()).tanh(),
    lambda a, b: (b.cos() * a.sin()).tanh(),
]


@pytest.mark.parametrize("program", COMMUTED)
def test_operands_commute(program):
    match = one(lambda x, y: (x.sin() * y.cos()).tanh(), program, x, y)
    assert (match["x"].name, match["y"].name) == ("a_1", "b_1")


@pytest.mark.parametrize("op", [torch.add, torch.mul, torch.maximum, torch.minimum], ids=lambda op: op.__name__)
def test_commutative_ops(op):
    one(lambda x, y: op(x.sin(), y.cos()), lambda a, b: op(b.cos(), a.sin()), x, y)


@pytest.mark.parametrize("op", [torch.sub, torch.div, torch.pow], ids=lambda op: op.__name__)
def test_ops_that_do_not_commute(op):
    none(lambda x, y: op(x.sin(), y.cos()), lambda a, b: op(b.cos(), a.sin()), x, y)


def test_scaled_add_does_not_commute():
    def pattern(x, y):
        return torch.add(x.sin(), y.cos(), alpha=2)

    one(pattern, lambda a, b: torch.add(a.sin(), b.cos(), alpha=2), x, y)
    none(pattern, lambda a, b: torch.add(b.cos(), a.sin(), alpha=2), x, y)
    misses = none(pattern, lambda a, b: torch.add(a.sin(), b.cos()), x, y)
    assert "add has alpha=1, the pattern 2" in [m.reason for m in misses]


def test_backtracking_over_operand_orders():
    """The first order that fits one operand may fail at a variable bound before."""

    def pattern(x, y):
        return ((x.sin() + y.sin()) * x.cos()).tanh()

    for program in (
        lambda a, b: ((a.sin() + b.sin()) * a.cos()).tanh(),
        lambda a, b: ((b.sin() + a.sin()) * a.cos()).tanh(),
        lambda a, b: (a.cos() * (b.sin() + a.sin())).tanh(),
    ):
        match = one(pattern, program, x, y)
        assert (match["x"].name, match["y"].name) == ("a_1", "b_1")


def test_a_variable_is_one_value():
    misses = none(lambda x: x.sin() * x.cos().exp(), lambda a, b: a.sin() * b.cos().exp(), x, y)
    assert any("where x is" in m.reason for m in misses)


def test_numbers():
    def pattern(x, s: float):
        return (x * s).tanh() + s

    assert one(pattern, lambda a: (a * 3.0).tanh() + 3.0, x)["s"] == 3.0
    assert any("where s is" in m.reason for m in none(pattern, lambda a: (a * 3.0).tanh() + 2.0, x))
    assert any("number" in m.reason for m in none(pattern, lambda a, b: (a * b).tanh() + 2.0, x, y))


def test_a_number_may_be_a_scalar_tensor_or_symbolic():
    def pattern(x, s: float):
        return (x * s).tanh()

    assert one(pattern, lambda a, s: (a * s).tanh(), x, torch.tensor(2.0))["s"].name == "s_1"
    match = one(pattern, lambda a: (a * a.shape[1]).tanh(), x, dynamic=True)
    assert isinstance(match.val("s"), torch.SymInt)


def test_division_is_multiplication_by_the_reciprocal():
    assert one(lambda x, s: (x * s).tanh(), lambda a, s: (a * s).tanh(), x, y)
    assert one(_scaled, lambda a: (a / 8.0).tanh(), x)["s"] == 1 / 8
    assert one(_divided, lambda a: (a / 8.0).tanh(), x)["s"] == 8.0
    assert one(_divided, lambda a: (a * 0.125).tanh(), x)["s"] == 8.0


def _scaled(x, s: float):
    return (x * s).tanh()


def _divided(x, s: float):
    return (x / s).tanh()


SPELLINGS = {
    "square": [lambda a: a.square(), lambda a: a * a, lambda a: a**2, lambda a: a.pow(2.0), lambda a: a.clone() * a],
    "rsqrt": [lambda a: a.pow(-0.5), lambda a: 1 / a.sqrt(), lambda a: a.sqrt().reciprocal(), lambda a: 1.0 / a**0.5],
    "mean": [
        lambda a: a.sum(-1) / 8,
        lambda a: a.sum(2) * 0.125,
        lambda a: a.sum(-1) / a.shape[-1],
        lambda a: a.mean([2]),
    ],
    "transpose": [lambda a: a.mT, lambda a: a.permute(0, 2, 1), lambda a: a.swapaxes(2, 1)],
}
CANONICAL = {
    "square": lambda x: x.pow(2).tanh(),
    "rsqrt": lambda x: torch.rsqrt(x).tanh(),
    "mean": lambda x: x.mean(-1).tanh(),
    "transpose": lambda x: x.transpose(-1, -2).tanh(),
}


CANONICAL_ALONE = {
    "square": lambda x: x.pow(2),
    "rsqrt": lambda x: torch.rsqrt(x),
    "mean": lambda x: x.mean(-1),
    "transpose": lambda x: x.transpose(-1, -2),
}


@pytest.mark.parametrize("name, i", [(name, i) for name in SPELLINGS for i in range(len(SPELLINGS[name]))])
def test_spellings(name, i):
    one(CANONICAL[name], lambda a: SPELLINGS[name][i](a).tanh(), x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_pattern_may_be_in_any_spelling(name):
    for spelling in SPELLINGS[name]:
        one(lambda x: spelling(x).tanh(), lambda a: CANONICAL[name](a), x)  # noqa: B023


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_an_anchor(name):
    """The search begins at the op itself, whichever of its spellings the graph has."""
    for spelling in SPELLINGS[name]:
        (match,) = {
            (frozenset(m.nodes), m["x"])
            for m in search(fusion_of(lambda x: CANONICAL_ALONE[name](x)), graph_of(lambda a: spelling(a) + 1, x))[0]  # noqa: B023
        }
        assert match[1].name == "a_1"


@pytest.mark.parametrize(
    "name, program",
    [
        ("square", lambda a: a.pow(3)),
        ("rsqrt", lambda a: a.sqrt()),
        ("mean", lambda a: a.sum(-1)),
        ("mean", lambda a: a.sum(-1) / 7),
        ("transpose", lambda a: a.permute(2, 0, 1)),
    ],
)
def test_what_is_no_spelling(name, program):
    none(CANONICAL[name], lambda a: program(a).tanh(), x)


def test_rank_does_not_matter():
    for shape in ((8,), (3, 8), (2, 3, 4, 8)):
        one(lambda x: x.softmax(-1).sin(), lambda a: a.softmax(a.dim() - 1).sin(), torch.randn(shape))


def test_dimension_is_checked_in_phase_two():
    (miss,) = none(lambda x: x.sin().softmax(-1).cos(), lambda a: a.sin().softmax(0).cos(), x)
    assert miss.reason == "softmax has dim=-3, the pattern -1"
    assert miss.node.name == "softmax"
    (miss,) = none(lambda x: x.sin().amax(-1).cos(), lambda a: a.sin().amax(1).cos(), x)
    assert miss.reason == "amax reduces over dim 1, the pattern over the last"


def test_sees_through_what_changes_no_value():
    def program(a):
        h = a.float().contiguous()
        return (h.sin().clone().view(2, 3, 8) * h.reshape(2, 3, 8)).expand(2, 3, 8).tanh()

    match = one(lambda x: (upcast(x).sin() * upcast(x)).tanh(), program, x.bfloat16())
    assert match["x"].name == "a_1"


def test_does_not_see_through_narrowing_or_reshaping():
    none(lambda x: x.sin().tanh(), lambda a: a.sin().bfloat16().float().tanh(), x)
    none(lambda x: x.sin().tanh(), lambda a: a.sin().view(6, 8).tanh(), x)
    none(lambda x: x.sin().tanh(), lambda a: a.sin().transpose(0, 1).tanh(), x)


def test_computing_in_a_narrower_dtype_is_refused():
    (miss,) = none(lambda x: upcast(x).sin().tanh(), lambda a: a.sin().tanh(), x.bfloat16())
    assert miss.reason == "is computed in bfloat16, the pattern in float32"


def test_shared_cast_is_left_out():
    def program(a):
        h = a.float()
        return h.sin().tanh(), h

    match = one(lambda x: upcast(x).sin().tanh(), program, x.bfloat16())
    assert {n.name for n in match.nodes} == {"sin", "tanh"}
    assert match["x"].name == "a_1"


def test_optional_cast_binds_its_dtype():
    def pattern(x):
        return cast("dtype", x.sin()).tanh()

    assert one(pattern, lambda a: a.sin().half().tanh(), x).tags == {"dtype": torch.float16}
    assert one(pattern, lambda a: a.sin().tanh(), x).tags == {"dtype": None}
    none(pattern, lambda a: a.sin().long().tanh(), x)


def test_alternatives():
    def pattern(x, y):
        return OneOf("form", product=x.sin() * y, sum=x.sin() + y, alone=x.sin()).tanh()

    for program, tag in (
        (lambda a, b: (b * a.sin()).tanh(), "product"),
        (lambda a, b: (a.sin() + b).tanh(), "sum"),
        (lambda a, b: a.sin().tanh(), "alone"),
    ):
        match = one(pattern, program, x, y)
        assert match.tags == {"form": tag}
        assert ("y" in match.bindings) == (tag != "alone")


def test_optional_end_takes_the_longest():
    def pattern(x, y):
        n = x.sin().tanh()
        return Opt("scaled", n * y, n)

    assert one(pattern, lambda a, b: a.sin().tanh() * b, x, y).tags == {"scaled": "yes"}
    assert one(pattern, lambda a, b: a.sin().tanh() - b, x, y).tags == {"scaled": "no"}


def test_wildcards_are_not_bound():
    match = one(lambda x, _anything: (x.sin() + _anything).tanh(), lambda a, b: (a.sin() + b.exp()).tanh(), x, y)
    assert set(match.bindings) == {"x"}


def test_several_outputs():
    match = one(lambda x, y: ((s := x + y).sin().tanh(), s), lambda a, b: ((s := a + b).sin().tanh(), s * 2), x, y)
    assert [n.name for n in match.outputs] == ["tanh", "add"]


def test_inner_value_used_outside():
    (miss,) = none(lambda x: x.sin().tanh().exp(), lambda a: ((t := a.sin().tanh()).exp(), t), x)
    assert miss.reason.startswith("the inner value tanh is returned")


def test_miss_names_the_farthest_failure():
    def pattern(x, y):
        return ((x.sin() * y).softmax(-1).exp() + 1).tanh()

    (miss,) = none(pattern, lambda a, b: ((a.cos() * b).softmax(-1).exp() + 1).tanh(), x, y)
    assert "where the pattern has sin" in miss.reason
    assert miss.progress == 5
    (miss,) = none(pattern, lambda a, b: ((a.sin() * b).softmax(-1).exp() + 1).relu(), x, y)
    assert miss.reason == "add is used by relu, in the pattern by tanh"
    assert none(pattern, lambda a: a.softmax(-1), x) == []


def rms(h, eps: float):
    return h * OneOf("root", rsqrt=torch.rsqrt(s := h.square().mean(-1, keepdim=True) + eps), power=s.exp().rsqrt())


@pytest.mark.parametrize(
    "program, share",
    [
        (lambda a: a * torch.rsqrt(a.abs().mean(-1, keepdim=True) + 1e-6), 5 / 6),  # no square; the product is last
        (lambda a: a * torch.rsqrt(a.square().mean(0, keepdim=True) + 1e-6), 5 / 6),  # a mean of other elements
        (lambda a: a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt(), 3 / 6),  # nothing is multiplied
        (lambda a: a * (a.square().mean(-1, keepdim=True) + 1e-6).rsqrt().exp(), 6 / 6),  # something is in between
        (lambda a: (a.square().mean() + 1e-6).tanh(), 2 / 6),  # nor is a loss a norm
    ],
)
def test_share_of_the_pattern(program, share):
    assert [miss.share for miss in none(rms, program, x)] == [pytest.approx(share)]


def test_alternative_of_no_common_op_is_refused():
    with pytest.raises(PatternError, match="no search can begin"):
        _ = fusion_of(lambda x, y: OneOf("form", a=x, b=y)).anchors


def test_lists_of_tensors():
    one(lambda x, y: torch.cat([x.sin(), y], -1).tanh(), lambda a, b: torch.cat([a.sin(), b], 2).tanh(), x, y)
    none(lambda x, y: torch.cat([x.sin(), y], -1).tanh(), lambda a, b: torch.cat([a.sin(), b, b], 2).tanh(), x, y)
    none(lambda x, y: torch.cat([x.sin(), y], -1).tanh(), lambda a, b: torch.cat([b, a.sin()], 2).tanh(), x, y)


def test_one_value_of_several_results():
    def pattern(x):
        return torch.topk(x.sin(), 2, -1)[0].tanh()

    one(pattern, lambda a: torch.topk(a.sin(), 2)[0].tanh(), x)
    assert any(
        "index=1, the pattern 0" in m.reason for m in none(pattern, lambda a: torch.topk(a.sin(), 2)[1].tanh(), x)
    )
    assert any("k=3, the pattern 2" in m.reason for m in none(pattern, lambda a: torch.topk(a.sin(), 3)[0].tanh(), x))


def test_ops_of_other_namespaces_are_themselves():
    with torch.library._scoped_library("test_matcher", "DEF") as library:
        library.define("exp(Tensor self) -> Tensor")
        library.impl("exp", lambda a: a.clone(), "CompositeExplicitAutograd")
        other = torch.ops.test_matcher.exp
        one(lambda x: other(x.sin()).tanh(), lambda a: other(a.sin()).tanh(), x)
        none(lambda x: x.sin().exp().tanh(), lambda a: other(a.sin()).tanh(), x)
        none(lambda x: other(x.sin()).tanh(), lambda a: a.sin().exp().tanh(), x)


def test_composite_ops_stay_whole():
    def pattern(x, w, b):
        return torch.nn.functional.linear(x, w, b).relu()

    shapes = {"w": (4, 8), "b": (4,)}
    match = one(
        pattern,
        lambda a, w, b: nn.functional.linear(a, w, b).relu(),
        x,
        torch.randn(5, 8),
        torch.randn(5),
        shapes=shapes,
    )
    assert set(match.bindings) == {"x", "w", "b"}
    none(pattern, lambda a, w: nn.functional.linear(a, w).relu(), x, torch.randn(5, 8), shapes=shapes)


def test_symbolic_dims_add_no_guard():
    def pattern(x, y):
        return (x.softmax(-1) * y).tanh()

    graph = graph_of(lambda a, b: (a.softmax(-1) * b).tanh(), x, y, dynamic=True)
    env = next(iter(graph.nodes)).meta["val"].fake_mode.shape_env
    before = len(env.guards)
    matches, _ = search(fusion_of(pattern), graph)
    assert len(matches) == 1
    assert len(env.guards) == before


def test_cost_does_not_grow_with_the_graph():
    def pattern(x, y):
        return ((x.sin() * y).softmax(-1).exp() + 1).tanh()

    def program(layers):
        def run(a, b):
            for _ in range(layers):
                a = ((a.sin() * b).softmax(-1).exp() + 1).tanh()
            return a

        return graph_of(run, x, y)

    fusion = fusion_of(pattern)
    traced(fusion)
    seconds = []
    for layers in (20, 160):
        graph = program(layers)
        scope = Scope(graph)
        anchors = list(scope.find(fusion.anchors))
        assert len(anchors) == layers
        assert all(isinstance(fusion.find(a, scope), Match) for a in anchors)
        best = min(_timed(lambda: [fusion.find(a, scope) for a in anchors]) for _ in range(3))  # noqa: B023
        seconds.append(best / layers)
    assert seconds[1] < 3 * seconds[0], seconds


def _timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
