"""Attention weights that multiply from the right."""

from __future__ import annotations

import pytest
import torch

import fxopt

pytestmark = pytest.mark.usefixtures("without_inductor")


def channels_first(q, k, v):
    return v @ (q.mT @ k * 0.5).softmax(-1).transpose(-2, -1)


def scores_turned_instead(q, k, v):
    return v @ (k.mT @ q).softmax(-2)


def used_twice(q, k, v):
    turned = (q.mT @ k).softmax(-1).mT
    return v @ turned, turned.sum()


def no_softmax(q, k, v):
    return v @ (q.mT @ k).sigmoid().mT


INPUTS = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 6)]


@pytest.mark.parametrize(
    "program, sites", [(channels_first, 1), (scores_turned_instead, 1), (used_twice, 0), (no_softmax, 0)]
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_program(program, sites, dynamic):
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt", dynamic=dynamic)(*INPUTS)
    expected = program(*INPUTS)
    torch.testing.assert_close(out, expected)
    assert rec.counts().get("attention", 0) == sites
    if isinstance(out, torch.Tensor):
        assert out.stride() == expected.stride()


def test_left_alone_where_nothing_fuses():
    with fxopt.record() as rec, torch.no_grad():
        torch.compile(channels_first, backend="fxopt", options={"disable": ["attention"]})(*INPUTS)
    assert rec.counts() == {}
    assert [s.applied for s in rec.graphs[0].steps] == [False]


def test_einsum_attention():
    def program(q, k, v):
        weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(0.3).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt")(q, k, v)
    assert rec.counts() == {"attention": 1}
    torch.testing.assert_close(out, program(q, k, v))
