"""A linear layer of few rows: every part and configuration against float64, odd sizes, strides, hostile values."""

import math

import pytest
import torch

from fxopt.kernels import _small_matmul
from fxopt.kernels.small_linear import small_linear
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PARTS = ("bias", "residual", "activation", "norm", "unweighted norm")


def case(rows, n, k, dtype, device, parts=PARTS[:4], scale=1.0):
    def make(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    norm = next((part for part in parts if "norm" in part and math.prod(rows) == 1), None)  # several rows keep it apart
    return (
        make(*rows, k) * scale, make(n, k) / 4, make(n) if "bias" in parts else None,
        make(*rows, n) if "residual" in parts else None, "gelu_tanh" if "activation" in parts else None,
        make(k) if norm == "norm" else None, 1e-5 if norm else None, 1.0 if norm == "norm" else 0.0,
        dtype if norm == "norm" else None, 64,
    )  # fmt: skip


def exact(args):
    return small_linear.reference(
        *(a.double() if isinstance(a, torch.Tensor) else F64 if isinstance(a, torch.dtype) else a for a in args)
    )


@pytest.fixture
def check(assert_as_good_as):
    def compare(args, config=None):
        actual = small_linear.run("triton", *args, config=config)
        assert actual.is_contiguous()
        assert_as_good_as(actual, small_linear.reference(*args), exact(args), ulps=4)

    return compare


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2,), (3, 5), (64,), (9, 8)], ids=str)
@pytest.mark.parametrize("n, k", [(40, 33), (1, 576), (70, 128)])
def test_every_shape(check, triton_device, n, k, rows, dtype):
    check(case(rows, n, k, dtype, triton_device))


@pytest.mark.parametrize("rows", [(1,), (5,)])
@pytest.mark.parametrize("part", [(), *((p,) for p in PARTS), ("bias", "residual"), ("unweighted norm", "residual")])
def test_every_part_alone(check, triton_device, part, rows):
    check(case(rows, 24, 80, F32, triton_device, part))
    check(case(rows, 24, 80, BF16, triton_device, part))


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_every_configuration(check, triton_device, rows):
    args = case((rows,), 100, 600, BF16, triton_device)
    configs = [*_small_matmul.configs(rows, 100, 600), _small_matmul.guess(rows, 100, 600, 2) | {"SPLIT": 4}]
    assert any(c["SPLIT"] > 1 for c in configs)
    for config in configs:
        check(args, config)


@pytest.mark.parametrize("rows", [(1,), (4,)])
def test_strides(check, triton_device, rows):
    x, w, b, r, *rest = case(rows, 24, 48, F32, triton_device)
    wide = torch.randn(24, 96, device=triton_device)
    spread = torch.randn(*rows, 96, device=triton_device)[:, ::2]
    check((x, wide[:, 48:], b, r, *rest))
    check((spread, w, b, r, *rest))
    check((x, w, b[:1].expand(24), torch.randn(24, *rows, device=triton_device).t(), *rest))


@pytest.mark.parametrize("rows, n, k", [((0,), 4, 8), ((3,), 4, 0), ((3,), 0, 8)])
def test_zero_sizes(triton_device, rows, n, k):
    args = case(rows, n, k, F32, triton_device, ("bias", "residual"))
    torch.testing.assert_close(small_linear.run("triton", *args), small_linear.reference(*args))


@pytest.mark.parametrize("rows", [(1,), (3,)])
@pytest.mark.parametrize("dtype, scale", [(F16, 200.0), (BF16, 1e15), (F32, 1e15), (BF16, 1e-15), (F32, 1e30)])
def test_huge_and_tiny_inputs_of_the_norm(check, triton_device, dtype, scale, rows):
    check(case(rows, 24, 80, dtype, triton_device, ("norm",), scale))


def test_a_norm_of_several_rows_is_computed_apart(check, triton_device):
    """A dynamic number of rows is known to the kernel only."""
    x, w, bias, residual, activation, *norm = case((1,), 20, 33, F32, triton_device)
    check((x.expand(3, 33) * torch.randn(3, 1), w, bias, residual.expand(3, 20), activation, *norm))


def test_infinite_rows_stay_apart(triton_device):
    x, w, *rest = case((3,), 8, 32, F32, triton_device, ())
    x[1, 3] = torch.inf
    out, eager = small_linear.run("triton", x, w, *rest), small_linear.reference(x, w, *rest)
    torch.testing.assert_close(out, eager, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_opcheck_and_gradcheck():
    for parts in ((), PARTS[:4]):
        torch.library.opcheck(small_linear.overload, case((2, 3), 8, 5, F32, "cpu", parts))
    x, w, b, r = (t.requires_grad_() for t in case((3,), 4, 5, F64, "cpu")[:4])
    assert torch.autograd.gradcheck(lambda x, w, b, r: small_linear(x, w, b, r, "silu", None, 1e-5), (x, w, b, r))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_not_given_need_not_be(device):
    x, weight = torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)
    result = small_linear(x, weight)
    assert result.shape == (3, 5)
    if device == "cpu":
        torch.testing.assert_close(result, torch.nn.functional.linear(x, weight))


def test_the_activation_must_be_known():
    with pytest.raises(ValueError, match="no activation is called 'swish'; there are silu"):
        small_linear.reference(torch.randn(2, 3), torch.randn(4, 3), activation="swish")


CUDA, GRAPHS = Target(torch.device("cuda")), Target(torch.device("cuda"), cuda_graphs=True)
HALF = dict(enumerate(case((4,), 6, 8, F16, "cpu", PARTS[:3])[:4]))


@pytest.mark.parametrize("target, rows, most, change, reason", [
    (CUDA, 4, 16, {}, None),
    (CUDA, 17, 16, {}, "up to 16 rows; there are 17"),
    (CUDA, 65, 999, {}, "up to 64 rows; there are 65"),
    (CUDA, 4, 0, {}, "outside of CUDA graphs"),
    (GRAPHS, 1, 0, {}, None),
    (GRAPHS, 4, 0, {}, "several rows of float32"),
    (GRAPHS, 4, 0, HALF, None),
    (GRAPHS, 4, 3, {}, "up to 3 rows; there are 4"),
    (CUDA, 4, 16, {6: 1e-5}, "norms one row; there are 4"),
    (CUDA, 1, 16, {6: 1e-5}, None),
    (Target(torch.device("cpu")), 4, 16, {}, "CUDA device"),
    (Target(torch.device("cuda"), training=True), 4, 16, {}, "no backward"),
    (CUDA, 4, 16, {1: torch.randn(8, 6).t()}, "transposed in memory"),
    (CUDA, 4, 16, {1: torch.randn(6, 8).half()}, "one dtype"),
    (CUDA, 4, 16, {3: torch.randn(4, 6).half()}, "one dtype"),
    (CUDA, 4, 16, {3: torch.randn(6)}, "residual of the result's shape"),
])  # fmt: skip
def test_which_implementation_serves_where(target, rows, most, change, reason):
    args = [*case((rows,), 6, 8, F32, "cpu", PARTS[:3])[:-1], most]
    args = [change.get(i, a) for i, a in enumerate(args)]
    implementation, passed_over = small_linear.select(target, *args)
    assert implementation.name == ("decomposed" if reason else "triton")
    assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(check):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for rows in (1, 2, 16, 64):
        for n, k in ((4096, 4096), (1024, 4096), (4096, 14336)):
            args = case((rows,), n, k, BF16, "cuda")
            check(args)
            for config in _small_matmul.configs(rows, n, k):
                check(args, config)
