"""What the tests of attention share: a backend that fuses it, inputs, and how near to eager a result must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxopt.graph.canonical import canonicalise
from fxopt.graph.retrace import retrace
from fxopt.match.miss import NearMiss
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.verify import Verifier

aten = torch.ops.aten
FUSIONS = (RaiseSoftmax(), RaiseEinsum(), FuseAttention())


@dataclass
class Fuser:
    """A backend that fuses attention, runs what is left eagerly, and keeps what happened."""

    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    steps: list = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)

    def __call__(self, module, inputs):
        normal = retrace(module, inputs)
        canonicalise(normal)
        outcome = run_fusions(normal, FUSIONS, Verifier("numeric"))
        normal.recompile()
        self.graphs.append(normal)
        self.steps += [s for s in outcome.steps if s.fusion == "attention"]
        self.misses += [m for m in outcome.misses if m.fusion == "attention"]
        return normal

    def run(self, program, *inputs, dynamic=False):
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(program, backend=self, dynamic=dynamic, fullgraph=True)(*inputs)

    @property
    def sites(self):
        assert all(s.applied for s in self.steps), [s.verdict for s in self.steps]
        return len(self.steps)

    @property
    def calls(self):
        """The arguments of the fused calls."""
        nodes = [n for g in self.graphs for n in g.graph.nodes]
        return [n.args for n in nodes if "fxopt.attention" in str(n.target)]

    @property
    def reasons(self):
        return " | ".join(m.reason for m in self.misses)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(dtype=torch.float32, heads=4, kv_heads=None, rows=5, keys=7, width=8, value_width=None):
    kv_heads = kv_heads or heads
    return (
        randn(2, heads, rows, width, dtype=dtype, seed=1),
        randn(2, kv_heads, keys, width, dtype=dtype, seed=2),
        randn(2, kv_heads, keys, value_width or width, dtype=dtype, seed=3),
    )


def padding(dtype=torch.float32, rows=5, keys=7, fill=None):
    """[2, 1, rows, keys]: the second sample's last keys are padding, and one of its rows is all masked."""
    keep = torch.ones(2, 1, rows, keys, dtype=torch.bool)
    keep[1, :, :, 4:] = False
    keep[1, :, 2] = False
    if fill is None:
        return keep
    return torch.zeros(2, 1, rows, keys, dtype=dtype).masked_fill(~keep, fill)


def causal(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril()


def repeat_kv(x, g):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, g, n, d).reshape(b, h * g, n, d)


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def mul_after(q, k, v, m):
    return attend(q @ k.transpose(-1, -2) * 0.3, v)


def mask_after(q, k, v, m):
    return attend(q @ k.mT * 0.3 + m, v)


def two_masks(q, k, v, m):
    return attend(q @ k.mT + m + m[:1, :1], v)


def compare(actual, program, inputs):
    """float32: 1e-5 of eager. Narrower: no farther from float64 than twice eager's own distance, and an ulp."""
    expected = program(*inputs)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        return
    exact = program(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
    own = (expected.double() - exact).abs().max() + torch.finfo(expected.dtype).eps * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= 2 * own
