import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.layer_norm import add_layer_norm, layer_norm
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [((2, 3, 8), 1), ((1, 1, 768), 1), ((5, 33), 1), ((7, 1), 1), ((1000,), 1), ((3, 2, 13), 2), ((2, 20000), 1)]


def parameters(shape, dims, dtype, device="cpu"):
    return [torch.randn(shape[-dims:], device=device).to(dtype) for _ in range(2)]


def exact(x, weight, bias, eps, dims):
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    return F.layer_norm(x.double(), x.shape[-dims:], weight, bias, eps)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape, dims", SHAPES)
@pytest.mark.parametrize("implementation", ["aten", "triton"])
def test_against_float64(assert_as_good_as, triton_device, implementation, shape, dims, dtype):
    x = (torch.randn(shape, device=triton_device) * 3 + 1).to(dtype)
    weight, bias = parameters(shape, dims, dtype, triton_device)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        y = layer_norm.run(implementation, x, w, b, 1e-5, dims)
        assert_as_good_as(y, layer_norm.reference(x, w, b, 1e-5, dims), exact(x, w, b, 1e-5, dims))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, BF16), (BF16, F32)])
@pytest.mark.parametrize("columns", [1, 31, 768, 9000])
def test_add_rounds_the_sum_first(assert_as_good_as, triton_device, dtypes, columns):
    x, r = (torch.randn(6, columns, device=triton_device).to(d) for d in dtypes)
    weight, bias = parameters((columns,), 1, (x + r).dtype, triton_device)
    y, total = add_layer_norm.run("triton", x, r, weight, bias, 1e-5)
    eager = F.layer_norm(x + r, (columns,), weight, bias)
    assert torch.equal(total, x + r)
    assert total.dtype == F32 or (y == eager).float().mean() > 0.98
    assert_as_good_as(y, eager, exact(x + r, weight, bias, 1e-5, 1))


@pytest.mark.parametrize("out_dtype", [F32, BF16, F64])
def test_out_dtype_casts_what_was_rounded(triton_device, out_dtype):
    x = torch.randn(4, 40, device=triton_device).to(F16)
    w, b = parameters((40,), 1, F16, triton_device)
    for implementation in ("aten", "triton"):
        y = layer_norm.run(implementation, x, w, b, 1e-5, 1, out_dtype)
        torch.testing.assert_close(y, F.layer_norm(x, (40,), w, b).to(out_dtype), atol=2e-2, rtol=1e-2)
    assert torch.equal(y.to(F16).to(out_dtype), y) or out_dtype == BF16


def test_wider_weights_take_part_in_their_own_dtype(assert_as_good_as, triton_device):
    x = torch.randn(4, 40, device=triton_device).to(BF16)
    w, b = parameters((40,), 1, F32, triton_device)
    y = layer_norm.reference(x, w, b, 1e-5)
    assert y.dtype == layer_norm(x, w, b, 1e-5).dtype == BF16
    assert_as_good_as(layer_norm.run("triton", x, w, b, 1e-5), y, exact(x, w, b, 1e-5, 1))


@pytest.mark.parametrize("columns", [100, 9000])
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_a_large_mean_costs_no_digits(triton_device, columns, mean):
    x = torch.randn(3, columns, device=triton_device) + mean
    y = layer_norm.run("triton", x, None, None, 1e-5)
    torch.testing.assert_close(y.double(), exact(x, None, None, 1e-5, 1), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [1e-8, 0.0, float("inf"), float("nan")])
def test_extreme_values(assert_as_good_as, triton_device, value):
    x = torch.randn(3, 70, device=triton_device)
    x = x * value if 0 <= value < 1 else x.index_fill(1, torch.tensor([5], device=triton_device), value)
    w, b = parameters((70,), 1, F32, triton_device)
    assert_as_good_as(layer_norm.run("triton", x, w, b, 1e-5), F.layer_norm(x, (70,), w, b), exact(x, w, b, 1e-5, 1))


@pytest.mark.parametrize("view", [
    lambda t: t[:, ::2], lambda t: t[..., 3:40], lambda t: t.transpose(0, 1), lambda t: t.transpose(1, 2),
    lambda t: t[:, 1:2].expand(4, 6, 48), lambda t: t[..., ::3],
    lambda t: t.unflatten(-1, (3, 16))[:, 1:].transpose(1, 2),
])  # fmt: skip
@pytest.mark.parametrize("dims", [1, 2])
def test_strided_rows(triton_device, view, dims):
    x, r = (view(torch.randn(4, 6, 48, device=triton_device)) for _ in range(2))
    w, b = parameters(x.shape, dims, F32, triton_device)
    torch.testing.assert_close(layer_norm.run("triton", x, w, b, 1e-5, dims), layer_norm.reference(x, w, b, 1e-5, dims))
    actual = add_layer_norm.run("triton", x, r, w, b, 1e-5, dims)
    torch.testing.assert_close(actual, add_layer_norm.reference(x, r, w, b, 1e-5, dims))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_zero_sizes(triton_device, shape):
    x, w = torch.randn(shape, device=triton_device), torch.randn(shape[-1], device=triton_device)
    for op, args in ((layer_norm, (x,)), (add_layer_norm, (x, x))):
        for implementation in ("triton", "aten"):
            torch.testing.assert_close(op.run(implementation, *args, w, w, 1e-6), op.reference(*args, w, w, 1e-6))


@pytest.mark.parametrize("dtype, out_dtype", [(F32, None), (BF16, None), (BF16, F32)])
@pytest.mark.parametrize("op", [layer_norm, add_layer_norm])
def test_opcheck(op, dtype, out_dtype):
    for x in (torch.randn(2, 3, 8), torch.randn(3, 2, 8).transpose(0, 1), torch.randn(2, 8, 3).transpose(1, 2)):
        x = x.to(dtype)
        w, b = parameters(x.shape, 1, dtype)
        args = (x,) if op is layer_norm else (x, x.clone())
        torch.library.opcheck(op.overload, (*args, w, b, 1e-5, 1, out_dtype))


def test_gradcheck():
    x, r = (torch.randn(2, 3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(3, 4, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-5, 2), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5, 2), (x, r, w, b))


def test_dynamic_shapes():
    def f(x, r, w):
        return add_layer_norm(x, r, w, None, 1e-6)

    compiled = torch.compile(f, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 5, 9):
        args = torch.randn(2, rows, 8), torch.randn(2, rows, 8), torch.randn(8)
        torch.testing.assert_close(compiled(*args), add_layer_norm.reference(*args, None, 1e-6))


@pytest.mark.parametrize("target, chosen", [
    (Target(torch.device("cuda"), compiled=True), "aten"),
    (Target(torch.device("cuda"), compiled=False, training=True), "aten"),
    (Target(torch.device("cpu"), compiled=False), "aten"),
    (Target(torch.device("cuda"), compiled=False), "triton"),
])  # fmt: skip
def test_which_implementation_serves_where(target, chosen):
    pytest.importorskip("triton")
    x, w = torch.randn(2, 8), torch.randn(8)
    implementation, passed_over = layer_norm.select(target, *layer_norm.bind(x, w, None, 1e-5))
    assert implementation.name == chosen
    assert implementation.opaque == (chosen == "triton")
    assert all(reason for _, reason in passed_over)


def test_permuted_rows_and_float64_are_not_for_the_kernel():
    pytest.importorskip("triton")
    target = Target(torch.device("cuda"), compiled=False)
    for x, reason in ((torch.randn(3, 2, 8).transpose(0, 1), "permuted"), (torch.randn(2, 8, dtype=F64), "float64")):
        implementation, passed_over = layer_norm.select(target, *layer_norm.bind(x, None, None, 1e-5))
        assert implementation.name == "aten"
        assert reason in passed_over[0][1]
