"""What grows linearly along the keys is a slope times the distance: proved from the expression, not from its values."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.canonical import canonicalise
from fxopt.graph.scope import Scope
from fxopt.match.masks import evaluate, read_mask
from fxopt.match.masks.linear import line
from fxopt.match.miss import Miss

N, HEADS = 6, 3


def program_of(of, dynamic=False):
    """The mask program of a bias; `of(w, i, j)` takes w [HEADS, 1, 1]."""

    def bias(w, x):
        i, j = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[0])[None]
        return of(w[:, None, None], i, j) + torch.zeros(1, 1, 1)

    inputs = torch.rand(HEADS) + 0.5, torch.rand(N)
    module = make_fx(bias, pre_dispatch=True, tracing_mode="symbolic" if dynamic else "fake")(*inputs)
    canonicalise(module)
    node = module.graph.output_node().args[0]
    heads, _, keys = node.meta["val"].shape
    return read_mask(node, Scope(module.graph), (1, heads, keys, keys)), module, inputs


# of -> (by distance, by key)
LINES = {
    "a distance": (lambda w, i, j: w * (j - i), True, False),
    "the other way": (lambda w, i, j: -w * (i - j), True, False),
    "a cast": (lambda w, i, j: (j - i).float() * w * 0.5, True, False),
    "steps of three": (lambda w, i, j: w * (3 * j - 3 * i), True, False),
    "a quotient": (lambda w, i, j: (j - i) / (w + 1.0), True, False),
    "keys": (lambda w, i, j: w * j, False, True),
    "keys from the last": (lambda w, i, j: w * (j - (N - 1)), False, True),
    "a shifted distance": (lambda w, i, j: w * (j - i - 2), False, False),
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_lines(kind, dynamic):
    of, by_distance, by_key = LINES[kind]
    program, module, (w, _) = program_of(of, dynamic)
    found = line(program.bias, program.coordinates)
    assert found is not None
    assert (found.by_distance, found.by_key) == (by_distance, by_key)
    node = next(n for n in module.graph.nodes if n.op == "placeholder")
    slope = evaluate(found.slope, program.coordinates, (1, HEADS, 1, 1), {(node, 0): w}, dtype=torch.float32)
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    exact = of(w[:, None, None], i, j).expand(-1, N, -1)
    torch.testing.assert_close(slope[0] * (j - i) - slope[0] * (0 - i), exact - exact[..., :1])


@pytest.mark.parametrize("of", [
    lambda w, i, j: (w * (j - i)).bfloat16().float(),
    lambda w, i, j: w.half() * (j - i) * 1.0,
    lambda w, i, j: w * (j - i).abs(),
    lambda w, i, j: w * (j - i) * j,
    lambda w, i, j: w / (j - i + 50),
    lambda w, i, j: torch.exp(w * (j - i)),
    lambda w, i, j: w * ((j - i) // 2),
    lambda w, i, j: w * i,
    lambda w, i, j: torch.where(j > 2, w * (j - i), w),
    lambda w, i, j: torch.div(w * (j - i), 2.0, rounding_mode="floor"),
])  # fmt: skip
def test_what_is_no_line(of):
    program, *_ = program_of(of)
    assert isinstance(program, Miss) or line(program.bias, program.coordinates) is None
