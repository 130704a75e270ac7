"""What was not fused and could be: the best near miss says why, where, and what would make it fuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.view.save import page
from fxopt.view.text import grouped_misses, nearest

Q, W = torch.randn(2, 4, 8, 16), torch.randn(24, 16)


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
    "norm by the unbiased deviation": (
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
        (Q,),
        "layer_norm",
    ),
    "norm with eps outside the root": (
        lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6),
        (Q,),
        "rms_norm",
    ),
    "norm with a clamped root": (
        lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt().clamp(min=1.0),
        (Q,),
        "rms_norm",
    ),
    "L2 norm with eps outside the root": (
        lambda x: x / (x.pow(2).sum(-1, keepdim=True).sqrt() + 1e-6),
        (Q,),
        "l2_norm",
    ),
    "gate and up broadcast": (lambda x: F.silu(x) * x[..., :1], (Q,), "gated_mlp"),
    "gate of another activation": (lambda x: F.mish(F.linear(x, W)) * F.linear(x, W + 1), (Q,), "gated_mlp"),
    "gate of relu6": (lambda x: F.relu6(F.linear(x, W)) * F.linear(x, W + 1), (Q,), "gated_mlp"),
    "gate that is clamped": (lambda x: F.silu(F.linear(x, W)).clamp(max=7.0) * F.linear(x, W + 1), (Q,), "gated_mlp"),
    "float8 weight": (
        lambda x, w: x @ (w.to(torch.float32) * 0.1).T,
        (torch.randn(4, 32), torch.randn(64, 32).to(torch.float8_e4m3fn)),
        "dequant_matmul",
    ),
    "weight in int32": (
        lambda x, w: x @ (w.to(torch.float32) * 0.1).T,
        (torch.randn(4, 32), torch.randint(-8, 8, (64, 32), dtype=torch.int32)),
        "dequant_matmul",
    ),
    "weight from a table": (
        lambda x, w, table: x @ (table[w.long()] * 0.1).T,
        (torch.randn(4, 32), torch.randint(0, 16, (64, 32), dtype=torch.uint8), torch.randn(16)),
        "dequant_matmul",
    ),
    "product of integers": (
        lambda a, b: torch._int_mm(a, b) * 0.1,
        (torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 64, dtype=torch.int8)),
        "dequant_matmul",
    ),
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
    assert all(miss.source and "raised" not in miss.reason for miss in misses)


#: no softmax, no norm, no gated MLP, no quantised matmul
NOISE = {
    "loss": lambda x: (x - 1).pow(2).mean(),
    "loss and more": lambda x: F.silu(x).mean() + 1.0,
    "energy": lambda x: x.pow(2).mean(-1, keepdim=True) + 1.0,
    "pooling": lambda x: x.mean(1) * 2.0 + x.var(1),
    "standard score of everything": lambda x: (x - x.mean()) / x.std(),
    "distance": lambda x: (-(x - 1.0).pow(2).sum(-1).sqrt() / 2.0).exp(),
    "activations": lambda x: F.silu(x) + F.gelu(x) + torch.sigmoid(x).sum(),
    "gates of no linear layer": lambda x: F.mish(x) * x + F.hardswish(x) * x.cos(),
    "sum over neighbours": lambda x: (x.flatten(0, 2) > 0).long().float().T @ x.flatten(0, 2),
    "sines": lambda x: torch.cat([x.cos(), x.sin()], -1) * 2.0,
    "linear layers": lambda x: F.linear(F.linear(x, x[0, 0]), x[0, 1, :, :8]),
}


@pytest.mark.parametrize("program", NOISE.values(), ids=NOISE)
def test_what_is_nothing_of_the_kind_is_not_told(program, without_inductor):
    with torch.no_grad():
        told = fxopt.explain(program, Q)
    assert told.report.misses == []
    assert "not fused" not in str(told)


def test_the_nearest_comes_first_and_stands_for_its_place(make):
    far, near = make.miss(fusion="far", share=0.6, progress=9), make.miss(fusion="near", progress=2)
    elsewhere = make.miss(fusion="far", anchor="softmax_9", share=0.7)
    assert [(row.fusion, row.share) for row in grouped_misses([far, near, elsewhere])] == [("near", 1.0), ("far", 0.7)]
    assert nearest([far, near, elsewhere]) == [near, elsewhere]


def test_a_softmax_that_is_no_attention_is_named_too(without_inductor):
    with torch.no_grad():
        told = fxopt.explain(lambda x: [(x @ x.mT).softmax(-1).topk(2).indices for x in (x, x + 1)], Q)
    assert told.report.misses == []
    words = "softmax.int, 2 times: nothing around it looks like attention, at "
    assert f"left as they are\n  {words}" in str(told)
    assert words in page(told.report)
