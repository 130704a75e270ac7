"""Gradients of what `torch.compile(..., backend="fxopt")` makes of every fusion, against eager mode in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import fxopt

pytestmark = pytest.mark.usefixtures("without_inductor")

F64 = torch.float64
MIN = torch.finfo(F64).min


def results(program, inputs, seed=1):
    """The outputs, and the gradients of all floating inputs."""
    fresh = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outs = program(*fresh)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype)).sum() for o in outs)
    wanted = [x for x in fresh if x.requires_grad]
    return [o.detach() for o in outs], list(torch.autograd.grad(loss, wanted, allow_unused=True))


def check(program, inputs, sites, **tolerance):
    """As in eager mode; `sites` fusions were applied. A gradient that is None in eager mode is None here."""
    with fxopt.record() as rec:
        ours = results(torch.compile(program, backend="fxopt", fullgraph=True), inputs)
    assert rec.counts() == sites
    eager = results(program, inputs)
    assert [g is None for g in ours[1]] == [g is None for g in eager[1]]
    given = [[o for o in (*outs, *grads) if o is not None] for outs, grads in (ours, eager)]
    torch.testing.assert_close(*given, **({"rtol": 1e-12, "atol": 1e-13} | tolerance), equal_nan=True)
    return rec


def randn(*shape):
    return torch.randn(shape, dtype=F64)


def qkv(kv_heads=4, width=8, value_width=8, rows=5):
    return randn(2, 4, rows, width), randn(2, kv_heads, 7, width), randn(2, kv_heads, 7, value_width)


def keep():
    """The second sample ends in padding, and in both a row is masked throughout."""
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    mask[:, :, 2] = False
    return mask


def attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.3, -1) @ v


def masked(value):
    return lambda q, k, v, m: torch.softmax((q @ k.mT * 0.3).masked_fill(~m, value), -1) @ v


def additive(m, value):
    return torch.zeros(m.shape, dtype=F64).masked_fill(~m, value)


def added(value):
    return lambda q, k, v, m: torch.softmax(q @ k.mT * 0.3 + additive(m, value), -1) @ v


def repeated(x):
    return x[:, :, None].expand(2, 2, 2, 7, 8).reshape(2, 4, 7, 8)


def stable(s, shift=lambda m: m):
    e = torch.exp(s - shift(s.amax(-1, keepdim=True)))
    return e / e.sum(-1, keepdim=True)


def triangle(q, k, v):
    return torch.softmax((q @ k.mT * 0.3).masked_fill(torch.ones(5, 7).triu(1).bool(), -math.inf), -1) @ v


ATTENTION = {
    "plain": (attend, qkv()),
    "grouped heads": (lambda q, k, v: attend(q, repeated(k), repeated(v)), qkv(2)),
    "causal": (triangle, qkv()),
    "one row": (attend, qkv(rows=1)),
    "narrow values": (attend, qkv(value_width=5)),
    "wide values": (attend, qkv(width=5)),
    "bias": (lambda q, k, v, b: torch.softmax(q @ k.mT * 0.3 + b, -1) @ v, (*qkv(), randn(4, 5, 7))),
    "learnt scale": (lambda q, k, v, s: torch.softmax(q @ k.mT * s, -1) @ v, (*qkv(), randn())),
    "negative scale": (lambda q, k, v: torch.softmax(q @ k.mT * -0.3, -1) @ v, qkv()),
    "self": (lambda x: attend(x, x, x), (randn(2, 4, 5, 8),)),
    "softmax spelled out": (lambda q, k, v: stable(q @ k.mT) @ v, qkv()),
    "its maximum detached": (lambda q, k, v: stable(q @ k.mT, torch.detach) @ v, qkv()),
    "channels first": (lambda q, k, v: v.mT @ (q @ k.mT * 0.5).softmax(-1).mT, qkv()),
    "SDPA": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv()),
    "SDPA, boolean mask": (F.scaled_dot_product_attention, (*qkv(), keep())),
    "SDPA, float mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, additive(m, MIN)),
        (*qkv(), keep()),
    ),
    "SDPA, bias": (F.scaled_dot_product_attention, (*qkv(), randn(2, 4, 5, 7))),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    program, inputs = ATTENTION[name]
    check(program, inputs, {"attention": 1})


@pytest.mark.parametrize("value", [MIN, -1e30, -1e9, -1e4])
def test_rows_masked_throughout_by_an_added_number(value):
    check(added(value), (*qkv(), keep()), {"attention": 1})


@pytest.mark.parametrize("value", [MIN, -1e30, -1e9])
def test_rows_masked_throughout_by_a_number_filled_in(value):
    rec = check(masked(value), (*qkv(), keep()), {"attention": 1})
    assert [s.implementation for s in rec.sites] == ["sdpa"]


def test_minus_infinity_added():
    check(added(-math.inf), (*qkv(), keep()), {"attention": 1})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_minus_infinity_filled_in(empty, kv_heads, heads, causal):
    """A row filled throughout is NaN, and so is the gradient of its v; those of q and k stop at the fill."""
    live = torch.ones(2, heads, 5, 7, dtype=torch.bool)
    live[1, ..., 4:] = False
    live[:empty, -1:, 2] = False
    lower = torch.ones(5, 7).tril().bool()

    def program(q, k, v, m):
        k, v = (repeated(t) if kv_heads == 2 else t for t in (k, v))
        scores = (q @ k.mT * 0.3).masked_fill(~m, -math.inf)
        return torch.softmax(scores.masked_fill(~lower, -math.inf) if causal else scores, -1) @ v

    inputs = (*qkv(kv_heads), live)
    rec = check(program, inputs, {"attention": 1})
    assert [s.implementation for s in rec.sites] == ["sdpa_filled"]
    (out,), (q, k, v) = results(program, inputs)
    assert not any(t.isnan().any() for t in (q, k))
    assert [bool(sample.isnan().any()) for sample in v] == [i < empty for i in range(2)]
    assert [bool(sample.isnan().any()) for sample in out] == [i < empty for i in range(2)]


def test_two_fills_are_one_mask():
    def program(q, k, v, m, n):
        return torch.softmax((q @ k.mT).masked_fill(~m, -1e9).masked_fill(n, -1e9), -1) @ v

    check(program, (*qkv(), keep(), torch.rand(5, 7) < 0.3), {"attention": 1})


@pytest.mark.parametrize(
    "program, reason",
    [
        (
            lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(~m, MIN) + additive(m, -1.0), -1) @ v,
            "in another way",
        ),
        (lambda q, k, v, m: torch.softmax((q @ k.mT).masked_fill(~m, MIN).masked_fill(m[:1], -1e9), -1) @ v, "another"),
        (lambda q, k, v, m: torch.softmax((q @ k.mT + additive(m, MIN)).clamp(min=MIN), -1) @ v, "pass no gradients"),
    ],
    ids=["filled and added", "two numbers", "raised"],
)
def test_masks_whose_gradients_one_mask_cannot_have(program, reason):
    """They fuse where no gradients are asked for."""
    rec = check(program, (*qkv(), keep()), {})
    assert any(reason in miss.reason for miss in rec.graphs[0].misses)
    with torch.no_grad(), fxopt.record() as rec:
        torch.compile(program, backend="fxopt")(*qkv(), keep())
    assert rec.counts() == {"attention": 1}


def no_grad_weights(q, k, v):
    with torch.no_grad():
        weights = torch.softmax(q @ k.mT, -1)
    return weights @ v


def no_grad_key(q, k, v):
    with torch.no_grad():
        k = k.mT
    return torch.softmax(q @ k, -1) @ v


def no_grad_all(q, k, v):
    with torch.no_grad():
        y = attend(q, k, v)
    return y + v[:, :, :5]


DETACHED = {
    "k": (lambda q, k, v: torch.softmax(q @ k.detach().mT, -1) @ v, 1),
    "after a view": (lambda q, k, v: torch.softmax(q @ k.mT.detach(), -1) @ v.mT.detach().mT, 1),
    "scores": (lambda q, k, v: torch.softmax((q @ k.mT).detach(), -1) @ v, 0),
    "weights": (lambda q, k, v: torch.softmax(q @ k.mT, -1).detach() @ v, 0),
    "result": (lambda q, k, v: attend(q, k, v).detach() + v[:, :, :5], 1),
    "no_grad around the weights": (no_grad_weights, 0),
    "no_grad around a view": (no_grad_key, 0),
    "no_grad around the whole": (no_grad_all, 1),
}


@pytest.mark.parametrize("name", DETACHED)
def test_what_is_detached_stays_so(name):
    program, sites = DETACHED[name]
    check(program, qkv(), {"attention": sites} if sites else {})


def test_without_gradients_detach_is_no_obstacle():
    with torch.no_grad(), fxopt.record() as rec:
        torch.compile(DETACHED["scores"][0], backend="fxopt")(*qkv())
    assert rec.counts() == {"attention": 1}


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def add_rms(x, r, w):
    h = x + r
    return rms(h) * w, h


def spelled_layer_norm(x, w, b):
    away = x - x.mean(-1, keepdim=True)
    return away / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w + b


def add_layer_norm(x, r, w, b):
    h = x + r
    return F.layer_norm(h, (8,), w, b), h


NORMS = {
    "RMSNorm": ("rms_norm", lambda x, w: rms(x) * w, (randn(3, 4, 8), randn(8))),
    "with an offset": ("rms_norm", lambda x, w: rms(x) * (1 + w), (randn(3, 4, 8), randn(8))),
    "without a weight": ("rms_norm", rms, (randn(3, 4, 8),)),
    "F.rms_norm": ("rms_norm", lambda x, w: F.rms_norm(x, (8,), w), (randn(3, 4, 8), randn(8))),
    "divided by a root": (
        "rms_norm",
        lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        (randn(3, 4, 8), randn(8)),
    ),
    "add, RMSNorm": ("rms_norm", add_rms, (randn(3, 4, 8), randn(3, 4, 8), randn(8))),
    "add of its own function": ("rms_norm", lambda x, w: rms(x + x.sin()) * w, (randn(3, 4, 8), randn(8))),
    "LayerNorm": ("layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b), (randn(3, 4, 8), randn(8), randn(8))),
    "over two dimensions": ("layer_norm", lambda x: F.layer_norm(x, (4, 8)), (randn(3, 4, 8),)),
    "spelled out": ("layer_norm", spelled_layer_norm, (randn(3, 4, 8), randn(8), randn(8))),
    "add, LayerNorm": ("layer_norm", add_layer_norm, (randn(3, 4, 8), randn(3, 4, 8), randn(8), randn(8))),
    "rows of zeros": ("layer_norm", lambda x, w: F.layer_norm(x * 0, (8,), w), (randn(3, 4, 8), randn(8))),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    fusion, program, inputs = NORMS[name]
    check(program, inputs, {fusion: 1})


@pytest.mark.parametrize("where", ["the statistics", "what they are taken of"])
def test_detached_statistics_are_no_norm(where):
    def program(x, w):
        source = x.detach() if where != "the statistics" else x
        scale = torch.rsqrt(source.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (scale.detach() if where == "the statistics" else scale) * w

    check(program, (randn(3, 8), randn(8)), {})


def int4(x, packed, scale, table, minimum=False):
    q = torch.stack([packed & 15, packed >> 4], -1).reshape(16, 2, 4).to(x.dtype)
    s, t = scale[:, :, None], table[:, :, None]
    return F.linear(x, (q * s - t if minimum else (q - t) * s).reshape(16, 8))


INT8 = torch.randint(-127, 128, (16, 8), dtype=torch.int8)
INT4 = torch.randint(0, 256, (16, 4), dtype=torch.uint8)
QUANTISED = {
    "int8": (lambda x, w, s, b: F.linear(x, w.to(x.dtype) * s, b), (randn(3, 8), INT8, randn(16, 1), randn(16))),
    "int8, scaled after": (lambda x, w, s: F.linear(x, w.to(x.dtype)) * s, (randn(3, 8), INT8, randn(16))),
    "int8, one scale": (lambda x, w, s: F.linear(x, w.to(x.dtype) * s), (randn(3, 8), INT8, randn())),
    "int4, zero points": (int4, (randn(3, 8), INT4, randn(16, 2), randn(16, 2))),
    "int4, minima": (lambda *a: int4(*a, minimum=True), (randn(3, 8), INT4, randn(16, 2), randn(16, 2))),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(name):
    program, inputs = QUANTISED[name]
    check(program, inputs, {"dequant_matmul": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["attention", "masked", "RMSNorm", "add, LayerNorm", "int8"])
def test_narrow_dtypes_are_as_near_to_float64_as_eager(assert_as_good_as, name, dtype):
    program, inputs = {
        "attention": (attend, qkv()),
        "masked": (lambda q, k, v, m: torch.softmax(q @ k.mT * 0.3 + m, -1, dtype=torch.float32).to(q.dtype) @ v,
                   (*qkv(), additive(keep(), -1e4))),
        "RMSNorm": (lambda x, w: rms(x.float()).to(x.dtype) * w, NORMS["RMSNorm"][2]),
        "add, LayerNorm": NORMS["add, LayerNorm"][1:],
        "int8": QUANTISED["int8"],
    }[name]  # fmt: skip
    narrow = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    exact = results(program, [x.double() if x.is_floating_point() else x for x in narrow])
    eager = results(program, narrow)
    with fxopt.record() as rec:
        ours = results(torch.compile(program, backend="fxopt"), narrow)
    assert sum(rec.counts().values()) == 1
    # A mask that is added in the model has gradients too: they are the scores', summed in another order.
    for mine, theirs, truth in zip(*([*outs, *grads] for outs, grads in (ours, eager, exact)), strict=True):
        assert_as_good_as(mine, theirs, truth, ulps=4)


@pytest.mark.parametrize("outer", [torch.no_grad, nullcontext])
def test_gradients_that_are_switched_on_inside(outer):
    weight = torch.randint(-127, 128, (16, 32), dtype=torch.int8)

    def program(x, s):
        with torch.enable_grad():
            y = F.linear(x, weight.to(x.dtype) * s).square().sum()
            return torch.autograd.grad(y, x)[0]

    x, s = torch.randn(2, 32).bfloat16().requires_grad_(), torch.rand(16, 1).bfloat16()
    with outer(), fxopt.record() as rec:
        ours = torch.compile(program, backend="fxopt")(x, s)
        torch.testing.assert_close(ours, program(x, s), rtol=2e-2, atol=2e-1)
    assert rec.counts() == {"dequant_matmul": 1}
