"""Attention with a bias that depends on the distance of key and row, or on the key: M + N - 1, N numbers, or one."""

from dataclasses import replace

import pytest
import torch

from fxopt.kernels import _flash
from fxopt.kernels._flash_parts import operands
from fxopt.kernels.attention import attention
from fxopt.ops import Target

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
B, HQ, HKV = 2, 4, 2


def qkv(rows, keys, dtype=F32, device="cpu", width=16):
    make = lambda h, n: torch.randn(B, h, n, width, device=device).to(dtype)  # noqa: E731
    return make(HQ, rows), make(HKV, keys), make(HKV, keys)


def dense(bias, rows, keys):
    """A bias by key, by distance or of a slope for every score, copied row by row."""
    if bias.dim() == 4:
        return bias
    if bias.dim() == 2:
        bias = bias[..., None] * torch.arange(1 - rows, keys, device=bias.device)
    return torch.stack([bias[..., rows - 1 - i : rows - 1 - i + keys] for i in range(rows)], 2)


def biases(rows, keys, dtype, device):
    randn = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    every = rows + keys - 1
    wide = randn(1, every, 2 * HQ).permute(0, 2, 1)[:, ::2]
    return {
        "a head": randn(1, HQ, every), "a batch": randn(B, 1, every), "all": randn(B, HQ, every),
        "strides": wide, "float32": randn(1, HQ, every).float(), "by key": randn(B, HQ, 1, keys),
        "by key, shared": randn(1, 1, 1, keys), "slopes": randn(B, HQ), "a slope": randn(1, 1).abs(),
        "a slope a head": randn(1, 2 * HQ)[:, ::2].float(),
    }  # fmt: skip


def more(rows, keys, device):
    padding = torch.rand(B, 1, 1, keys, device=device) < 0.7
    padding[1] = False
    i = torch.arange(rows, device=device)[None, None]
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "padded": {"mask": padding, "empty_rows": "zero"},
        "empty rows are averages": {"mask": padding, "empty_rows": "uniform"},
        "window": {"first": i - 9, "last": i + 5, "empty_rows": "zero"},
        "padded up to a bound": {"mask": padding, "last": i + keys - rows, "empty_rows": "uniform"},
        "a mask that is added": {"mask": torch.randn(1, HQ, rows, keys, device=device)},
        "soft cap, sink, factor": {
            "softcap": 3.0, "sink": torch.randn(1, HQ, 1, 1, device=device),
            "factor": torch.rand(rows, keys, device=device),
        },
    }  # fmt: skip


def exact(q, k, v, dtype, bias, mask=None, is_causal=False, empty_rows="nan", softcap=None, sink=None, factor=None,
          first=None, last=None):  # fmt: skip
    q, k, v = (t.to(dtype) for t in (q, k, v))
    (rows, keys), key = (q.shape[2], k.shape[2]), torch.arange(k.shape[2], device=q.device)
    k, v = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v))
    s = q @ k.mT * 0.3
    s = s if factor is None else s * factor.to(dtype)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s + dense(bias.to(dtype), rows, keys)
    live = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    live = live.tril() if is_causal else live
    live = live if first is None else live & (key >= first[..., None])
    live = live if last is None else live & (key <= last[..., None])
    if mask is not None:
        live, s = (live & mask, s) if mask.dtype == torch.bool else (live, s + mask.to(dtype))
    s = s.masked_fill(~live, -INF if empty_rows != "uniform" else -1e30 if dtype != F16 else -6e4)
    s = s if sink is None else torch.cat([s, sink.to(dtype).expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1, dtype=None if dtype == F64 else F32).to(dtype)[..., :keys]
    return (p.nan_to_num(0.0) if empty_rows == "zero" else p) @ v


def check(assert_as_good_as, implementation, tensors, **given):
    arguments = {"mask": None, "scale": 0.3, "is_causal": False, "empty_rows": "nan"} | given
    y = attention.run(implementation, *tensors, **arguments)
    assert_as_good_as(y, exact(*tensors, tensors[0].dtype, **given), exact(*tensors, F64, **given), 4)


@pytest.mark.parametrize("kind", biases(2, 2, F32, "cpu"))
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "decomposed", "triton"])
@pytest.mark.parametrize("rows, keys, dtype", [
    (5, 70, F32), (70, 41, F32), pytest.param(1, 50, F32, marks=pytest.mark.slow), (40, 70, F16),
    pytest.param(70, 70, BF16, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_bias_against_float64(assert_as_good_as, triton_device, implementation, kind, rows, keys, dtype):
    bias = biases(rows, keys, dtype, triton_device)[kind]
    if implementation == "sdpa" and bias.dtype != dtype and triton_device != "cpu":
        pytest.skip("SDPA on a GPU rounds a mask to the dtype of q")
    check(assert_as_good_as, implementation, qkv(rows, keys, dtype, triton_device), bias=bias)


@pytest.mark.parametrize(
    "implementation, kind",
    [(i, kind) for i in ("decomposed", "triton") for kind in more(2, 2, "cpu")]
    + [("sdpa", kind) for kind, given in more(2, 2, "cpu").items() if "factor" not in given],
)
@pytest.mark.parametrize("rows, by", [(6, "distance"), (40, "distance"), (40, "key"), (6, "slope"), (40, "slope")])
def test_a_bias_beside_everything_else(assert_as_good_as, triton_device, implementation, kind, rows, by):
    given = more(rows, 70, triton_device)[kind]
    shape = {"key": (1, HQ, 1, 70), "distance": (1, HQ, rows + 69), "slope": (1, HQ)}[by]
    bias = torch.randn(shape, device=triton_device)
    check(assert_as_good_as, implementation, qkv(rows, 70, F32, triton_device), bias=bias, **given)


def test_infinite_numbers(triton_device):
    """A table can rule keys out, all of a row's even: what such a row gives is asked for as always."""
    q, k, v = qkv(20, 30, device=triton_device)
    bias = torch.full((1, HQ, 49), -INF, device=triton_device)
    bias[..., 19 + 25 :] = 0.0  # keys from 25 places ahead on: rows 5 and later have none
    for empty_rows in ("nan", "zero"):
        y = attention.run("triton", q, k, v, None, 0.3, False, empty_rows, bias=bias)
        right = attention.reference(q, k, v, None, 0.3, False, empty_rows, bias=bias)
        torch.testing.assert_close(y, right, equal_nan=True)
        assert bool((y[:, :, 5:].isnan() if empty_rows == "nan" else y[:, :, 5:] == 0).all())


def test_distance_zero_is_where_the_kernels_begin():
    q, k, v = qkv(5, 7)
    bias = torch.arange(11.0).expand(1, HQ, 11)
    given = operands(q, k, v, None, False, "nan", None, None, None, None, None, bias)
    assert given.bias[0, 0, 0] == 4
    assert given.bias.stride() == (0, 0, 1)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", ["plain", "causal", "soft cap, sink, factor", "padded up to a bound", "window"])
def test_a_slope_in_half_precision(assert_as_good_as, triton_device, kind, dtype):
    """There a kernel leaves out what is the same for a row."""
    given = more(150, 70, triton_device)[kind]
    slopes = torch.tensor([[0.7, -0.3, 4.0, 0.01]], device=triton_device)
    check(assert_as_good_as, "triton", qkv(150, 70, dtype, triton_device), bias=slopes, **given)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("more_keys", [0, 6])
def test_a_transparent_implementation_is_traced_with_any_sizes(dynamic, more_keys):
    torch._dynamo.reset()
    named = {i.name: i.run for i in attention.implementations}
    step = torch.compile(
        lambda q, k, v, bias: named["sdpa"](
            q, k, v, None, 0.3, False, "nan", None, None, None, None, None, bias
        ), backend="aot_eager", fullgraph=True, dynamic=dynamic,
    )  # fmt: skip
    for rows in (7, 11):
        tensors = qkv(rows, rows + more_keys)
        bias = torch.randn(1, HQ, 2 * rows + more_keys - 1)
        torch.testing.assert_close(
            step(*tensors, bias), exact(*tensors, F32, bias=bias), atol=1e-5, rtol=1e-5
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, HQ, 1, 9), (1, HQ, 13), (B, 1)])
def test_opcheck(shape):
    q, k, v = qkv(5, 9, width=4)
    bias = torch.randn(shape)
    args = attention.bind(q, k, v, None, 0.3, bias=bias)
    torch.library.opcheck(attention.overload, tuple(args))
    leaves = [t.double().requires_grad_() for t in (q, k, v, bias)]
    run = lambda q, k, v, bias: attention.reference(q, k, v, None, 0.3, bias=bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_what_the_tuner_draws_fits():
    q, k, v = (t.to("meta") for t in qkv(5, 9))
    args = attention.bind(q, k, v, None, 0.3, bias=torch.empty(1, HQ, 13, device="meta"))
    made = attention.drawn(*args)
    assert made[12].shape == (1, HQ, 13)
    assert made[12].is_floating_point()


CUDA, PADDING = Target(torch.device("cuda")), torch.ones(B, 1, 1, 1024, dtype=torch.bool)


@pytest.mark.parametrize("target, rows, given, chosen", [
    (CUDA, 1024, {}, "triton"),
    (CUDA, 64, {}, "sdpa"),
    (CUDA, 1024, {"last": torch.arange(1024)}, "triton"),
    (replace(CUDA, opaque=False), 1024, {}, "sdpa"),
    (Target(torch.device("cpu")), 1024, {}, "sdpa"),
    (CUDA, 1024, {"bias": torch.ones(1, HQ)}, "triton"),
    (CUDA, 1024, {"bias": torch.ones(1, HQ), "mask": PADDING}, "triton"),
    (CUDA, 1024, {"bias": torch.ones(1, HQ), "mask": torch.ones(1, 1, 1024, 1024)}, "triton"),
    (CUDA, 64, {"bias": torch.ones(1, HQ)}, "sdpa"),
    (Target(torch.device("cpu")), 1024, {"bias": torch.ones(1, HQ)}, "sdpa"),
    (replace(CUDA, training=True), 1024, {"bias": torch.ones(1, HQ)}, "triton_trained"),
])  # fmt: skip
def test_where_the_kernels_are_chosen(target, rows, given, chosen):
    pytest.importorskip("triton")
    q, k, v = qkv(rows, rows, BF16)
    args = attention.bind(q, k, v, **{"mask": None, "scale": 0.3, "bias": torch.ones(1, HQ, 2 * rows - 1), **given})
    assert attention.select(target, *args)[0].name == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", more(2, 2, "cpu"))
def test_at_the_size_of_a_model(assert_as_good_as, kind, dtype):
    for rows, keys in ((3, 2000), (1000, 1100), (1500, 1500)):
        tensors = qkv(rows, keys, dtype, "cuda", 64)
        shapes = (1, HQ, rows + keys - 1), (B, HQ, 1, keys), (1, HQ)
        for bias in (torch.randn(shape, device="cuda") for shape in shapes):
            check(assert_as_good_as, "triton", tensors, bias=bias, **more(rows, keys, "cuda")[kind])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_bias_stores_nothing_of_the_size_of_the_scores():
    q, k, v = qkv(8192, 8192, BF16, "cuda", 64)
    bias = torch.randn(1, HQ, 16383, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _flash.flash_attention(q, k, v, None, 0.125, False, "zero", bias=bias)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192 // 2
