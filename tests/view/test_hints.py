"""What was not fused and could be: the best near miss says why, where, and what would make it fuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt

Q = torch.randn(2, 4, 8, 16)


def attention(q, p=0.0, training=False, keep=False):
    weights = (q @ q.mT * 0.25).softmax(-1)
    out = F.dropout(weights, p, training) @ q
    return (out, weights) if keep else out


def sdpa(q):
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)


def unkept_norm(x):
    mean = x.pow(2).mean(-1, keepdim=True)
    scale = torch.rsqrt(mean + 1e-6)
    return x * scale, scale


def eps_in_a_tensor(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=True, average_attn_weights=False)


CASES = {
    "dropout on the weights": (lambda q: attention(q, 0.1, True), (Q,), "attention", "dropout", "model.eval()"),
    "dropout in SDPA": (sdpa, (Q,), "attention", "dropout is active", "model.eval()"),
    "weights returned": (lambda q: attention(q, keep=True), (Q,), "attention", "are returned", "don't return"),
    "weights returned by a module": (Attention().eval(), (Q[0],), "attention", "also used by", "don't return"),
    "inner value of a norm returned": (unkept_norm, (Q,), "rms_norm", "is returned", "don't return"),
    "eps in a tensor": (eps_in_a_tensor, (Q, torch.tensor(1e-6)), "rms_norm", "eps is a tensor", "Python number"),
}


@pytest.mark.parametrize("program, inputs, fusion, reason, hint", CASES.values(), ids=CASES)
def test_what_would_make_it_fuse(program, inputs, fusion, reason, hint, without_inductor):
    with torch.no_grad():
        told = fxopt.explain(program, *inputs)
    misses = [miss for miss in told.report.misses if miss.fusion == fusion]
    assert misses, str(told)
    best = max(misses, key=lambda miss: miss.progress)
    assert reason in best.reason
    assert hint in (best.hint or "")
    assert best.source
    assert "have it fused" in str(told)
    assert hint in str(told)


def test_doing_what_the_hint_says_fuses(without_inductor):
    with torch.no_grad():
        assert fxopt.explain(lambda q: attention(q, 0.1, False), Q).report.counts() == {"attention": 1}
        assert fxopt.explain(lambda q: attention(q), Q).report.counts() == {"attention": 1}
        assert fxopt.explain(lambda x: unkept_norm(x)[0], Q).report.counts() == {"rms_norm": 1}
        assert fxopt.explain(lambda x: eps_in_a_tensor(x, 1e-6), Q).report.counts() == {"rms_norm": 1}


NOT_FUSED = {
    "softmax over the rows": (lambda q: (q @ q.mT).softmax(-2) @ q, (Q,), "attention"),
    "norm over the wrong dimension": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6),
        (Q,),
        "rms_norm",
    ),
    "layer norm over the rows": (
        lambda x: (x - x.mean(-2, keepdim=True)) * torch.rsqrt(x.var(-2, keepdim=True, correction=0) + 1e-5),
        (Q,),
        "layer_norm",
    ),
    "gate and up broadcast": (lambda x: F.silu(x) * x[..., :1], (Q,), "gated_mlp"),
    "int8 weight with a zero point": (
        lambda x, w: x @ ((w.to(torch.float32) - 3.0) * 0.1).T,
        (torch.randn(4, 32), torch.randint(-100, 100, (64, 32), dtype=torch.int8)),
        "dequant_matmul",
    ),
}


@pytest.mark.parametrize("program, inputs, fusion", NOT_FUSED.values(), ids=NOT_FUSED)
def test_nothing_is_silently_left_unfused(program, inputs, fusion, without_inductor):
    with torch.no_grad():
        report = fxopt.explain(program, *inputs).report
    assert fusion not in report.counts()
    misses = [miss for miss in report.misses if miss.fusion == fusion]
    assert misses, report.graphs[0].before
    assert all(miss.reason and miss.source for miss in misses)


def test_a_softmax_that_is_no_attention_is_named_too(without_inductor):
    with torch.no_grad():
        told = fxopt.explain(lambda x: [(x @ x.mT).softmax(-1).topk(2).indices for x in (x, x + 1)], Q)
    assert told.report.misses == []
    assert "left as they are\n  softmax.int, 2 times: nothing around it looks like attention, at " in str(told)
