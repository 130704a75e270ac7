"""What ATen spells out below autograd is brought back to the op that the program named; look-alikes are left alone."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

from fxopt.graph.canonical import canonicalise
from fxopt.graph.scope import Scope
from fxopt.match.legality import illegality
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes.raise_linear import RaiseLinear
from fxopt.passes.raise_matmul import RaiseMatmul
from fxopt.passes.raise_split_ops import RaiseSplitOps
from fxopt.rewrite.verify import Verifier

aten = torch.ops.aten
sdpa = F.scaled_dot_product_attention


def raised(rule, program, inputs, dynamic=False):
    """(the op made, verdict) at the first place that the rule finds; the reason where it refuses all; or None."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
    contexts = [StatelessSymbolicContext(dynamic_sizes=[sizes] * x.dim()) for x in inputs]
    fakes = [mode.from_tensor(x, symbolic_context=c) for x, c in zip(inputs, contexts, strict=True)]
    with mode, torch.no_grad():
        module = make_fx(program)(*fakes)
    guards = len(mode.shape_env.guards)
    canonicalise(module)
    scope = Scope(module.graph)
    found = [rule.find(node, scope) for node in scope.find(rule.anchors)]
    for match in found:
        if isinstance(match, Match):
            assert illegality(match, scope) is None
            made = rule.rewrite(match)
            verdict = Verifier("numeric").verify(rule, match, (made,))
            assert len(mode.shape_env.guards) == guards
            return made.target, verdict.status
    return next((miss.reason for miss in found if isinstance(miss, Miss)), None)


def randn(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 5, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape, bias, dtype, dynamic):
    inputs = randn(shape, (6, 4), *[(6,)] * bias, dtype=dtype)
    assert raised(RaiseLinear(), F.linear, inputs, dynamic) == (aten.linear.default, "equal")


def shared_view(x, w):
    rows = x.view(-1, 4)
    return torch.mm(rows, w.t()).view(2, 3, 6), rows.sin()


def other_rows(x, w):
    return torch.mm(x.view(6, 4), w.t()).view(3, 2, 6)


def used_flat_too(x, w):
    product = torch.mm(x.view(6, 4), w.t())
    return product.view(2, 3, 6), product.sin()


@pytest.mark.parametrize("program", [shared_view, other_rows, used_flat_too])
def test_linear_takes_in_only_views_that_are_its_own(program):
    assert raised(RaiseLinear(), program, randn((2, 3, 4), (6, 4))) == (aten.linear.default, "equal")


@pytest.mark.parametrize(
    "program, reason",
    [
        (lambda x, w, b: torch.addmm(b, x, w.t(), alpha=2), "scales one of its terms"),
        (lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5), "scales one of its terms"),
        (lambda x, w, b: torch.addmm(b.expand(3, 6), x, w.t()), "other than one number an output"),
        (lambda x, w, b: torch.addmm(b[:1], x, w.t()), "other than one number an output"),
        (lambda x, w, b: torch.mm(x, w.view(4, 6)), None),
        (lambda x, w, b: torch.mm(x, w[:4, :]), None),
    ],
)
def test_linear_is_refused(program, reason):
    found = raised(RaiseLinear(), program, randn((3, 4), (6, 4), (6,)))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "a, b",
    [
        ((2, 3, 4, 5), (2, 3, 5, 6)),
        ((2, 3, 4, 5), (2, 1, 5, 6)),
        ((1, 3, 4, 5), (2, 1, 5, 6)),
        ((2, 3, 4, 5), (5, 6)),
        ((2, 2, 3, 4, 5), (2, 2, 3, 5, 6)),
    ],
)
def test_matmul(a, b, dynamic):
    assert raised(RaiseMatmul(), torch.matmul, randn(a, b), dynamic) == (aten.matmul.default, "equal")


def test_matmul_of_transposed_heads():
    def scores(q, k):
        return q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2)

    assert raised(RaiseMatmul(), scores, randn((2, 5, 3, 4), (2, 7, 3, 4))) == (aten.matmul.default, "equal")


@pytest.mark.parametrize(
    "program",
    [
        lambda a, b: torch.bmm(a.view(6, 4, 5), b.view(6, 5, 7)).view(3, 2, 4, 7),
        lambda a, b: torch.bmm(a.view(6, 4, 5), b.view(6, 5, 7)).view(2, 3, 28),
        lambda a, b: torch.bmm(a.view(6, 4, 5), b.view(6, 5, 7)).sin(),
        lambda a, b: torch.bmm(a.transpose(0, 1).reshape(6, 4, 5), b.view(6, 5, 7)).view(2, 3, 4, 7),
    ],
)
def test_matmul_is_refused(program):
    found = raised(RaiseMatmul(), program, randn((2, 3, 4, 5), (2, 3, 5, 7)))
    assert found is None or isinstance(found, str)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "program, op",
    [
        (lambda x, w: x.softmax(-1), aten.softmax.int),
        (lambda x, w: x.softmax(0, dtype=torch.float32), aten.softmax.int),
        (lambda x, w: F.layer_norm(x, (8,), w, w, 1e-3), aten.layer_norm.default),
        (lambda x, w: F.layer_norm(x, (8,)), aten.layer_norm.default),
        (lambda x, w: F.scaled_dot_product_attention(x, x, x, scale=0.3), aten.scaled_dot_product_attention.default),
        (
            lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            aten.scaled_dot_product_attention.default,
        ),
        (
            lambda x, w: F.scaled_dot_product_attention(x, x, x, attn_mask=x[..., :1].tanh()),
            aten.scaled_dot_product_attention.default,
        ),
    ],
)
def test_split_ops(program, op, dynamic):
    assert raised(RaiseSplitOps(), program, randn((2, 3, 4, 8), (8,)), dynamic) == (op, "equal")


def test_fused_rms_norm():
    """Where no backend has a kernel for it, a trace spells it out: the graph is made by hand."""
    if not hasattr(aten, "_fused_rms_norm"):
        pytest.skip("this torch has no _fused_rms_norm")
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    both = graph.call_function(aten._fused_rms_norm.default, (x, [8], None, 1e-5))
    norm = graph.call_function(operator.getitem, (both, 0))
    graph.output(norm)
    with FakeTensorMode():
        x.meta["val"] = torch.empty(3, 8)
        both.meta["val"] = aten._fused_rms_norm(x.meta["val"], [8], None, 1e-5)
        norm.meta["val"] = both.meta["val"][0]
    match = RaiseSplitOps().find(both, Scope(graph))
    made = RaiseSplitOps().rewrite(match)
    assert made.target is aten.rms_norm.default
    assert Verifier("numeric").verify(RaiseSplitOps(), match, (made,)).status == "equal"


@pytest.mark.parametrize(
    "program, op, args",
    [
        (
            lambda q: aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True, False, scale=0.3)[0],
            aten.scaled_dot_product_attention.default,
            (None, 0.0, True),
        ),
        (
            lambda q: aten._scaled_dot_product_efficient_attention(q, q, q, None, False, 0.0, True, scale=0.3)[0],
            aten.scaled_dot_product_attention.default,
            (None, 0.0, True),
        ),
        (
            lambda q: aten._scaled_dot_product_cudnn_attention(q, q, q, None, False, 0.0, True, False, scale=0.3)[0],
            aten.scaled_dot_product_attention.default,
            (None, 0.0, True),
        ),
    ],
)
def test_kernels_of_another_device(program, op, args):
    """Their fakes run anywhere: which op is put in their place can be seen without the device."""
    with FakeTensorMode():
        q = torch.empty(2, 3, 16, 8, device="cuda", dtype=torch.float16)
        scope = Scope(make_fx(program)(q).graph)
    (anchor,) = scope.find(RaiseSplitOps.anchors)
    match = RaiseSplitOps().find(anchor, scope)
    assert isinstance(match, Match), match
    node = RaiseSplitOps().rewrite(match)
    assert node.target is op
    assert node.args[-len(args) :] == args
    assert node.kwargs == ({"scale": 0.3} if op is aten.scaled_dot_product_attention.default else {})


@pytest.mark.parametrize(
    "program, reason",
    [
        (lambda x: aten.native_layer_norm(x, [8], None, None, 1e-5)[:2], "uses another result"),
        (lambda x: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, False), "uses another result"),
        (lambda x: aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.5, False)[0], "dropout is active"),
    ],
)
def test_split_ops_are_refused(program, reason):
    assert reason in raised(RaiseSplitOps(), program, randn((2, 3, 4, 8)))


@pytest.mark.parametrize("rule", [RaiseLinear(), RaiseMatmul(), RaiseSplitOps()], ids=lambda r: r.name)
def test_examples(rule):
    for example in rule.examples():
        found = raised(rule, example.program, example.inputs())
        if example.sites:
            assert found[1] == "equal", example.name
        else:
            assert found is None or (example.refused or "") in found, example.name
