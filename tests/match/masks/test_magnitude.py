"""What is added beside finfo.min must be of moderate size, or a mask can't be told apart from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.canonical import canonicalise
from fxopt.graph.scope import Scope
from fxopt.match.masks import read_mask
from fxopt.match.masks.magnitude import MODERATE, is_moderate, is_parameter
from fxopt.match.masks.values import exactly
from lifting import program_of

MIN = torch.finfo(torch.float32).min


def places(x):
    return torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None]


def beside(bias, dtype=torch.float32, compared=False):
    """x is int64 [2, n], f float [n]: the sum of a bias and a causal mask."""

    def mask(x, f):
        i, j = places(x)
        return torch.zeros((), dtype=dtype).masked_fill(j > i, torch.finfo(dtype).min) + bias(x, f, i, j).to(dtype)

    inputs = torch.randint(0, 9, (2, 6)), torch.rand(6)
    if compared:
        return program_of(mask, *inputs)
    module = make_fx(mask, pre_dispatch=True, tracing_mode="fake")(*inputs)
    canonicalise(module)
    node = module.graph.output_node().args[0]
    shape = node.meta["val"].shape
    return read_mask(node, Scope(module.graph), (1,) * (4 - len(shape)) + tuple(shape))


MODERATE_ONES = {
    "a slope times a distance": lambda x, f, i, j: (j - i) * 0.25,
    "integers of an input": lambda x, f, i, j: x[:, None, None].float() * 0.5,
    "sums of them": lambda x, f, i, j: (x.cumsum(1) - 1)[:, None, None] * 0.5,
    "their product": lambda x, f, i, j: ((x.cumsum(1) - 1) * x)[:, None, None] * torch.pow(torch.full((), 0.5), i + 1),
    "a number of an input": lambda x, f, i, j: f[0] * (j - i),
    "powers": lambda x, f, i, j: (j - i) / torch.pow(2, (j + 1).float() * 1.5),
    "what is bounded": lambda x, f, i, j: torch.tanh((j - i) * 0.1) - torch.sigmoid(i * 0.1) * 3,
    "exponents": lambda x, f, i, j: torch.exp((j - i) * 0.1) + torch.sqrt(j.float()) + 1.0 / torch.exp2(i.float()),
    "negated": lambda x, f, i, j: -((j - i) * 0.3).abs(),
}
OTHERS = {
    "an input": lambda x, f, i, j: f[None] * 0.5,
    "an input, bounded": lambda x, f, i, j: torch.tanh(f[None]),
    "a logarithm": lambda x, f, i, j: torch.log((j > 2).float() * 0.5),
    "large": lambda x, f, i, j: (j - i) * 1e30,
    "integers of an input, exponents": lambda x, f, i, j: torch.exp(x[:, None, None] * 0.1),
    "divided by what may be 0": lambda x, f, i, j: 1.0 / ((j - i) * 0.5),
    "powers of what may be negative": lambda x, f, i, j: torch.pow((j - i) * 0.5, 2.5),
}


@pytest.mark.parametrize("bias", MODERATE_ONES.values(), ids=MODERATE_ONES)
def test_a_mask_is_told_apart_from_what_is_certainly_moderate(bias):
    program = beside(bias, compared=True)
    assert program.hard == (MIN,)
    assert program.empty_rows == "never"
    assert program.upper is program.coordinates[-2]
    assert program.bias is not None
    assert is_moderate(program.bias)


@pytest.mark.parametrize("bias", OTHERS.values(), ids=OTHERS)
def test_but_not_from_anything_else(bias):
    program = beside(bias)
    assert getattr(program, "hard", ()) == ()


def test_minima_of_float16_absorb_nothing():
    program = beside(lambda x, f, i, j: (j - i) * 0.25, torch.float16)
    assert getattr(program, "hard", ()) == ()


def test_numbers():
    assert is_moderate(exactly(-MODERATE))
    assert not is_moderate(exactly(2.0), MODERATE)
    for number in (math.nan, math.inf, -math.inf, 1.1e30):
        assert not is_moderate(exactly(number))


def test_parameters_are_known_by_where_they_come_from():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("held", torch.ones(2))

        def forward(self, x):
            return x + self.weight + self.held

    found = {}

    def backend(graph, inputs):
        found.update({n.name: is_parameter(n) for n in graph.graph.nodes})
        return graph

    torch._dynamo.reset()
    torch.compile(Module(), backend=backend)(torch.ones(2))
    assert [name for name, yes in found.items() if yes] == [n for n in found if "parameters_weight" in n]
    assert sum(found.values()) == 1
