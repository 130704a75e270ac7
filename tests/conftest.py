"""Set-up that all tests share: where Triton kernels run, and how close to float64 a result must be."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None

if not HAS_GPU:
    # Triton reads this where a kernel is declared, so it must be set before fxopt.kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded():
    """The same inputs in every run: an error near its bound should not come and go."""
    torch.manual_seed(0)


def pytest_collectstart(collector):
    """Likewise those that a module of tests makes as it is imported."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


class Doubled(torch.autograd.Function):
    """Its backward is deliberately not its derivative: a dropped backward shows."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.5

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


@pytest.fixture
def doubled():
    """An autograd function whose gradient is its own."""
    return Doubled.apply


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton kernels run: a GPU, or the CPU under Triton's interpreter."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    if HAS_GPU:
        return "cuda"
    _compute_bfloat16_right(monkeypatch)
    return "cpu"


def _compute_bfloat16_right(monkeypatch):
    """Triton's interpreter truncates float32 to bfloat16, and its `dot` multiplies the bits of bfloat16: repaired."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    def widened_dot(self, a, b, *rest):
        a, b = (cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened_dot)


@pytest.fixture
def assert_as_good_as():
    """assert_as_good_as(actual, eager, exact): at most twice as far from `exact` as `eager` is, plus `ulps`.

    `exact` is float64; `eager` is the same computation spelled out in plain torch at the dtype of `actual`. Errors are
    the largest over the tensor, an ulp is that of its largest value; infinities and NaN must be where `exact` has them.
    """

    def check(actual, eager, exact, ulps=1):
        assert actual.shape == exact.shape
        assert actual.dtype == eager.dtype
        actual, eager, exact = (t.detach().cpu() for t in (actual, eager, exact))
        finite = exact.isfinite()
        assert torch.equal(actual.isnan(), exact.isnan())
        assert torch.equal(actual.double()[exact.isinf()], exact[exact.isinf()])
        if not finite.any():
            return
        ulp = torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
        error = (actual.double() - exact)[finite].abs().max().item()
        allowed = 2 * (eager.double() - exact)[finite].abs().nan_to_num().max().item() + ulps * ulp
        assert error <= allowed, f"error {error:.3g} against float64, allowed {allowed:.3g}, an ulp is {ulp:.3g}"

    return check


@pytest.fixture
def without_inductor():
    """Rewritten graphs run through AOTAutograd only: Inductor takes seconds a graph and is tested where it matters."""
    from fxopt.testing import without_inductor

    with without_inductor():
        yield
