"""GroupNorm: every implementation against float64, with and without affine parameters and SiLU."""

import pytest
import torch
import torch.nn.functional as F

from fxopt.kernels.group_norm import group_norm
from fxopt.ops import Target

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def exact(x, groups, weight, bias, eps, silu):
    y = F.group_norm(x.double(), groups, *(None if t is None else t.double() for t in (weight, bias)), eps)
    return F.silu(y) if silu else y


def case(shape, groups, dtype, device, affine=True, silu=False):
    x, w, b = (torch.randn(s, device=device).to(dtype) for s in (shape, shape[1:2], shape[1:2]))
    return x, groups, w if affine else None, b if affine else None, 1e-5, silu


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("affine, silu", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("implementation", ["decomposed", "triton"])
def test_every_form(assert_as_good_as, triton_device, implementation, affine, silu, dtype):
    for shape, groups in [((2, 8, 3, 5), 4), ((1, 6, 7), 3), ((2, 4), 2), ((1, 2, 50, 60), 1), ((0, 4, 3), 2)]:
        args = case(shape, groups, dtype, triton_device, affine, silu)
        assert_as_good_as(group_norm.run(implementation, *args), group_norm.reference(*args), exact(*args))


def test_a_large_mean_costs_no_digits(assert_as_good_as, triton_device):
    x, *rest = case((2, 4, 90, 70), 2, F32, triton_device)
    args = (x + 1000, *rest)
    assert_as_good_as(group_norm.run("triton", *args), group_norm.reference(*args), exact(*args), ulps=200)


@pytest.mark.parametrize("view", [lambda t: t.transpose(2, 3), lambda t: t[..., ::2], lambda t: t[:, :4]])
def test_strides(triton_device, view):
    x = view(torch.randn(2, 8, 6, 10, device=triton_device))
    torch.testing.assert_close(
        group_norm.run("triton", x, 2, None, None, 1e-5), group_norm.reference(x, 2, None, None, 1e-5)
    )


@pytest.mark.parametrize("silu", [False, True])
def test_opcheck(silu):
    for x in (torch.randn(2, 8, 3, 5), torch.randn(2, 3, 5, 8).permute(0, 3, 1, 2)):
        torch.library.opcheck(group_norm.overload, (x, 4, torch.randn(8), torch.randn(8), 1e-5, silu))


def test_gradcheck():
    x, w, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((2, 4, 3), (4,), (4,)))
    assert torch.autograd.gradcheck(lambda *t: group_norm(t[0], 2, *t[1:], 1e-5, True), (x, w, b))


@pytest.mark.parametrize("target, chosen, reason", [
    (Target(torch.device("cuda"), compiled=True), "decomposed", "under the compiler"),
    (Target(torch.device("cuda"), compiled=False), "triton", None),
    (Target(torch.device("cpu"), compiled=False), "decomposed", "CUDA device"),
])  # fmt: skip
def test_which_implementation_serves_where(target, chosen, reason):
    implementation, passed_over = group_norm.select(target, *group_norm.bind(*case((2, 4, 3), 2, F32, "cpu")))
    assert implementation.name == chosen
    assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(assert_as_good_as):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    args = case((4, 320, 64, 64), 32, BF16, "cuda", silu=True)
    assert_as_good_as(group_norm.run("triton", *args), group_norm.reference(*args), exact(*args))
