"""Linear layers of one input in one launch: every implementation against float64, odd sizes, strides, biases."""

import pytest
import torch

from fxopt.kernels import _small_matmul
from fxopt.kernels.shared_input_linear import gated_linear, linear_pair, linear_triple
from fxopt.ops import Target

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NO_NORM = (None, None, 0.0, None)


def case(rows, k, widths, dtype, device, biased=True):
    x = torch.randn(*rows, k, device=device).to(dtype)
    weights = [torch.randn(n, k, device=device).to(dtype) for n in widths]
    biases = [torch.randn(n, device=device).to(dtype) if biased and i != 1 else None for i, n in enumerate(widths)]
    return (linear_pair if len(widths) == 2 else linear_triple), (x, *weights, *biases, *NO_NORM, 64)


def with_norm(args):
    """The same with an RMSNorm before the layers, as Llama rounds; of several rows it isn't the kernel's."""
    x, *rest = args
    return x, *rest[:-5], torch.randn(x.shape[-1], device=x.device).to(x.dtype), 1e-5, 0.0, x.dtype, 64


def exact(op, args):
    return op.reference(
        *(a.double() if isinstance(a, torch.Tensor) else F64 if isinstance(a, torch.dtype) else a for a in args)
    )


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2,), (3, 5), (17,), (64,), (9, 8)], ids=str)
@pytest.mark.parametrize("widths", [(32, 8, 8), (40, 33), (5, 1, 70)], ids=str)
def test_every_shape(assert_as_good_as, triton_device, widths, rows, dtype):
    for k in (33, 576):
        op, args = case(rows, k, widths, dtype, triton_device, biased=k == 33)
        results = zip(op.run("triton", *args), op.reference(*args), exact(op, args), strict=True)
        for actual, eager, truth in results:
            assert_as_good_as(actual, eager, truth, ulps=4)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (70,), (0,)], ids=str)
@pytest.mark.parametrize("activation, biased", [("silu", False), ("gelu_tanh", True)])
def test_gated(assert_as_good_as, triton_device, activation, biased, rows, dtype):
    for k, n in ((33, 40), (576, 7)):
        _, (x, gate, up, b, _, *_, most) = case(rows, k, (n, n), dtype, triton_device)
        plain = (x, gate / 8, up / 8, activation, b if biased else None, None, *NO_NORM, most)
        for args in (plain, with_norm(plain)):
            truth = exact(gated_linear, args)
            assert_as_good_as(gated_linear.run("triton", *args), gated_linear.reference(*args), truth, ulps=4)


@pytest.mark.parametrize("rows", [(1,), (4,)])
def test_strides(triton_device, rows):
    op, (x, w0, w1, b0, _, *_, most) = case(rows, 48, (16, 24), F32, triton_device)
    wide = torch.randn(24, 96, device=triton_device)
    spread = torch.randn(*rows, 96, device=triton_device)[:, ::2]
    for args in ((x, w0, wide[:, 48:], b0, None, *NO_NORM, most), (spread, w0, w1, b0, None, *NO_NORM, most)):
        torch.testing.assert_close(op.run("triton", *args), op.reference(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("widths", [(32, 8, 8), (40, 33)], ids=str)
def test_every_configuration_with_and_without_a_norm(assert_as_good_as, triton_device, widths, rows):
    op, plain = case((rows,), 600, widths, BF16, triton_device)
    plain = (plain[0], *(a / 8 if isinstance(a, torch.Tensor) else a for a in plain[1:]))
    for args in (plain, with_norm(plain)):
        eager, truth = op.reference(*args), exact(op, args)
        for config in (None, *_small_matmul.configs(rows, sum(widths), 600, split=False)):
            for actual, e, t in zip(op.run("triton", *args, config=config), eager, truth, strict=True):
                assert_as_good_as(actual, e, t, ulps=4)
                assert actual.is_contiguous()


@pytest.mark.parametrize("rows, k", [((0,), 8), ((3,), 0)])
def test_zero_sizes(triton_device, rows, k):
    op, args = case(rows, k, (4, 5), F32, triton_device)
    torch.testing.assert_close(op.run("triton", *args), op.reference(*args))


@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 2)])
def test_opcheck(widths):
    op, args = case((2, 3), 8, widths, F32, "cpu")
    torch.library.opcheck(op.overload, args)


def test_opcheck_and_gradcheck_of_the_gated_form():
    x, gate, up, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((2, 3), (4, 3), (4, 3), (4,)))
    torch.library.opcheck(gated_linear.overload, (x, gate, up, "silu", b, None, *NO_NORM, 16))
    assert torch.autograd.gradcheck(lambda x, g, u, b: gated_linear(x, g, u, "silu", b), (x, gate, up, b))


@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 2)])
def test_gradcheck(widths):
    op, args = case((3,), 5, widths, F64, "cpu")
    tensors = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor)]

    def f(*given):
        given = iter(given)
        return op(*(next(given) if isinstance(a, torch.Tensor) else a for a in args))

    assert torch.autograd.gradcheck(f, tensors)


CUDA = Target(torch.device("cuda"))


@pytest.mark.parametrize("target, rows, most, change, reason", [
    (CUDA, 4, 16, {}, None),
    (CUDA, 17, 16, {}, "up to 16 rows; there are 17"),
    (CUDA, 65, 999, {}, "up to 64 rows; there are 65"),
    (CUDA, 4, 0, {}, "outside of CUDA graphs"),
    (Target(torch.device("cuda"), cuda_graphs=True), 1, 0, {}, None),
    (Target(torch.device("cuda"), cuda_graphs=True), 4, 0, {}, "several rows of float32"),
    (CUDA, 4, 16, {-4: 1e-5}, "norms one row; there are 4"),
    (CUDA, 1, 16, {-4: 1e-5}, None),
    (Target(torch.device("cpu")), 4, 16, {}, "CUDA device"),
    (Target(torch.device("cuda"), training=True), 4, 16, {}, "no backward"),
    (CUDA, 4, 16, {1: torch.randn(8, 6).t()}, "transposed in memory"),
    (CUDA, 4, 16, {2: torch.randn(8, 8).half()}, "one dtype"),
])  # fmt: skip
def test_which_implementation_serves_where(target, rows, most, change, reason):
    op, args = case((rows,), 8, (6, 8), F32, "cpu")
    args = [change.get(i, change.get(i - len(args), a)) for i, a in enumerate((*args[:-1], most))]
    implementation, passed_over = op.select(target, *args)
    assert implementation.name == ("decomposed" if reason else "triton")
    assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(assert_as_good_as):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for rows in (1, 2, 16, 64):
        op, args = case((rows,), 4096, (4096, 1024, 1024), BF16, "cuda")
        results = zip(op.run("triton", *args), op.reference(*args), exact(op, args), strict=True)
        for actual, eager, truth in results:
            assert_as_good_as(actual, eager, truth)
        x, gate, up = args[0], args[1] / 64, args[1].flip(0) / 64
        eager, truth = (gated_linear.reference(*(t.to(d) for t in (x, gate, up)), "silu") for d in (BF16, F64))
        assert_as_good_as(gated_linear.run("triton", x, gate, up, "silu", most_rows=64), eager, truth)
