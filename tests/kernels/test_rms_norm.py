import pytest
import torch

from fxopt.kernels.rms_norm import add_rms_norm, rms_norm
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(2, 3, 8), (1, 1, 576), (5, 33), (7, 1), (1000,), (3, 2, 130), (2, 9000)]
# weighted, weight_offset, round_to is x's dtype, out_dtype is x's dtype
ORDERS = {
    "llama": (True, 0.0, True, False),
    "gemma": (True, 1.0, False, True),
    "olmo": (True, 0.0, False, True),
    "plain": (False, 0.0, True, False),
    "float": (True, 0.0, False, False),
    "offset": (True, 0.5, True, True),
}


def case(order, dtype, weight_dtype, columns, device="cpu"):
    weighted, offset, rounds, casts = ORDERS[order]
    weight = torch.randn(columns, device=device).to(weight_dtype) if weighted else None
    return weight, 1e-6, offset, dtype if rounds else None, dtype if casts else None


def exact(x, weight, eps, offset, *_):
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * (weight.double() + offset)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("implementation", ["reference", "decomposed", "triton"])
def test_every_cast_order(assert_as_good_as, triton_device, implementation, order, dtype):
    for shape in SHAPES:
        x = torch.randn(shape, device=triton_device).mul(3).to(dtype)
        rest = case(order, dtype, dtype, shape[-1], triton_device)
        y = rms_norm.run(implementation, x, *rest)
        assert_as_good_as(y, rms_norm.reference(x, *rest), exact(x, *rest))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("order", ["llama", "gemma", "offset"])
def test_the_kernel_rounds_where_the_reference_does(triton_device, order, dtype):
    x = torch.randn(64, 128, device=triton_device).to(dtype)
    rest = case(order, dtype, dtype, 128, triton_device)
    same = rms_norm.run("triton", x, *rest) == rms_norm.reference(x, *rest)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("order", ["llama", "gemma", "offset"])
def test_weight_of_another_dtype(assert_as_good_as, triton_device, order, weight_dtype):
    x = torch.randn(4, 40, device=triton_device).to(F16)
    rest = case(order, F16, weight_dtype, 40, triton_device)
    eager = rms_norm.reference(x, *rest)
    y = rms_norm.run("triton", x, *rest)
    assert y.dtype == eager.dtype == rms_norm(x, *rest).dtype
    assert_as_good_as(y, eager, exact(x, *rest))


@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, BF16)])
@pytest.mark.parametrize("columns", [1, 31, 576, 9000])
def test_add_rounds_the_sum_first(assert_as_good_as, triton_device, dtypes, columns):
    x, r = (torch.randn(6, columns, device=triton_device).to(d) for d in dtypes)
    rest = case("llama", BF16, BF16, columns, triton_device)
    y, total = add_rms_norm.run("triton", x, r, *rest)
    eager, sum_ = add_rms_norm.reference(x, r, *rest)
    assert torch.equal(total, x + r)
    assert torch.equal(total, sum_)
    assert (y == eager).float().mean() > 0.98
    assert_as_good_as(y, eager, exact(x + r, *rest))


@pytest.mark.parametrize("view", [
    lambda t: t[:, ::2], lambda t: t[..., 3:40], lambda t: t.transpose(0, 1), lambda t: t.transpose(1, 2),
    lambda t: t[:, 1:2].expand(4, 6, 48), lambda t: t[..., ::3], lambda t: t[:, :, None, :12].expand(4, 6, 5, 12),
    lambda t: t.unflatten(-1, (3, 16))[:, 1:].transpose(1, 2),
])  # fmt: skip
def test_strided_rows(triton_device, view):
    x = view(torch.randn(4, 6, 48, device=triton_device))
    r = view(torch.randn(4, 6, 48, device=triton_device))
    w = torch.randn(2 * x.shape[-1], device=triton_device)[::2]
    torch.testing.assert_close(rms_norm.run("triton", x, w, 1e-6), rms_norm.reference(x, w, 1e-6))
    torch.testing.assert_close(add_rms_norm.run("triton", x, r, w, 1e-6), add_rms_norm.reference(x, r, w, 1e-6))


def test_residual_broadcasts(triton_device):
    x, r, w = (torch.randn(s, device=triton_device) for s in ((2, 5, 24), (5, 1), (24,)))
    torch.testing.assert_close(add_rms_norm.run("triton", x, r, w, 1e-6), add_rms_norm.reference(x, r, w, 1e-6))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_zero_sizes(triton_device, shape):
    x, w = torch.randn(shape, device=triton_device), torch.randn(shape[-1], device=triton_device)
    for op, args in ((rms_norm, (x,)), (add_rms_norm, (x, x))):
        for implementation in ("triton", "decomposed"):
            torch.testing.assert_close(op.run(implementation, *args, w, 1e-6), op.reference(*args, w, 1e-6))


@pytest.mark.parametrize("value", [1e4, 1e-8, 0.0, float("inf"), float("nan")])
def test_extreme_values(assert_as_good_as, triton_device, value):
    x = torch.randn(3, 70, device=triton_device) * (value if value == value and value < 1e5 else 1)
    if not value < 1e5:
        x[1, 5] = value
    w = torch.randn(70, device=triton_device)
    assert_as_good_as(rms_norm.run("triton", x, w, 1e-6), rms_norm.reference(x, w, 1e-6), exact(x, w, 1e-6, 0.0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
def test_opcheck(op, order, dtype):
    for x in (torch.randn(2, 3, 8), torch.randn(3, 2, 8).transpose(0, 1), torch.randn(2, 3, 16)[..., :8]):
        x = x.to(dtype)
        args = (x,) if op is rms_norm else (x, x.clone())
        torch.library.opcheck(op.overload, (*args, *case(order, dtype, dtype, 8)))


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    x, r, w = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((3, 5), (3, 5), (5,)))
    weight = w if weighted else None
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, weight, 1e-6, 1.0), (x, w))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, weight, 1e-6), (x, r, w))


def test_dynamic_shapes():
    def f(x, r, w):
        return add_rms_norm(x, r, w, 1e-6, 1.0, None, BF16)

    compiled = torch.compile(f, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 5, 9):
        args = torch.randn(2, rows, 8), torch.randn(2, rows, 8), torch.randn(8)
        torch.testing.assert_close(compiled(*args), add_rms_norm.reference(*args, 1e-6, 1.0, None, BF16))


def test_inductor_on_the_cpu_beside_the_interpreter():
    args = torch.randn(2, 6, 8), torch.randn(8), 1e-6
    torch.testing.assert_close(torch.compile(rms_norm.reference)(*args), rms_norm.reference(*args))


@pytest.mark.parametrize("target, order, dtype, chosen", [
    (Target(torch.device("cuda"), compiled=True), "llama", BF16, "decomposed"),
    (Target(torch.device("cuda"), compiled=True, training=True), "llama", BF16, "decomposed"),
    (Target(torch.device("cpu"), compiled=True), "llama", F32, "decomposed"),
    (Target(torch.device("cpu"), compiled=False), "llama", F32, "aten"),
    (Target(torch.device("cpu"), compiled=False), "olmo", BF16, "aten"),
    (Target(torch.device("cpu"), compiled=False), "llama", BF16, "decomposed"),
    (Target(torch.device("cpu"), compiled=False), "gemma", F32, "decomposed"),
])  # fmt: skip
def test_which_implementation_serves_where(target, order, dtype, chosen):
    x = torch.randn(2, 8).to(dtype)
    args = rms_norm.bind(x, *case(order, dtype, dtype, 8))
    implementation, passed_over = rms_norm.select(target, *args)
    assert implementation.name == chosen
    assert not implementation.opaque
    assert all(reason for _, reason in passed_over)
    torch.testing.assert_close(implementation.run(*args), rms_norm.reference(*args))


@pytest.mark.parametrize("columns", [130, 5120, 20000])
def test_every_configuration(assert_as_good_as, triton_device, columns):
    x, r = (torch.randn(3, columns, device=triton_device).to(BF16) for _ in range(2))
    rest = case("llama", BF16, BF16, columns, triton_device)
    configs = list(rms_norm.implementations[1].configs(x))
    assert configs
    for config in configs:
        y, total = add_rms_norm.run("triton", x, r, *rest, config=config)
        assert torch.equal(total, x + r)
        assert_as_good_as(y, add_rms_norm.reference(x, r, *rest)[0], exact(x + r, *rest))
