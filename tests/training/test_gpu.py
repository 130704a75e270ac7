"""On a GPU: gradients of fused models and sites against float64, in every dtype and mode that training uses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fxopt
import saved_memory as saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def attend(q, k, v, mask=None, fill=None):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * 0.2
    if fill is not None:
        scores = scores.masked_fill(~mask, fill)
    elif mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -1e4)
    return torch.softmax(scores, -1) @ v


def results(program, inputs, dtype):
    fresh = [x.to("cuda", dtype if x.is_floating_point() else None) for x in inputs]
    wanted = [x.detach().requires_grad_() for x in fresh if x.is_floating_point()]
    rest = iter(wanted)
    out = program(*(next(rest) if x.is_floating_point() else x for x in fresh))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).to("cuda", out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["plain", "filled", "filled with -inf", "added", "SDPA", "SDPA, masked"])
def test_attention_with_rows_masked_throughout(assert_as_good_as, kind, kv_heads, dtype):
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    mask[0, ..., 40:] = mask[1, :, 5] = False
    inputs = [torch.randn(2, heads, 64, 32) for heads in (4, kv_heads, kv_heads)]
    program, more = {
        "plain": (attend, ()),
        "filled": (lambda q, k, v, m: attend(q, k, v, m, -3e4), (mask,)),
        "filled with -inf": (lambda q, k, v, m: attend(q, k, v, m, -torch.inf), (mask,)),  # rows and v's gradient: NaN
        "added": (attend, (mask,)),
        "SDPA": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), ()),
        "SDPA, masked": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True), (mask,)),
    }[kind]
    narrow = [x.to(dtype) for x in inputs] + list(more)
    exact, eager = results(program, narrow, torch.float64), results(program, narrow, dtype)
    torch._dynamo.reset()
    with fxopt.record() as rec:
        ours = results(torch.compile(program, backend="fxopt"), narrow, dtype)
    if dtype is torch.float32 and not rec.counts():
        assert found_less_exact(rec)
    else:
        assert rec.counts() == {"attention": 1}
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        if kind == "SDPA, masked":  # kernels disagree on rows with no live key: some give 0, some NaN
            assert not (mine.isnan() & ~theirs.isnan()).any()
            mine, theirs, truth = (t.masked_fill(theirs.isnan(), 0) for t in (mine, theirs, truth))
        assert_as_good_as(mine, theirs, truth, ulps=8)


def found_less_exact(rec):
    """Whether attention was refused for its error. Few rows of float32: the memory-efficient kernel of SDPA errs two to
    four times as much as eager mode (H100, 32 rows, width 8 and 16: 9 to 18 units, not 4 to 5.5); twice is allowed.
    """
    steps = [step for graph in rec.graphs for step in graph.steps]
    return any("less exact than the original" in step.verdict.detail for step in steps)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_steps(net, sites, mode, amp):
    """Optimiser steps as in eager mode, also with CUDA graphs, autocast and a gradient scaler."""
    torch.manual_seed(0)
    first, x = net().cuda(), torch.randn(8, 32, 16, device="cuda")
    losses = []
    for compiled in (False, True):
        model = copy.deepcopy(first)
        run = torch.compile(model, backend="fxopt", mode=mode) if compiled else model
        scaler = torch.amp.GradScaler("cuda", enabled=amp is torch.float16)
        step = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)
        with fxopt.record() as rec:
            for _ in range(6):
                with torch.autocast("cuda", dtype=amp or torch.float32, enabled=amp is not None):
                    loss = run(x).float().square().mean()
                scaler.scale(loss).backward()
                scaler.step(step)
                scaler.update()
                step.zero_grad()
                losses.append(loss.item())
    if amp is None and "attention" not in rec.counts():
        assert found_less_exact(rec)
        sites = {name: count for name, count in sites.items() if name != "attention"}
    assert rec.counts() == sites
    tolerance = 1e-4 if amp is None else 2e-2
    torch.testing.assert_close(torch.tensor(losses[6:]), torch.tensor(losses[:6]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Llama, padded", "BERT, padded", "ViT"])
def test_no_more_is_saved_than_by_inductor(name, attention):
    model, inputs = dict(saved.models(attention))[name]()
    there = {key: t.to("cuda", torch.bfloat16 if t.is_floating_point() else None) for key, t in inputs.items()}
    inductor, ours, _ = saved.compare(model.to("cuda", torch.bfloat16).train(), there)
    assert ours <= inductor + 64  # a kernel's seed and offset
