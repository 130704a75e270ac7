"""Gated MLPs: every spelling of the activation, every way gate and up are made, and what only looks like one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.gated_mlp import FuseGatedMLP

pytestmark = pytest.mark.usefixtures("without_inductor")

ROOT = math.sqrt(2 / math.pi)
DTYPES = [torch.float32, torch.bfloat16]


def run(program, *inputs, dynamic=False):
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        options = {"fusions": ["gated_mlp"]}
        out = torch.compile(program, backend="fxopt", dynamic=dynamic, fullgraph=True, options=options)(*inputs)
    return out, rec


def check(program, *inputs, sites=1, dynamic=False, **tags):
    out, rec = run(program, *inputs, dynamic=dynamic)
    assert rec.counts().get("gated_mlp", 0) == sites, rec.misses
    assert {s.verdict.status for s in rec.sites} <= {"equal"}
    for step in rec.graphs[0].steps:
        assert tags.items() <= step.tags.items()
    eager = program(*inputs)
    assert out.dtype == eager.dtype
    ulp = torch.finfo(eager.dtype).eps
    torch.testing.assert_close(out, eager, rtol=4 * ulp, atol=4 * ulp * eager.abs().max().item())
    return rec


def pair(dtype=torch.float32):
    return torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8).to(dtype)


ACTIVATIONS = {
    "silu": {
        "F.silu": F.silu,
        "sigmoid": lambda x: x * torch.sigmoid(x),
        "sigmoid first": lambda x: x.sigmoid() * x,
    },
    "gelu": {
        "F.gelu": F.gelu,
        "BERT": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
        "half last": lambda x: x * (1 + torch.erf(x * (1 / math.sqrt(2)))) * 0.5,
        "half of the sum": lambda x: x * (0.5 * (torch.erf(x / 2**0.5) + 1)),
    },
    "gelu_tanh": {
        "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
        "new": lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
        "fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "cube as product": lambda x: x / 2 * (torch.tanh(ROOT * (x + 0.044715 * (x * x * x))) + 1),
        "distributed": lambda x: 0.5 * x + 0.5 * x * torch.tanh(ROOT * x + ROOT * 0.044715 * x**3),
    },
    "quick_gelu": {"CLIP": lambda x: x * torch.sigmoid(1.702 * x), "GPT-OSS": lambda x: x * torch.sigmoid(x * 1.702)},
    "relu": {"F.relu": F.relu},
    "relu2": {"square": lambda x: F.relu(x).square(), "pow": lambda x: F.relu(x) ** 2},
    "sigmoid": {"sigmoid": torch.sigmoid},
}  # fmt: skip
SPELLINGS = [(name, spelling) for name, spellings in ACTIVATIONS.items() for spelling in spellings]


@pytest.mark.parametrize("name, spelling", SPELLINGS)
def test_spelling(name, spelling):
    act = ACTIVATIONS[name][spelling]
    check(lambda g, u: act(g) * u, *pair(), activation=name)
    check(lambda g, u: u * act(g), *pair(torch.bfloat16), activation=name)


def test_a_relu_computed_twice_is_multiplied_as_it_is():
    """Two calls of relu are two nodes; their product is itself a gated activation, of which up is a relu."""
    check(lambda g, u: F.relu(g) * F.relu(g) * u, *pair(), activation="relu")


CASTS = {
    "activation wide": lambda g, u: F.silu(g.float()).to(g.dtype) * u,
    "product wide": lambda g, u: (F.silu(g.float()) * u.float()).to(g.dtype),
    "up narrow": lambda g, u: (F.silu(g.float()) * u).to(g.dtype),
    "left wide": lambda g, u: F.silu(g.float()) * u,
    "rounded, then wide": lambda g, u: F.silu(g).float() * u.float(),
    "spelled out, wide": lambda g, u: (g * torch.sigmoid(g.float())).to(g.dtype) * u,
}


@pytest.mark.parametrize("casts", CASTS)
def test_casts(casts):
    check(CASTS[casts], *pair(torch.bfloat16))


class MLP(nn.Module):
    def __init__(self, fused, bias=False):
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(8, 24 if fused else 12, bias=bias)
        self.gate = None if fused else nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused, origin", [(False, "two linears"), (True, "one linear")])
@pytest.mark.parametrize("dynamic", [False, True])
def test_where_gate_and_up_come_from(fused, origin, bias, dynamic):
    check(MLP(fused, bias), torch.randn(2, 3, 8), dynamic=dynamic, **{"from": origin})


def test_tensors_from_anywhere():
    check(lambda g, u: F.silu(g + 1) * (u + 1), *pair(), **{"from": "tensors"})


@pytest.mark.parametrize("dim", [-1, 1])
def test_glu(dim):
    check(lambda x: F.glu(x, dim), torch.randn(2, 6, 8), **{"from": "glu"})


@pytest.mark.parametrize("name", [
    "llama.LlamaMLP", "gemma.GemmaMLP", "phi3.Phi3MLP", "glm.GlmMLP", "t5.T5DenseGatedActDense",
])  # fmt: skip
def test_real_bodies(name):
    file, _, cls = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    config = getattr(module, cls.removesuffix("MLP").removesuffix("DenseGatedActDense") + "Config")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    sizes = {"d_model": 8, "d_ff": 12} if file == "t5" else sizes
    extra = {"feed_forward_proj": "gated-gelu"} if file == "t5" else {}
    model = getattr(module, cls)(config(**sizes, **extra, pad_token_id=0)).eval()
    check(lambda x: model(x), torch.randn(2, 3, 8))


@pytest.mark.parametrize("example", list(FuseGatedMLP().examples()), ids=lambda e: e.name)
def test_example(example):
    _, rec = run(example.program, *example.inputs())
    assert rec.counts().get("gated_mlp", 0) == example.sites, rec.misses
    assert example.refused is None or any(example.refused in miss.reason for miss in rec.misses)


OTHERS = {
    "another cubic": lambda g, u: 0.5 * g * (1 + torch.tanh(ROOT * (g + 0.05 * g**3))) * u.sum(),
    "a coarse root": lambda g, u: g * 0.5 * (1.0 + torch.erf(g / 1.41421)) * u.sum(),
    "no product": lambda g, u: F.silu(g) + u,
    "an activation's square": lambda g, u: F.silu(g).square() + u,
    "a number": lambda g, u: F.silu(g) * 2.0 + u,
    "a mask": lambda g, u: F.silu(g) * (u > 0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_left_alone(other):
    check(OTHERS[other], *pair(), sites=0)


def test_another_sigmoid_is_a_sigmoid_of_another_value():
    check(lambda g, u: g * torch.sigmoid(1.5 * g), *pair(), activation="sigmoid")


def test_dynamic_shapes_are_not_specialised():
    torch._dynamo.reset()
    model = MLP(True)
    with fxopt.record() as rec, torch.no_grad():
        compiled = torch.compile(model, backend="fxopt", dynamic=True, options={"fusions": ["gated_mlp"]})
        for rows in (3, 5, 7):
            x = torch.randn(2, rows, 8)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(rec.graphs) == 1


@pytest.mark.parametrize("spelling", ["F.gelu", "new"])
def test_gradients(spelling):
    act = ACTIVATIONS["gelu_tanh"][spelling]
    gate, up = (t.requires_grad_() for t in pair())
    torch._dynamo.reset()
    with fxopt.record() as rec:
        compiled = torch.compile(lambda g, u: act(g) * u, backend="fxopt", options={"fusions": ["gated_mlp"]})
        compiled(gate, up).square().sum().backward()
    assert rec.counts() == {"gated_mlp": 1}
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    (act(wide[0]) * wide[1]).square().sum().backward()
    for t, exact in zip((gate, up), wide, strict=True):
        torch.testing.assert_close(t.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_after_a_graph_break():
    def program(g, u):
        g = g + 1
        torch._dynamo.graph_break()
        return F.silu(g) * u

    torch._dynamo.reset()
    inputs = pair()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt", options={"fusions": ["gated_mlp"]})(*inputs)
    assert rec.counts() == {"gated_mlp": 1}
    torch.testing.assert_close(out, program(*inputs))
