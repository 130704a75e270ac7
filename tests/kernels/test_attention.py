import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from fxopt.kernels import _flash_decode
from fxopt.kernels import attention as module
from fxopt.kernels.attention import attention
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Sums over many keys in another order than eager's: more than its error and one ulp, where eager was lucky.
ULPS = 4

# B, Hq, Hkv, M, N, D, Dv
DECODE = [(1, 4, 2, 1, 70, 16, 16), (2, 4, 1, 1, 200, 40, 24), (1, 6, 2, 5, 100, 80, 80), (1, 1, 1, 1, 1, 1, 1),
          (1, 4, 1, 2, 40, 16, 16), (1, 3, 3, 16, 33, 64, 64), (1, 9, 3, 1, 300, 64, 64)]  # fmt: skip
PREFILL = [(1, 2, 2, 40, 70, 72, 96), (1, 2, 1, 130, 67, 64, 64), (1, 4, 2, 17, 17, 40, 40), (1, 1, 1, 129, 1, 3, 5)]


def qkv(shape, dtype=F32, device="cpu", spread=1.0):
    batch, heads, kv_heads, rows, keys, width, value_width = shape
    make = lambda h, n, d: (torch.randn(batch, h, n, d, device=device) * spread).to(dtype)  # noqa: E731
    return make(heads, rows, width), make(kv_heads, keys, width), make(kv_heads, keys, value_width)


def masks(shape, dtype, device="cpu"):
    batch, heads, _, rows, keys, *_ = shape
    padding = torch.rand(batch, 1, 1, keys, device=device) < 0.7
    padding[..., 0] = True
    return {
        "none": None,
        "bool": padding,
        "bool, all heads": torch.rand(1, heads, rows, keys, device=device) < 0.6,
        "2-D": torch.randn(rows, keys, device=device).to(dtype),
        "bias": torch.randn(1, heads, rows, keys, device=device).to(dtype),
        "-inf": torch.zeros(padding.shape, device=device).masked_fill(~padding, -INF).to(dtype),
        "finfo.min": torch.zeros(padding.shape, device=device).masked_fill(~padding, torch.finfo(dtype).min).to(dtype),
        "float32 bias": torch.randn(batch, 1, 1, 1, device=device),
    }


def exact(q, k, v, mask, scale, is_causal, empty_rows):
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -INF)
    weights = torch.softmax(scores, -1)
    return (weights.nan_to_num(0.0) if empty_rows == "zero" else weights) @ v


def spelled_out(q, k, v, mask, scale, is_causal, empty_rows):
    """The eager computation at the inputs' own dtype."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -INF)
    weights = torch.softmax(scores, -1, dtype=F32).to(v.dtype)
    return (weights.nan_to_num(0.0) if empty_rows == "zero" else weights) @ v


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", DECODE + PREFILL, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "sdpa"])
def test_against_float64(assert_as_good_as, implementation, shape, dtype):
    q, k, v = qkv(shape, dtype)
    for mask in masks(shape, dtype).values():
        for is_causal, empty_rows in ((False, "nan"), (False, "zero"), (True, "nan")):
            args = (q, k, v, mask, 0.2, is_causal, empty_rows)
            y = attention.run(implementation, *args)
            assert_as_good_as(y, spelled_out(*args), exact(*args), ULPS)


def check_kernel(assert_as_good_as, shape, dtype, kind, is_causal, device):
    mask = masks(shape, dtype, device)[kind]
    args = (*qkv(shape, dtype, device), mask, 0.2, is_causal, "nan")
    assert_as_good_as(attention.run("triton", *args), spelled_out(*args), exact(*args), ULPS)


@pytest.mark.parametrize("shape", DECODE + PREFILL, ids=str)
@pytest.mark.parametrize(
    "dtype, kind, is_causal", [(F32, "bias", False), (BF16, "finfo.min", False), (F16, "none", True)]
)
def test_kernels_at_odd_sizes(assert_as_good_as, triton_device, shape, dtype, kind, is_causal):
    check_kernel(assert_as_good_as, shape, dtype, kind, is_causal, triton_device)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", masks((1, 1, 1, 1, 1), F32))
def test_kernels_with_every_kind_of_mask(assert_as_good_as, triton_device, kind, is_causal, rows):
    for dtype in (F32, BF16, F16):
        check_kernel(assert_as_good_as, (1, 4, 2, rows, 70, 16, 16), dtype, kind, is_causal, triton_device)


@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo.min", "-inf and finfo.min"])
@pytest.mark.parametrize("heads, rows", [(4, 1), (2, 3)])
def test_tiles_of_long_caches_are_found_in_a_mask_of_one_row(
    assert_as_good_as, triton_device, monkeypatch, heads, rows, kind
):
    monkeypatch.setattr(_flash_decode, "MAX_SPLITS", 2)  # so each of them has more tiles than it judges at once
    shape = (2, heads, 2, rows, 2500, 16, 16)
    live = torch.zeros(2, 1, 1, 2500, dtype=torch.bool, device=triton_device)
    live[0, ..., [0, 63, 64, 1300, 2430, 2499]] = True
    live[1, ..., 2300:2340] = True
    filled = torch.zeros(live.shape, dtype=BF16, device=triton_device)
    filled = filled.masked_fill(~live, torch.finfo(BF16).min if "finfo" in kind else -INF)
    if "and" in kind:  # no key of the second batch is live, and one is as dead as -inf
        filled[1] = torch.finfo(BF16).min
        filled[1, ..., 70] = -INF
    args = (*qkv(shape, BF16, triton_device), live if kind == "bool" else filled, 0.2, False, "nan")
    assert_as_good_as(attention.run("triton", *args), spelled_out(*args), exact(*args), ULPS)


@pytest.mark.parametrize("empty_rows", ["nan", "zero", "uniform"])
def test_long_caches_with_nothing_live(triton_device, monkeypatch, empty_rows):
    monkeypatch.setattr(_flash_decode, "MAX_SPLITS", 2)
    q, k, v = qkv((2, 2, 1, 1, 2500, 16, 16), device=triton_device)
    live = torch.zeros(2, 1, 1, 2500, dtype=torch.bool, device=triton_device)
    live[0, ..., 2450] = True
    y = attention.run("triton", q, k, v, live, 0.2, False, empty_rows)
    torch.testing.assert_close(y[0], v[0, :, 2450:2451].expand_as(y[0]))
    means = v[1].mean(1, keepdim=True).expand_as(y[1])
    expected = {"nan": torch.full_like(means, torch.nan), "zero": torch.zeros_like(means), "uniform": means}[empty_rows]
    torch.testing.assert_close(y[1], expected, equal_nan=True)


@pytest.mark.parametrize("empty_rows", ["nan", "zero"])
@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 150, 16, 16), (2, 4, 2, 20, 70, 16, 8), (2, 4, 4, 3, 9, 8, 8)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "triton"])
def test_rows_without_live_keys(assert_as_good_as, triton_device, implementation, shape, kind, empty_rows):
    q, k, v = qkv(shape, device=triton_device)
    live = torch.rand(2, 1, shape[3], shape[4], device=triton_device) < 0.5
    live[..., 0] = True
    live[0, :, -1] = False
    mask = live if kind == "bool" else torch.zeros(live.shape, device=triton_device).masked_fill(~live, -INF)
    args = (q, k, v, mask, 0.2, False, empty_rows)
    y, right = attention.run(implementation, *args), exact(*args)
    empty = y[0, :, -1]
    assert empty.isnan().all() if empty_rows == "nan" else (empty == 0).all()
    assert_as_good_as(y, spelled_out(*args), right, ULPS)


@pytest.mark.parametrize(
    "dtype, mask_dtype", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, BF16), (F32, F64)]
)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "triton"])
def test_rows_of_finfo_min_are_uniform(assert_as_good_as, triton_device, implementation, rows, dtype, mask_dtype):
    shape = (2, 4, 2, rows, 150, 16, 16)
    q, k, v = qkv(shape, dtype, triton_device)
    mask = torch.zeros(2, 1, rows, 150, device=triton_device, dtype=mask_dtype)
    mask[1, :, :, 100:] = mask[0] = torch.finfo(mask_dtype).min
    args = (q, k, v, mask, 0.2, False, "nan")
    y, right = attention.run(implementation, *args), exact(*args)
    if mask_dtype != F16:
        right[0] = v[0].double().mean(-2, keepdim=True).repeat_interleave(2, 0)  # float64 tells finfo.min + s apart
    assert_as_good_as(y, spelled_out(*args), right, ULPS)


@pytest.mark.parametrize("mask_dtype", [F32, BF16, torch.bool])
@pytest.mark.parametrize("written", [[0, 1, 2], [100, 101], [5, 200], list(range(64, 128)), [299]], ids=str)
def test_a_static_cache_reads_only_tiles_with_live_keys(triton_device, written, mask_dtype):
    q, k, v = qkv((2, 4, 2, 1, 300, 16, 16), device=triton_device)
    mask = torch.zeros(2, 1, 1, 300, device=triton_device, dtype=mask_dtype)
    mask[..., written] = 1
    if mask_dtype != torch.bool:
        mask = (1 - mask) * torch.finfo(mask_dtype).min
    args = (mask, 0.2, False, "nan")
    right = exact(q, k, v, *args)
    for start in range(0, 300, 64):  # tiles in which nothing was written may hold anything
        if not any(start <= position < start + 64 for position in written):
            k[:, :, start : start + 64] = v[:, :, start : start + 64] = float("nan")
    torch.testing.assert_close(attention.run("triton", q, k, v, *args).double(), right, atol=1e-5, rtol=1e-5)


def test_rows_of_one_tile_may_differ_in_what_is_live(assert_as_good_as, triton_device):
    q, k, v = qkv((1, 2, 1, 3, 200, 16, 16), device=triton_device)
    low = torch.finfo(F32).min
    mask = torch.full((1, 1, 3, 200), low, device=triton_device)
    mask[0, 0, 0, 150] = mask[0, 0, 1, 10:20] = 0.0  # row 2 has no live key and stays uniform
    args = (q, k, v, mask, 0.2, False, "nan")
    y, right = attention.run("triton", *args), exact(*args)
    right[:, :, 2] = v.double().mean(-2)
    assert_as_good_as(y, spelled_out(*args), right, ULPS)
    mask[0, 0, 2] = -INF
    assert attention.run("triton", *args)[:, :, 2].isnan().all()


def test_a_key_beyond_the_diagonal_is_not_live(triton_device):
    q, k, v = qkv((1, 2, 1, 3, 200, 16, 16), device=triton_device)
    mask = torch.full((1, 1, 3, 200), torch.finfo(F32).min, device=triton_device)
    mask[..., 150] = 0.0
    y = attention.run("triton", q, k, v, mask, 0.2, True)
    torch.testing.assert_close(y[0, 0], v[0, 0, :3].cumsum(0) / torch.arange(1, 4, device=y.device)[:, None])


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_huge_values(assert_as_good_as, triton_device, implementation, rows):
    q, k, v = qkv((1, 4, 2, rows, 70, 16, 16), device=triton_device, spread=1e4)
    args = (q, k, v, torch.randn(1, 1, rows, 70, device=triton_device) * 1e4, 0.25, False, "nan")
    assert_as_good_as(attention.run(implementation, *args), spelled_out(*args), exact(*args), ULPS)


@pytest.mark.parametrize("value", [INF, float("nan")])
@pytest.mark.parametrize("rows", [1, 20])
def test_infinite_and_nan_scores(triton_device, rows, value):
    q, k, v = qkv((1, 2, 1, rows, 70, 16, 16), device=triton_device)
    mask = torch.zeros(1, 1, rows, 70, device=triton_device)
    mask[..., 0, 3] = value
    y = attention.run("triton", q, k, v, mask, 0.25)
    assert torch.equal(y.isnan(), attention.reference(q, k, v, mask, 0.25).isnan())


@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
@pytest.mark.parametrize("rows", [1, 20])
def test_strides(triton_device, implementation, rows):
    base = torch.randn(2, 80, 3, 4, 16, device=triton_device)
    q = base[:, :rows, 0].transpose(1, 2)
    cache = torch.randn(3, 2, 2, 128, 20, device=triton_device)  # a view into a static cache
    k, v = cache[0, :, :, :70, :16], cache[1, :, :, 1:71, 4:]
    last = torch.randn(2, 2, 16, 70, device=triton_device).transpose(2, 3)
    for mask in (None, torch.randn(1, 1, 1, 70).to(q), torch.randn(2, 1, 70, rows).to(q).transpose(2, 3),
                 torch.randn(2, 4, rows, 140).to(q)[..., ::2], torch.randn(4, rows, 1).to(q)):  # fmt: skip
        for keys in (k, last):
            args = (q, keys, v, mask, 0.3)
            torch.testing.assert_close(attention.run(implementation, *args), attention.reference(*args))


@pytest.mark.parametrize("shape", [
    (0, 4, 2, 3, 5, 8, 8), (2, 4, 2, 0, 5, 8, 8), (2, 4, 2, 3, 0, 8, 8), (2, 4, 2, 1, 0, 8, 8), (2, 4, 4, 3, 5, 8, 0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_zero_sizes(triton_device, implementation, shape):
    q, k, v = qkv(shape, device=triton_device)
    for mask in (None, torch.zeros(1, 1, shape[3], shape[4], device=triton_device)):
        y = attention.run(implementation, q, k, v, mask, 0.3)
        torch.testing.assert_close(y, attention.reference(q, k, v, mask, 0.3))


def test_v_of_another_dtype(triton_device):
    q, k, v = qkv((1, 4, 2, 3, 9, 8, 8), device=triton_device)
    v = v.to(BF16)
    for implementation in ("sdpa", "triton"):
        y = attention.run(implementation, q, k, v, None, 0.3)
        assert y.dtype == BF16
        torch.testing.assert_close(y, attention.reference(q, k, v, None, 0.3))


@pytest.mark.parametrize("shape", [DECODE[0], DECODE[2], PREFILL[2]], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_opcheck(shape, dtype):
    q, k, v = qkv(shape, dtype)
    for name, mask in masks(shape, dtype).items():
        if name in ("none", "bool", "bias"):
            torch.library.opcheck(attention.overload, (q, k, v, mask, 0.2, name == "none", "zero"))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(attention.overload, (q, k, v, None, 0.2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck(is_causal):
    q, k, v = (t.requires_grad_() for t in qkv((1, 4, 2, 3, 5, 4, 2), F64))
    bias = torch.randn(1, 4, 3, 5, dtype=F64, requires_grad=True)
    for implementation in (attention, lambda *a: attention.run("sdpa", *a)):
        assert torch.autograd.gradcheck(lambda *a: implementation(*a, 0.3, is_causal, "nan"), (q, k, v, bias))  # noqa: B023


def test_gradients_of_masked_keys_are_zero_not_nan():
    q, k, v = (t.requires_grad_() for t in qkv((1, 2, 2, 3, 5, 4, 4)))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 3:] = False
    for run in (attention, lambda *a: attention.run("sdpa", *a)):
        for grad in torch.autograd.grad(run(q, k, v, mask, 0.3).sum(), (q, k, v)):
            assert not grad.isnan().any()


@pytest.mark.parametrize("implementation", ["op", "sdpa", "decomposed"])
def test_dynamic_shapes(implementation):
    named = {i.name: i.run for i in attention.implementations} | {"op": attention}
    run = named[implementation]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, mask: run(q, k, v, mask, 0.3, False, "nan", *[None] * 6),
        backend=counter, dynamic=True, fullgraph=True,
    )  # fmt: skip
    for rows, keys in ((3, 5), (6, 9), (4, 11)):
        q, k, v = qkv((2, 4, 2, rows, keys, 8, 8))
        mask = torch.randn(2, 1, rows, keys)
        torch.testing.assert_close(compiled(q, k, v, mask), attention.reference(q, k, v, mask, 0.3))
    assert counter.frame_count == 1


def test_one_row_reads_a_kv_head_once_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # with more threads than KV heads it wouldn't pay
    q, k, v = qkv((2, 6, 2, 1, 9, 8, 8))
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda *a: attention.run("sdpa", *a, None, 0.3), pre_dispatch=True
    )(q, k, v)
    (sdpa,) = [n for n in graph.graph.nodes if n.target == torch.ops.aten.scaled_dot_product_attention.default]
    assert sdpa.args[0].meta["val"].shape == (2, 2, 3, 8)


def long_case(rows=1, keys=module.DECODE_KEYS, dtype=BF16, width=64, scale=0.1):
    q, k, v = qkv((1, 2, 1, rows, keys, width, width), dtype)
    return attention.bind(q, k, v, None, scale)


REPLAYED = Target(CUDA, cuda_graphs=True)


@pytest.mark.parametrize("target, args, chosen", [
    (REPLAYED, long_case(), "triton"),
    (REPLAYED, long_case(rows=_flash_decode.MAX_DECODE_ROWS), "triton"),
    (REPLAYED, long_case(rows=_flash_decode.MAX_DECODE_ROWS + 1), "sdpa"),
    (REPLAYED, long_case(keys=100), "sdpa"),
    (Target(CUDA, training=True, cuda_graphs=True), long_case(), "sdpa"),
    (Target(CUDA), long_case(), "sdpa"),
    (Target(CUDA, compiled=False), long_case(), "sdpa"),
    (REPLAYED, long_case(dtype=F64), "sdpa"),
    (REPLAYED, long_case(width=264), "sdpa"),
    (Target(CPU), long_case(), "sdpa"),
    (Target(CPU), long_case(scale=-0.1), "decomposed"),
])  # fmt: skip
def test_which_implementation_serves_where(target, args, chosen):
    pytest.importorskip("triton")
    implementation, passed_over = attention.select(target, *args)
    assert implementation.name == chosen
    assert implementation.opaque == (chosen == "triton")
    assert all(reason for _, reason in passed_over)


def sizes(batch, heads, rows, keys, *, mask=None, bias=None, dtype=torch.bfloat16):
    """Arguments that are nothing but their shapes."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = empty(batch, heads, rows, 64), empty(batch, heads, keys, 64)
    more = [None if shape is None else empty(*shape) for shape in (mask, bias)]
    return attention.bind(q, k, k, more[0], 0.125, bias=more[1])


@pytest.mark.parametrize("args, expected", [
    (sizes(4096, 3, 49, 49, mask=(1, 3, 49, 49)), "triton"),  # Swin's windows
    (sizes(8, 16, 1024, 1024, bias=(1, 16, 1, 1024)), "triton"),  # BLOOM's ALiBi
    (sizes(16, 12, 512, 512, bias=(1, 12, 1023)), "triton"),  # T5's relative positions
    (sizes(64, 24, 49, 49, mask=(1, 24, 49, 49)), "triton"),
    (sizes(16, 12, 512, 512, mask=(16, 1, 1, 512)), "sdpa"),  # padding
    (sizes(16, 12, 512, 512), "sdpa"),
    (sizes(2, 12, 64, 64, mask=(1, 12, 64, 64)), "sdpa"),  # too little to do
    (sizes(4096, 64, 1, 64, mask=(1, 64, 1, 64)), "sdpa"),
    (sizes(16, 12, 512, 512, mask=(1, 12, 512, 512), dtype=torch.float32), "sdpa"),
])  # fmt: skip
def test_what_is_read_for_each_score_is_read_by_the_kernel(args, expected):
    assert attention.select(Target(CUDA), *args)[0].name == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("rows", [1, 8, 512])
def test_at_the_size_of_a_model(assert_as_good_as, rows, dtype):
    q, k, v = qkv((2, 32, 8, rows, 2048, 128, 128), dtype, "cuda")
    live = torch.arange(2048, device="cuda") < 700
    additive = torch.zeros(1, 1, 1, 2048, device="cuda", dtype=dtype).masked_fill(~live, torch.finfo(dtype).min)
    for mask in (None, live[None, None, None], additive):
        for implementation in ("sdpa", "triton"):
            args = (q, k, v, mask, 128**-0.5, False, "nan")
            assert_as_good_as(attention.run(implementation, *args), spelled_out(*args), exact(*args), ULPS)


def test_sdpa_is_what_the_zero_rule_describes():
    q, k, v = qkv((1, 2, 2, 3, 5, 4, 4))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 1, :] = False
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, mask, 0.3, False, "zero"), expected)


# Soft caps, sinks and factors

B, HQ, HKV = 2, 4, 2


def extras(rows, keys, dtype=F32, device="cpu"):
    """Settings of the op beyond scale and mask, each with what it should make of scores [B, Hq, M, N]."""
    randn = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    row_sink, head_sink = randn(B, HQ, rows, 1), randn(1, HQ, 1, 1)
    factor, shared = randn(B, HQ, rows, keys), randn(1, 1, rows, keys).abs()
    return {
        "cap": {"softcap": 3.0},
        "large cap": {"softcap": 50.0},
        "sink a head": {"sink": head_sink},
        "sink a row": {"sink": row_sink},
        "large sink": {"sink": head_sink * 100},
        "factor": {"factor": factor},
        "all of them": {"softcap": 3.0, "sink": row_sink, "factor": shared},
    }


def exact_with(q, k, v, mask, scale, is_causal, empty_rows, softcap=None, sink=None, factor=None, dtype=F64):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if factor is None else scores * factor.to(dtype)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -INF)
    columns = scores if sink is None else torch.cat([scores, sink.to(dtype).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(columns.to(F64 if dtype == F64 else F32), -1)[..., : scores.shape[-1]].to(dtype)
    return (weights.nan_to_num(0.0) if empty_rows == "zero" else weights) @ v


def case(rows, keys, dtype, device="cpu", width=16):
    return (t.to(device) for t in qkv((B, HQ, HKV, rows, keys, width, width), dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "implementation, kind",
    [(i, kind) for i in ("reference", "decomposed", "triton") for kind in extras(1, 1)]
    + [("sdpa", kind) for kind in extras(1, 1) if "sink" in kind],  # it has neither soft cap nor factor
)
def test_extras_against_float64(assert_as_good_as, triton_device, implementation, kind, dtype):
    for rows, keys in ((1, 70), (3, 9), (20, 70)):
        q, k, v = case(rows, keys, dtype, triton_device, 16 if rows < 20 else 24)
        more = extras(rows, keys, dtype, triton_device)[kind]
        live = torch.rand(B, 1, rows, keys, device=triton_device) < 0.6
        live[..., 0] = True
        added = torch.zeros(live.shape, device=triton_device).masked_fill(~live, -INF).to(dtype)
        for mask, is_causal in ((None, False), (live, False), (added, True)):
            args = (q, k, v, mask, 0.2, is_causal, "nan")
            y = attention.run(implementation, *args, **more)
            assert_as_good_as(y, exact_with(*args, **more, dtype=dtype), exact_with(*args, **more), ULPS)


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("mask_value", [-INF, torch.finfo(F32).min, False])
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "decomposed", "triton"])
def test_rows_without_live_keys_beside_a_sink_are_zero(triton_device, implementation, mask_value, rows):
    q, k, v = case(rows, 70, F32, triton_device)
    mask = torch.zeros(B, 1, rows, 70, device=triton_device)
    mask[1] = mask_value
    mask = mask == 0 if mask_value is False else mask
    if mask_value is False:
        mask[1] = False
    sink = torch.randn(1, HQ, 1, 1, device=triton_device)
    y = attention.run(implementation, q, k, v, mask, 0.3, False, "nan", sink=sink)
    assert (y[1] == 0).all()
    torch.testing.assert_close(y[0], exact_with(q, k, v, mask, 0.3, False, "nan", sink=sink)[0].float())


def test_a_sink_without_a_score_is_none(triton_device):
    q, k, v = case(20, 70, F32, triton_device)
    nothing = torch.full((1, HQ, 1, 1), -INF, device=triton_device)
    for implementation in ("reference", "sdpa", "decomposed", "triton"):
        y = attention.run(implementation, q, k, v, None, 0.3, sink=nothing)
        torch.testing.assert_close(y, attention.reference(q, k, v, None, 0.3))


def test_a_cap_near_zero_and_far_out(triton_device):
    """tanh of small, medium and huge numbers, as the kernel computes it."""
    q, k, v = case(20, 70, F32, triton_device)
    for spread in (1e-4, 1e-1, 1.0, 30.0, 1e4):
        args = (q * spread, k, v, None, 0.3, False, "nan")
        y = attention.run("triton", *args, softcap=2.0)
        torch.testing.assert_close(y.double(), exact_with(*args, softcap=2.0), atol=2e-5, rtol=2e-5)


def test_extras_of_any_strides(triton_device):
    q, k, v = case(20, 70, F32, triton_device)
    factor = torch.randn(70, 20, HQ, 2 * B, device=triton_device).permute(3, 2, 1, 0)[::2]
    sink = torch.randn(20, HQ, device=triton_device).T[None, :, :, None]
    args, more = (q, k, v, None, 0.3, False, "nan"), {"factor": factor, "sink": sink}
    torch.testing.assert_close(attention.run("triton", *args, **more), attention.reference(*args, **more))


@pytest.mark.parametrize("kind", extras(1, 1))
def test_opcheck_of_extras(kind):
    q, k, v = case(3, 5, F32)
    torch.library.opcheck(attention.overload, (q, k, v, None, 0.3, False, "nan", *_listed(extras(3, 5)[kind])))


def _listed(more):
    return [more.get(name) for name in ("softcap", "sink", "factor")]


@pytest.mark.parametrize("kind", ["sink a head", "all of them"])
def test_gradcheck_of_extras(kind):
    q, k, v = (t.requires_grad_() for t in qkv((B, HQ, HKV, 3, 5, 4, 2), F64))
    more = {n: t.requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in extras(3, 5, F64)[kind].items()}
    names = [n for n, t in more.items() if isinstance(t, torch.Tensor)]
    runs = [attention, lambda *a, **m: attention.run("decomposed", *a, **m)]
    runs += [lambda *a, **m: attention.run("sdpa", *a, **m)] if list(more) == ["sink"] else []
    for run in runs:
        assert torch.autograd.gradcheck(
            lambda q, k, v, *t: run(q, k, v, None, 0.3, True, "nan", **more | dict(zip(names, t, strict=True))),  # noqa: B023
            (q, k, v, *(more[n] for n in names)),
            fast_mode=True,
        )


@pytest.mark.parametrize("target, kind, rows, chosen", [
    (Target(CUDA), "cap", 64, "triton"),
    (Target(CUDA), "factor", 64, "triton"),
    (Target(CUDA), "sink a head", 64, "triton"),
    (Target(CUDA), "cap", 1, "triton"),
    (Target(CUDA), "sink a head", 1, "triton"),
    (Target(CUDA, training=True), "sink a head", 64, "sdpa"),
    (Target(CUDA, training=True), "cap", 64, "triton_trained"),
    (Target(CUDA, opaque=False), "sink a head", 64, "sdpa"),
    (Target(CPU), "cap", 64, "decomposed"),
    (Target(CPU), "sink a head", 64, "sdpa"),
    (Target(CPU), "sink a head", 1, "decomposed"),
    (Target(CPU, training=True), "sink a head", 1, "sdpa"),
])  # fmt: skip
def test_which_implementation_serves_extras(target, kind, rows, chosen):
    pytest.importorskip("triton")
    q, k, v = case(rows, 70, F32)
    args = attention.bind(q, k, v, None, 0.3, False, "nan", **extras(rows, 70)[kind])
    implementation, passed_over = attention.select(target, *args)
    assert implementation.name == chosen
    assert all(reason for _, reason in passed_over)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("rows", [1, 8, 1000])
@pytest.mark.parametrize("kind", extras(1, 1))
def test_extras_at_the_size_of_a_model(assert_as_good_as, kind, rows, dtype):
    q, k, v = (t.to("cuda") for t in qkv((B, HQ, HKV, rows, 1000, 128, 128), dtype))
    more = extras(rows, 1000, dtype, "cuda")[kind]
    live = (torch.rand(B, 1, 1, 1000, device="cuda") < 0.7).to(dtype)
    for mask, is_causal in ((None, True), ((1 - live) * torch.finfo(dtype).min, False)):
        args = (q, k, v, mask, 128**-0.5, is_causal, "nan")
        y = attention.run("triton", *args, **more)
        assert_as_good_as(y, exact_with(*args, **more, dtype=dtype), exact_with(*args, **more), ULPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["cap", "sink a head"])
def test_the_scores_are_never_stored(kind):
    q, k, v = (t.to("cuda") for t in qkv((1, HQ, HKV, 8192, 8192, 64, 64), BF16))
    more = extras(8192, 1, BF16, "cuda")[kind]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, v, None, 0.125, True, "nan", *_listed(more))
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192
