"""Tensor subclasses: desugared by AOTAutograd, then fused like any other graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

import fxopt

aten = torch.ops.aten


class Int8Weight(Tensor):
    """A weight kept as int8 with one scale an output; whatever computes with it sees it dequantised."""

    @staticmethod
    def __new__(cls, packed, scale):
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype, device=packed.device)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __repr__(self):  # printing a tensor computes with it
        return f"Int8Weight({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Int8Weight(inner["packed"], inner["scale"])

    def dequantised(self):
        return self.packed.to(self.scale.dtype) * self.scale[:, None]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:
            (weight,) = args
            return return_and_correct_aliasing(func, args, kwargs, Int8Weight(weight.packed, weight.scale))
        plain = tree_map(lambda a: a.dequantised() if isinstance(a, Int8Weight) else a, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Wrapped(Tensor):
    """Holds a tensor and stays around the result of every op, as a distributed tensor does."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Wrapped({tuple(self.shape)})"

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map(lambda a: a.held if isinstance(a, Wrapped) else a, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        out = tree_map(lambda a: Wrapped(a) if isinstance(a, Tensor) else a, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class Quantised(torch.nn.Module):
    def __init__(self, outputs, inputs, bias):
        super().__init__()
        packed = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        weight = Int8Weight(packed, torch.rand(outputs) / 128 + 1e-3)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def run(program, *inputs, dynamic=None):
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        return torch.compile(program, backend="fxopt", dynamic=dynamic)(*inputs), rec


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64)])
def test_a_quantised_weight_fuses(shape, bias, dynamic):
    model, x = Quantised(32, 64, bias), torch.randn(shape)
    out, rec = run(model, x, dynamic=dynamic)
    assert rec.counts() == {"dequant_matmul": 1}
    assert rec.graphs[0].entry == "after AOTAutograd"
    assert "Int8Weight" in rec.graphs[0].turned_away
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_inductor")
def test_a_wrapper_stays_around_the_result():
    def program(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v

    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    out, rec = run(program, *map(Wrapped, inputs))
    assert isinstance(out, Wrapped)
    torch.testing.assert_close(out.held, program(*inputs))
    assert rec.counts() == {"attention": 1}


@pytest.mark.usefixtures("without_inductor")
def test_a_wrapper_that_is_written_to():
    def program(x, y):
        x.mul_(2)
        return torch.nn.functional.layer_norm(x + y, (8,))

    held, y = torch.randn(3, 8), torch.randn(3, 8)
    x, twice = Wrapped(held.clone()), held * 2
    out, rec = run(program, x, Wrapped(y))
    torch.testing.assert_close(x.held, twice)
    torch.testing.assert_close(out.held, torch.nn.functional.layer_norm(twice + y, (8,)))
    assert rec.counts() == {"layer_norm": 1}


@pytest.fixture
def mesh(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.usefixtures("without_inductor")
def test_distributed_tensors(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    def program(q, k, v, w):
        heads = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return torch.nn.functional.layer_norm(heads.redistribute(mesh, [Replicate()]), (8,)) @ w

    inputs = [distribute_tensor(torch.randn(2, 4, 5, 8), mesh, [Shard(1)]) for _ in range(3)]
    weight = distribute_tensor(torch.randn(8, 8), mesh, [Shard(1)])
    out, rec = run(program, *inputs, weight)
    expected = program(*inputs, weight)
    assert isinstance(out, DTensor)
    assert out.placements == expected.placements
    torch.testing.assert_close(out.full_tensor(), expected.full_tensor(), rtol=1e-5, atol=1e-5)
    assert rec.counts() == {"attention": 1, "layer_norm": 1}


def test_with_inductor():
    model, x = Quantised(32, 64, True), torch.randn(5, 64)
    out, rec = run(model, x)
    assert rec.counts() == {"dequant_matmul": 1}
    with torch.no_grad():
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
