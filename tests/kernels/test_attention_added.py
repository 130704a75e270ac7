"""A float mask by key in training: SDPA's result, and the gradients that adding it has, in rows that it masks too."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels.attention import attention
from fxopt.ops import Target

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
B, HQ, M, N, D, DV = 3, 4, 9, 37, 8, 8


def mask_of(kind, dtype, device="cpu"):
    """[B or 1, Hq or 1, 1, N]: the last sequence has no key but masked ones."""
    least = torch.finfo(dtype).min
    live = torch.rand(B, 1, 1, N, device=device) < 0.6
    live[..., 0], live[-1] = True, False
    zero = torch.zeros((), device=device, dtype=dtype)
    rows = {
        "finfo.min": zero.masked_fill(~live, least),
        "finfo.min and -inf": zero.masked_fill(~live, least).masked_fill((~live).cumsum(-1) % 3 == 0, -INF),
        "two sizes": zero.masked_fill(~live, least).masked_fill((~live).cumsum(-1) % 3 == 0, least / 2),
        "-1e4": zero.masked_fill(~live, -1e4),
        "-20": zero.masked_fill(~live, -20.0),
        "a number a head and key": torch.randn(1, HQ, 1, N, device=device).to(dtype),
        "a head without keys": zero.expand(1, HQ, 1, N).masked_fill(
            torch.arange(HQ, device=device)[:, None, None] == 2, least
        ),
        "two dimensions": zero.masked_fill(~live, least)[0, 0],
        "one": zero.masked_fill(~live, least)[0, 0, 0],
        "-inf": zero.masked_fill(~live, -INF),
    }
    return rows[kind]


KINDS = ("finfo.min", "finfo.min and -inf", "two sizes", "-1e4", "-20", "a number a head and key",
         "a head without keys", "two dimensions", "one", "-inf")  # fmt: skip


def spelled_out(q, k, v, mask, scale):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.softmax(q @ k.mT * scale + mask, -1) @ v


def ours(q, k, v, mask, scale):
    return attention.run("sdpa_added", q, k, v, mask, scale, False, "nan", None, None, None, None, None, None)


def gradients(step, tensors, mask, weights, learned=False):
    leaves = [t.detach().requires_grad_() for t in tensors]
    mask = mask.detach().requires_grad_() if learned else mask
    out = step(*leaves, mask, 0.3)
    return [out, *torch.autograd.grad((out * weights.to(out)).sum(), [*leaves, mask] if learned else leaves)]


def near(found, dtype):
    for mine, theirs, right in zip(*found, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        mine, theirs, right = (t.nan_to_num().double() for t in (mine, theirs, right))
        allowed = 2 * (theirs - right).abs().max() + 8 * torch.finfo(dtype).eps * right.abs().max()
        assert (mine - right).abs().max() <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients(dtype, heads, kind):
    torch.manual_seed(0)
    tensors = [torch.randn(B, h, n, d).to(dtype) for h, n, d in ((HQ, M, D), (heads, N, D), (heads, N, DV))]
    mask, weights = mask_of(kind, dtype), torch.randn(B, HQ, M, DV)
    wide = [t.double() for t in tensors]
    found = [gradients(ours, tensors, mask, weights), gradients(spelled_out, tensors, mask, weights)]
    near([*found, gradients(spelled_out, wide, mask.double(), weights)], dtype)


@pytest.mark.parametrize("kind", ["finfo.min", "two sizes", "a number a head and key"])
def test_a_mask_that_is_learned(kind):
    torch.manual_seed(0)
    tensors = [torch.randn(B, HQ, n, D) for n in (M, N, N)]
    mask, weights = mask_of(kind, F32), torch.randn(B, HQ, M, DV)
    found = [gradients(step, tensors, mask, weights, learned=True) for step in (ours, spelled_out)]
    near([*found, gradients(spelled_out, [t.double() for t in tensors], mask.double(), weights, learned=True)], F32)


def chosen(mask, empty_rows="nan", training=True, **more):
    q, k = torch.empty(2, 4, M, D), torch.empty(2, 4, N, D)
    args = attention.bind(q, k, k, mask, 0.3, **({"empty_rows": empty_rows} | more))
    return attention.select(Target(torch.device("cpu"), training=training), *args)[0].name


def test_where_it_is_chosen():
    by_key = torch.zeros(2, 1, 1, N)
    assert chosen(by_key) == "sdpa_added"
    assert chosen(torch.zeros(N)) == "sdpa_added"
    assert chosen(by_key, training=False) == "sdpa"
    assert chosen(by_key, empty_rows="zero") == "sdpa_as_given"
    assert chosen(by_key.bool()) == "sdpa_filled"
    assert chosen(torch.zeros(2, 1, M, N)) == "decomposed"
    assert chosen(by_key, is_causal=True) == "decomposed"
    assert chosen(by_key, softcap=3.0) == "decomposed"
    assert chosen(by_key, sink=torch.zeros(1, 4, 1, 1)) != "sdpa_added"
    assert chosen(by_key, last=torch.zeros(1, 1, M, dtype=torch.int64)) == "decomposed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_on_a_gpu(dtype, kind):
    torch.manual_seed(0)
    tensors = [torch.randn(B, HQ, n, D, device="cuda").to(dtype) for n in (M, N, N)]
    mask, weights = mask_of(kind, dtype, "cuda"), torch.randn(B, HQ, M, DV, device="cuda")
    found = [gradients(step, tensors, mask, weights) for step in (ours, spelled_out)]
    near([*found, gradients(spelled_out, [t.double() for t in tensors], mask.double(), weights)], dtype)
