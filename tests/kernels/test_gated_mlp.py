"""The gated activation: every implementation against float64, casts, strides, extreme values, gradients."""

import pytest
import torch

from fxopt.kernels.gated_mlp import ACTIVATIONS, gated_activation
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = [(2, 3, 8), (5, 33), (1000,), (3, 2, 130), (2, 1500), (1, 1)]
# compute, round_to, out_dtype
CASTS = [(None, None, None), (F32, None, None), (F32, BF16, None), (F32, None, BF16), (F32, F16, F16)]


def exact(gate, up, activation, *_):
    return ACTIVATIONS[activation](gate.double()) * up.double()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", ["decomposed", "triton"])
def test_every_activation(assert_as_good_as, triton_device, implementation, activation, dtype):
    for shape in SHAPES:
        gate, up = (torch.randn(shape, device=triton_device).mul(3).to(dtype) for _ in range(2))
        y = gated_activation.run(implementation, gate, up, activation)
        assert_as_good_as(y, gated_activation.reference(gate, up, activation), exact(gate, up, activation))


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F32), (F32, F16)])
@pytest.mark.parametrize("casts", CASTS)
def test_casts(assert_as_good_as, triton_device, casts, dtypes):
    gate, up = (torch.randn(3, 40, device=triton_device).to(dtype) for dtype in dtypes)
    args = (gate, up, "silu", *casts)
    y, eager = gated_activation.run("triton", *args), gated_activation.reference(*args)
    assert y.dtype == eager.dtype == gated_activation(*args).dtype
    assert_as_good_as(y, eager, exact(*args))


@pytest.mark.parametrize("view", [
    lambda t: t[:, ::2], lambda t: t[..., 3:40], lambda t: t.chunk(2, -1)[1], lambda t: t.transpose(0, 1),
    lambda t: t[..., ::3], lambda t: t[:, 1:2].expand(4, 6, 48), lambda t: t[:, :, None, :12].expand(4, 6, 5, 12),
])  # fmt: skip
def test_strided_rows(triton_device, view):
    gate, up = (view(torch.randn(4, 6, 48, device=triton_device)) for _ in range(2))
    torch.testing.assert_close(
        gated_activation.run("triton", gate, up, "gelu"), gated_activation.reference(gate, up, "gelu")
    )


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
@pytest.mark.parametrize("implementation", ["decomposed", "triton"])
def test_zero_sizes(triton_device, shape, implementation):
    x = torch.randn(shape, device=triton_device)
    assert gated_activation.run(implementation, x, x, "silu").shape == shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [1e4, -1e4, -1e-8, 0.0, float("nan")])
def test_extreme_values(triton_device, activation, value):
    gate, up = (torch.randn(3, 70, device=triton_device) for _ in range(2))
    gate[1, 5] = up[2, 7] = value
    y, eager = (gated_activation.run(name, gate, up, activation) for name in ("triton", "reference"))
    torch.testing.assert_close(y, eager, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "relu", "relu2", "sigmoid"])
def test_infinity(triton_device, activation):  # the gelus of ATen differ among each other there
    gate, up = torch.tensor([[float("inf"), 1.0]], device=triton_device), torch.tensor([[2.0, -float("inf")]])
    y = gated_activation.run("triton", gate, up.to(triton_device), activation)
    torch.testing.assert_close(y.cpu(), gated_activation.reference(gate.cpu(), up, activation))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("casts", CASTS[::2])
def test_opcheck(activation, casts):
    for gate in (torch.randn(2, 3, 8), torch.randn(3, 2, 8).transpose(0, 1), torch.randn(2, 3, 16)[..., :8]):
        args = (gate.bfloat16(), torch.randn(2, 3, 8).bfloat16(), activation, *casts)
        torch.library.opcheck(gated_activation.overload, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, activation), (gate, up))


def test_dynamic_shapes():
    compiled = torch.compile(
        lambda g, u: gated_activation(g, u, "silu", F32, BF16), backend="aot_eager", dynamic=True, fullgraph=True
    )
    for rows in (3, 5, 9):
        gate, up = torch.randn(2, rows, 8), torch.randn(2, rows, 8).bfloat16()
        torch.testing.assert_close(compiled(gate, up), gated_activation.reference(gate, up, "silu", F32, BF16))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="'swish'; there are silu, gelu"):
        gated_activation.reference(torch.randn(2), torch.randn(2), "swish")


@pytest.mark.parametrize("target, dtype, chosen, reason", [
    (Target(torch.device("cuda"), compiled=True), BF16, "decomposed", "under the compiler"),
    (Target(torch.device("cuda"), compiled=False, training=True), BF16, "decomposed", "no backward"),
    (Target(torch.device("cuda"), compiled=False), BF16, "triton", None),
    (Target(torch.device("cuda"), compiled=False), F64, "decomposed", "float32"),
    (Target(torch.device("cpu"), compiled=False), F32, "decomposed", "CUDA device"),
])  # fmt: skip
def test_which_implementation_serves_where(target, dtype, chosen, reason):
    gate, up = torch.randn(2, 8).to(dtype), torch.randn(2, 8).to(dtype)
    implementation, passed_over = gated_activation.select(target, *gated_activation.bind(gate, up, "silu"))
    assert implementation.name == chosen
    assert [name for name, _ in passed_over] == (["triton"] if reason else [])
    assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(assert_as_good_as):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    halves = torch.randn(64, 2, 4096, device="cuda").bfloat16().transpose(0, 1)
    for activation in ACTIVATIONS:
        y = gated_activation.run("triton", halves[0], halves[1], activation)
        eager = gated_activation.reference(halves[0], halves[1], activation)
        assert_as_good_as(y, eager, exact(halves[0], halves[1], activation))
