"""L2 norm: the four places of eps, every implementation against float64."""

import pytest
import torch

from fxopt.kernels.l2_norm import EPS_IN, l2_norm
from fxopt.ops import Target

# The interpreter computes with numpy, which warns of NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def exact(x, dim, eps, eps_in, *_):
    x = x.double()
    squares = x.square().sum(dim, True)
    if eps_in == "sum":
        return x / (squares + eps).sqrt()
    if eps_in == "floor":
        return x / squares.clamp_min(eps).sqrt()
    return x / (squares.sqrt().clamp_min(eps) if eps_in == "max" else squares.sqrt() + eps)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("eps_in", EPS_IN)
@pytest.mark.parametrize("implementation", ["decomposed", "triton"])
def test_every_place_of_eps(assert_as_good_as, triton_device, implementation, eps_in, dtype):
    for shape in [(2, 3, 8), (5, 33), (1000,), (2, 9000), (3, 1), (0, 8)]:
        args = (torch.randn(shape, device=triton_device).to(dtype), -1, 0.5, eps_in)
        assert_as_good_as(l2_norm.run(implementation, *args), l2_norm.reference(*args), exact(*args))


@pytest.mark.parametrize("eps_in", EPS_IN)
@pytest.mark.parametrize("value", [0.0, 1e-12, 1e15, float("nan")])
def test_extreme_values(triton_device, eps_in, value):
    x = torch.full((3, 40), value, device=triton_device)
    y, eager = (l2_norm.run(name, x, -1, 1e-12, eps_in) for name in ("triton", "reference"))
    torch.testing.assert_close(y, eager, equal_nan=True)


@pytest.mark.parametrize("view", [lambda t: t[:, ::2], lambda t: t[..., 3:20], lambda t: t[..., ::3]])
def test_strided_rows(triton_device, view):
    x = view(torch.randn(4, 6, 48, device=triton_device))
    for casts in ((None, None), (None, F16), (F32, BF16)):
        args = (x, 2, 1e-6, "sum", *casts)
        torch.testing.assert_close(l2_norm.run("triton", *args), l2_norm.reference(*args))


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("eps_in", EPS_IN)
def test_opcheck(eps_in, dim):
    for x in (torch.randn(2, 3, 8).bfloat16(), torch.randn(3, 2, 8).transpose(0, 1)):
        torch.library.opcheck(l2_norm.overload, (x, dim, 1e-6, eps_in))


@pytest.mark.parametrize("eps_in", EPS_IN)
def test_gradcheck(eps_in):
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: l2_norm(x, 1, 1e-3, eps_in), (x,))


def test_an_unknown_place_is_named():
    with pytest.raises(ValueError, match="eps_in is 'root'; there are 'max', "):
        l2_norm.reference(torch.randn(2), 0, 1e-6, "root")


@pytest.mark.parametrize("target, dim, chosen, reason", [
    (Target(torch.device("cuda"), compiled=True), -1, "decomposed", "under the compiler"),
    (Target(torch.device("cuda"), compiled=False), 1, "triton", None),
    (Target(torch.device("cuda"), compiled=False), 0, "decomposed", "the last dimension"),
    (Target(torch.device("cpu"), compiled=False), -1, "decomposed", "CUDA device"),
])  # fmt: skip
def test_which_implementation_serves_where(target, dim, chosen, reason):
    implementation, passed_over = l2_norm.select(target, *l2_norm.bind(torch.randn(2, 8), dim, 1e-6, "max"))
    assert implementation.name == chosen
    assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(assert_as_good_as):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for eps_in in EPS_IN:
        args = (torch.randn(64, 32, 128, device="cuda").bfloat16(), -1, 1e-6, eps_in)
        assert_as_good_as(l2_norm.run("triton", *args), l2_norm.reference(*args), exact(*args))
