"""What counts as the same measurement, and what doesn't."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxopt.kernels.rms_norm import rms_norm
from fxopt.ops import Target
from fxopt.tune import key

CPU = Target(torch.device("cpu"))


def described(*args, target=CPU, inductor=None):
    return key.signature(key.describe(rms_norm, target, key.concrete(rms_norm.bind(*args)), inductor or {}))


X, W = torch.randn(4, 4096), torch.randn(4096)


@pytest.mark.parametrize("args", [(torch.randn(4, 4096), W, 1e-6), (X.clone(), W, 0.5)])
def test_values_do_not_count(args):
    assert described(*args) == described(X, W, 1e-5)


@pytest.mark.parametrize("args", [
    (X[:3], W, 1e-5), (X.bfloat16(), W, 1e-5), (X, None, 1e-5), (X, W, 1e-5, 0.0, torch.float32),
    (torch.randn(4096, 4).t(), W, 1e-5), (torch.randn(4, 8192)[:, :4096], W, 1e-5), (X[None], W, 1e-5),
    (X[:1].expand(4, 4096), W, 1e-5),
])  # fmt: skip
def test_kinds_do(args):
    assert described(*args) != described(X, W, 1e-5)


@pytest.mark.parametrize("change", [
    {"target": Target(torch.device("cpu"), compiled=False)}, {"inductor": {"coordinate_descent_tuning": True}},
])  # fmt: skip
def test_surroundings_do(change):
    assert described(X, W, 1e-5, **change) != described(X, W, 1e-5)


def test_cuda_graphs_do_not():
    assert described(X, W, 1e-5, inductor={"triton.cudagraphs": True}) == described(X, W, 1e-5)


@pytest.mark.parametrize("a, b, same", [
    (1, 2, False), (16, 16, True), (15, 16, False), (17, 18, True), (1000, 900, True), (1000, 1008, False),
    (1024, 896, False), (4096, 4096, True), (4096, 3600, True), (4096, 3584, False), (513, 512, False),
])  # fmt: skip
def test_buckets(a, b, same):
    assert (key.bucket(a) == key.bucket(b)) is same


def test_threads_are_part_of_a_processor(monkeypatch):
    before = key.device_name(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert key.device_name(torch.device("cpu")) != before


def test_symbolic_sizes_count_as_their_first_example():
    env = ShapeEnv()
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(X, symbolic_context=context)
        w = mode.from_tensor(W)
    assert not isinstance(x.shape[0], int)
    guards = len(env.guards)
    assert described(x, w, 1e-5) == described(X, W, 1e-5)
    assert len(env.guards) == guards
