"""A softmax written by hand is brought back to one op where that is exact, and left alone where it is not."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.scope import Scope
from fxopt.match.legality import illegality
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes.raise_softmax import RaiseSoftmax
from fxopt.rewrite.verify import Verifier

aten = torch.ops.aten


def over(dim, keepdim=True):
    def program(x):
        e = torch.exp(x - x.amax(dim, keepdim=keepdim))
        return e / e.sum(dim, keepdim=True)

    return program


def with_max(x):
    e = (x - x.max(dim=1, keepdim=True)[0].detach()).exp()
    return e / torch.sum(e, dim=1, keepdim=True)


def no_maximum(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def global_maximum(x):
    e = torch.exp(x - x.max())
    return e / e.sum(-1, keepdim=True)


def other_maximum(x):
    e = torch.exp(x - x.amax(1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def maximum_of_another(x):
    e = torch.exp(x - x.sin().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def wide_sum(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True, dtype=torch.float64).float()


def two_dims(x):
    e = torch.exp(x - x.amax((1, 2), keepdim=True))
    return e / e.sum((1, 2), keepdim=True)


def not_kept(x):
    e = torch.exp(x - x.amax(0))
    return e / e.sum(0)


def find(program, x=None):
    x = torch.randn(3, 4, 5) if x is None else x
    graph = make_fx(program, pre_dispatch=True, tracing_mode="fake")(x).graph
    divisions = [n for n in graph.nodes if n.target is aten.div.Tensor]
    return RaiseSoftmax().find(divisions[-1], Scope(graph)), graph


@pytest.mark.parametrize("program", [over(-1), over(0), over(1), with_max])
def test_found_legal_and_verified(program):
    match, graph = find(program)
    assert isinstance(match, Match), match
    assert illegality(match, Scope(graph)) is None
    made = RaiseSoftmax().rewrite(match)
    assert made.target is aten.softmax.int
    verdict = Verifier("numeric").verify(RaiseSoftmax(), match, (made,))
    assert verdict.status == "equal", verdict


@pytest.mark.parametrize(
    "program, reason",
    [
        (no_maximum, "no maximum is subtracted"),
        (global_maximum, "not the maximum of the slices"),
        (other_maximum, "over dimension 1, the sum over dimension 2"),
        (maximum_of_another, "of another tensor"),
        (two_dims, "not over one dimension"),
        (not_kept, "not over one dimension"),
    ],
)
def test_refused_with_its_reason(program, reason):
    miss, _ = find(program)
    assert isinstance(miss, Miss)
    assert reason in miss.reason


@pytest.mark.parametrize("program", [wide_sum, lambda x: x.exp() / x.sum(-1, keepdim=True)])
def test_other_quotients_are_nothing_like_it(program):
    assert find(program)[0] is None


def test_rows_of_equal_huge_values_stay_uniform():
    x = torch.full((3, 4, 5), torch.finfo(torch.float32).min)
    torch.testing.assert_close(over(-1)(x), torch.softmax(x, -1))
