"""Attention whose rows are bounded (`first`, `last`), and masks that are looked through tile by tile."""

import pytest
import torch

from fxopt.kernels import _flash, _flash_decode
from fxopt.kernels._flash_parts import operands
from fxopt.kernels._flash_tiles import list_tiles, worth_listing
from fxopt.kernels.attention import MASK_ELEMENTS, attention
from fxopt.ops import Target

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, HQ, HKV = 2, 4, 2


def qkv(rows, keys, dtype=F32, device="cpu", width=16):
    make = lambda h, n: torch.randn(B, h, n, width, device=device).to(dtype)  # noqa: E731
    return make(HQ, rows), make(HKV, keys), make(HKV, keys)


def bounds(rows, keys, device="cpu"):
    """(first, last) of each kind; -1 and far beyond the keys are bounds too."""
    i = torch.arange(rows, device=device)[None, None]
    offset, documents = keys - rows, torch.arange(rows, device=device) // 24 * 24
    lengths = torch.tensor([keys // 3, keys - 1], device=device)[:, None, None]
    return {
        "causal": (None, i),
        "causal at the end": (None, i + offset),
        "window": (i + offset - 20, i + offset),
        "both sides": (i - 9, i + 9),
        "chunks": (i // 16 * 16, None),
        "documents": (documents[None, None], documents[None, None] + 23),
        "lengths": (None, lengths),
        "a head": (torch.tensor([0, 3, -5, 40], device=device)[None, :, None].int(), None),
        "far out": (torch.full_like(i, -(1 << 40)), torch.full_like(i, 1 << 40)),
        "empty rows": (i + 3, torch.where(i % 5 == 0, i - 50, i + 7)),
    }


def live_of(first, last, keys):
    key = torch.arange(keys)
    live = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    live = live if first is None else live & (key >= first.cpu()[..., None])
    return live if last is None else live & (key <= last.cpu()[..., None])


def exact(q, k, v, mask, scale, is_causal, empty_rows, first=None, last=None, dtype=F64, softcap=None, sink=None):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    fill = -1e30 if empty_rows == "uniform" and dtype != F16 else -INF
    live = live_of(first, last, k.shape[2]).to(q.device)
    if mask is not None and mask.dtype == torch.bool:
        live = live & mask
    elif mask is not None:
        scores = scores + mask.to(dtype)
    scores = scores.masked_fill(~live, fill)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -INF)
    if sink is not None:
        scores = torch.cat([scores, sink.to(dtype).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=None if dtype == F64 else F32).to(dtype)[..., : k.shape[2]]
    return (weights.nan_to_num(0.0) if empty_rows == "zero" else weights) @ v


def check(assert_as_good_as, implementation, args, **more):
    y = attention.run(implementation, *args, **more)
    assert_as_good_as(y, exact(*args, **more, dtype=args[0].dtype), exact(*args, **more), 4)


SHAPES = [(1, 150, F32), (40, 150, F32)]
MORE = [(3, 70, BF16), (130, 130, F16)]


@pytest.mark.parametrize("kind", bounds(1, 1))
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "decomposed", "triton"])
@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(MORE, marks=pytest.mark.slow)])
def test_bounds_against_float64(assert_as_good_as, triton_device, implementation, kind, shapes):
    for rows, keys, dtype in shapes:
        first, last = bounds(rows, keys, triton_device)[kind]
        q, k, v = qkv(rows, keys, dtype, triton_device)
        padding = torch.rand(B, 1, 1, keys, device=triton_device) < 0.7
        for mask in (None, padding):
            empties = ["nan"] if kind != "empty rows" else ["nan", "zero", "uniform"]
            for empty_rows in empties if dtype == F32 else ["zero"]:
                args = (q, k, v, mask, 0.3, False, empty_rows)
                check(assert_as_good_as, implementation, args, first=first, last=last)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("implementation", ["sdpa", "decomposed", "triton"])
def test_rows_that_a_padding_mask_empties_are_averages(triton_device, implementation, rows):
    """What left padding does to the causal masks of transformers."""
    q, k, v = qkv(rows, 150, device=triton_device)
    padding = torch.ones(B, 1, 1, 150, dtype=torch.bool, device=triton_device)
    padding[1, ..., :110] = False
    last = torch.arange(rows, device=triton_device)[None, None] + 100
    args = (q, k, v, padding, 0.3, False, "uniform")
    y = attention.run(implementation, *args, last=last)
    torch.testing.assert_close(y.double(), exact(*args, last=last), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1, :2, 0], v[1, :1, :].mean(1).expand(2, -1))


@pytest.mark.parametrize("rows", [1, 40])
def test_bounds_beside_everything_else(assert_as_good_as, triton_device, rows):
    first, last = bounds(rows, 150, triton_device)["window"]
    q, k, v = qkv(rows, 150, device=triton_device)
    bias = torch.randn(1, HQ, rows, 150, device=triton_device)
    sink = torch.randn(1, HQ, 1, 1, device=triton_device)
    for implementation in ("decomposed", "triton"):
        for is_causal in (False, True):
            args = (q, k, v, bias, 0.3, is_causal, "zero")
            more = {"softcap": 3.0, "sink": sink, "first": first, "last": last}
            check(assert_as_good_as, implementation, args, **more)


@pytest.mark.parametrize("rows", [2, 200])
def test_only_tiles_within_the_bounds_are_read(triton_device, rows):
    keys = 64 * 8
    q, k, v = qkv(rows, keys, device=triton_device)
    first = torch.full((1, 1, rows), 130, device=triton_device)
    last = torch.full((1, 1, rows), 250, device=triton_device)
    args = (None, 0.3, False, "nan")
    right = exact(q, k, v, *args, first, last)
    for x in (k, v):
        x[:, :, :128] = x[:, :, 256:] = float("nan")
    y = attention.run("triton", q, k, v, *args, first=first, last=last)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


# Masks that are looked through


def opaque(kind, rows, keys, dtype, device):
    i, j = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)[None]
    live = {
        "causal": j <= i,
        "window": (j <= i) & (j > i - 20),
        "documents": i // 40 == j // 40,
        "all": (i >= 0) & (j >= 0),
        "none": (i < 0) & (j < 0),
        "some rows": (i % 3 > 0) & (j <= i),
        "one key": (j == keys - 1) & (i >= 0),
    }[kind].expand(rows, keys)[None, None]
    if dtype == torch.bool:
        return live
    fill = torch.finfo(dtype).min if dtype in (F32, BF16) else -INF
    return torch.zeros(live.shape, device=device, dtype=dtype).masked_fill(~live, fill)


KINDS = ["causal", "window", "documents", "all", "none", "some rows", "one key"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bool, F32, pytest.param(F16, marks=pytest.mark.slow)])
def test_masks_that_heads_share(assert_as_good_as, triton_device, kind, dtype):
    rows, keys = 70, 130
    q, k, v = qkv(rows, keys, device=triton_device)
    mask = opaque(kind, rows, keys, dtype, triton_device)
    assert worth_listing(operands(q, k, v, mask, False, "nan", None, None, None, None, None), 32)
    for empty_rows in ("zero", "uniform") if dtype == torch.bool else ("nan",):
        args = (q, k, v, mask, 0.3, False, empty_rows)
        y, right = attention.run("triton", *args), exact(*args)
        if dtype == F32:  # float64 adds scores to finfo.min
            dead = (mask < 0).all(-1, keepdim=True)
            right = torch.where(dead, v.double().mean(-2, keepdim=True).repeat_interleave(2, 1), right)
        assert_as_good_as(y, exact(*args, dtype=F32), right, 4)


def test_masks_within_bounds_and_by_batch(assert_as_good_as, triton_device):
    rows, keys = 140, 200
    q, k, v = qkv(rows, keys, device=triton_device)
    mask = torch.rand(B, 1, rows, keys, device=triton_device) < 0.5
    mask[0, :, :, 64:] = False
    first, last = bounds(rows, keys, triton_device)["window"]
    for is_causal in (False, True):
        args = (q, k, v, mask, 0.3, is_causal, "zero")
        check(assert_as_good_as, "triton", args, first=first, last=last)


def test_dead_tiles_are_not_read_and_whole_ones_without_the_mask(triton_device):
    rows, keys = 64, 320
    q, k, v = qkv(rows, keys, device=triton_device)
    live = torch.zeros(1, 1, rows, keys, dtype=torch.bool, device=triton_device)
    live[..., 64:128] = True  # whole
    live[..., 200:210] = True
    given = operands(q, k, v, live, False, "nan", None, None, None, None, None)
    tiles = list_tiles(given, 64, 64)
    assert tiles.shape == (B, 1, 7)
    assert tiles.stride(0) == 0
    assert tiles[0, 0, :3].tolist() == [1, 1, 1]
    assert tiles[0, 0, -1] == 3
    args = (live, 0.3, False, "nan")
    right = exact(q, k, v, *args)
    for start in (0, 128, 256):
        k[:, :, start : start + 64] = v[:, :, start : start + 64] = float("nan")
    y = attention.run("triton", q, k, v, *args)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_masks_that_heads_do_not_share_are_not_looked_through(triton_device):
    q, k, v = qkv(40, 200, device=triton_device)
    for mask in (None, torch.zeros(1, HQ, 40, 200, device=triton_device)):
        assert not worth_listing(operands(q, k, v, mask, False, "nan", None, None, None, None, None), 64)


def test_what_a_cache_holds_is_spread_over_the_splits(triton_device):
    """Each split takes every S-th tile: were they dealt out in runs, a short prefix would be one program's work."""
    keys = 64 * 40
    q, k, v = qkv(1, keys, device=triton_device)
    mask = torch.zeros(1, 1, 1, keys, dtype=torch.bool, device=triton_device)
    mask[..., :300] = True
    assert _flash_decode._split(B * HKV, 40, torch.device("cpu")) == 2
    args = (mask, 0.3, False, "nan")
    y = attention.run("triton", q, k, v, *args)
    torch.testing.assert_close(y.double(), exact(q, k, v, *args), atol=1e-5, rtol=1e-5)


# The op


@pytest.mark.parametrize("kind", ["window", "lengths"])
def test_opcheck_of_bounds(kind):
    q, k, v = qkv(5, 9)
    first, last = bounds(5, 9)[kind]
    torch.library.opcheck(attention.overload, (q, k, v, None, 0.3, False, "zero", None, None, None, first, last))


@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_gradcheck_of_bounds(empty_rows):
    q, k, v = (t.requires_grad_() for t in qkv(5, 9, F64, width=4))
    first, last = bounds(5, 9)["empty rows"]
    for run in (attention, lambda *a, **m: attention.run("sdpa", *a, **m)):
        assert torch.autograd.gradcheck(
            lambda *a: run(*a, None, 0.3, False, empty_rows, first=first, last=last),  # noqa: B023
            (q, k, v), fast_mode=True,
        )  # fmt: skip


ROWS = 1024


@pytest.mark.parametrize("target, rows, more, chosen", [
    (Target(CUDA), ROWS, {}, "triton"),
    (Target(CUDA), ROWS, {"empty_rows": "uniform"}, "triton"),
    (Target(CUDA), ROWS, {"empty_rows": "uniform", "is_causal": True}, "sdpa"),
    (Target(CUDA), 100, {}, "sdpa"),
    (Target(CUDA), 1, {}, "sdpa"),
    (Target(CUDA, cuda_graphs=True), 1, {}, "triton"),
    (Target(CUDA, opaque=False), ROWS, {}, "sdpa"),
    (Target(CPU), ROWS, {}, "sdpa"),
])  # fmt: skip
def test_which_implementation_serves_bounds(target, rows, more, chosen):
    pytest.importorskip("triton")
    assert ROWS * ROWS >= MASK_ELEMENTS
    q, k, v = qkv(rows, ROWS, BF16)
    first = torch.zeros(1, 1, rows, dtype=torch.int64)
    args = attention.bind(q, k, v, None, 0.3, **({"empty_rows": "zero", "first": first} | more))
    assert attention.select(target, *args)[0].name == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", bounds(1, 1))
def test_bounds_at_the_size_of_a_model(assert_as_good_as, kind, dtype):
    for rows, keys in ((1, 2000), (1000, 2000), (1500, 1500)):
        first, last = bounds(rows, keys, "cuda")[kind]
        q, k, v = qkv(rows, keys, dtype, "cuda", 128)
        for mask in (None, torch.rand(B, 1, 1, keys, device="cuda") < 0.7):
            check(assert_as_good_as, "triton", (q, k, v, mask, 0.1, False, "zero"), first=first, last=last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_window_stores_no_mask():
    q, k, v = qkv(8192, 8192, BF16, "cuda", 64)
    first, last = bounds(8192, 8192, "cuda")["window"]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _flash.flash_attention(q, k, v, None, 0.125, False, "zero", first=first, last=last)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 // 2


@pytest.mark.parametrize("rows, keys", [(1, 300), (40, 150)])
def test_configurations_compute_the_same(assert_as_good_as, triton_device, rows, keys):
    q, k, v = qkv(rows, keys, F16, triton_device)
    first, last = bounds(rows, keys, triton_device)["window"]
    given = list(_flash.configs(q, k, v))
    assert given
    assert not list(_flash.configs(q.float(), k.float(), v.float()))
    for config in given:
        args = (q, k, v, None, 0.3, False, "zero")
        y = _flash.flash_attention(*args, first=first, last=last, config=config)
        assert_as_good_as(y, exact(*args, first, last, dtype=F16), exact(*args, first, last), 4)


@pytest.mark.parametrize("rows", [1, 5])
def test_what_the_tuner_draws_is_causal(rows):
    q, k, v = (t.to("meta") for t in qkv(rows, 9))
    bound = torch.empty(1, 1, rows, dtype=torch.int64, device="meta")
    args = attention.bind(q, k, v, None, 0.3, first=bound, last=bound)
    made = attention.drawn(*args)
    assert [getattr(t, "shape", t) for t in made] == [getattr(t, "shape", t) for t in args]
    assert torch.equal(live_of(*made[10:12], 9)[0, 0], torch.ones(rows, 9).tril(9 - rows).bool())
