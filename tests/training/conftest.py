"""What the tests of training share: a small network with the fusions of a transformer, and how twins of it compare."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxopt


class Block(nn.Module):
    """x + attention(RMSNorm(x)), then x + MLP(LayerNorm(x))."""

    def __init__(self, width=16, heads=2, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.RMSNorm(width, eps=1e-5), nn.LayerNorm(width)
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        batch, rows, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = F.dropout(torch.softmax(q @ k.mT * 0.3, -1), self.dropout, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, rows, width))
        return x + F.silu(self.mlp(self.between(x)))


class Net(nn.Module):
    """Two blocks; `reentrant` (True or False) checkpoints each."""

    def __init__(self, dropout=0.0, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout=dropout) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


SITES = {"rms_norm": 2, "attention": 2, "layer_norm": 2}


@pytest.fixture
def net():
    """net(dropout=, reentrant=): a `Net`."""
    return Net


@pytest.fixture
def sites():
    """What fuses in a `Net`."""
    return SITES


@pytest.fixture
def twins():
    """twins(module) -> (compiled, its module, an equal module for eager mode)."""

    def make(module):
        torch._dynamo.reset()
        return torch.compile(module, backend="fxopt"), module, copy.deepcopy(module)

    return make


@pytest.fixture
def recorder():
    """A recording of all that is compiled during the test."""
    with fxopt.record() as rec:
        yield rec


@pytest.fixture
def same_gradients():
    """same_gradients(a, b): modules with equal gradients, and the same ones None."""

    def check(ours, eager, **tolerance):
        for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))

    return check
