"""Products over one element are multiplications, equal to the last bit, where no gradients are asked for."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fxopt
from fxopt import backend
from fxopt.lower.outer import multiply_outer

aten = torch.ops.aten


def _traced(program, *inputs, mode="fake"):
    with torch.no_grad():
        return make_fx(program, tracing_mode=mode, pre_dispatch=True)(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "a, b",
    [((7, 1), (1, 5)), ((2, 7, 1), (2, 1, 5)), ((1, 7, 1), (3, 1, 1)), ((2, 1, 7, 1), (3, 1, 5)), ((0, 1), (1, 2))],
)
def test_equals_the_product_bit_by_bit(a, b, dtype):
    x, y = torch.randn(a).to(dtype), (torch.randn(b) * 1e4).to(dtype)
    module = _traced(torch.matmul, x, y)
    assert multiply_outer(module) == 1
    module.graph.lint()
    assert not module.graph.find_nodes(op="call_function", target=aten.matmul.default)
    torch.testing.assert_close(module(x, y), x @ y, rtol=0, atol=0)


def test_a_result_that_leaves_keeps_its_strides():
    x, y = torch.randn(5, 4, 1).transpose(0, 1), torch.randn(1, 1, 6)
    module = _traced(torch.matmul, x, y)
    assert multiply_outer(module) == 1
    assert module(x, y).stride() == (x @ y).stride()


def test_sizes_may_be_symbols():
    x, y = torch.randn(2, 7, 1), torch.randn(2, 1, 5)
    module = _traced(torch.matmul, x, y, mode="symbolic")
    assert multiply_outer(module) == 1
    x, y = torch.randn(3, 4, 1), torch.randn(3, 1, 9)
    torch.testing.assert_close(module(x, y), x @ y, rtol=0, atol=0)


@pytest.mark.parametrize(
    "a, b", [(torch.ones(3, 2), torch.ones(2, 1)), (torch.ones(1), torch.ones(1, 3)), (torch.ones(3, 1), torch.ones(1)),
             (torch.ones(3, 1).long(), torch.ones(1, 3).long())]
)  # fmt: skip
def test_other_products_stay(a, b):
    assert multiply_outer(_traced(torch.matmul, a, b)) == 0


@pytest.mark.parametrize("training", [False, True])
def test_rotary_angles_are_multiplied_in_inference(training, monkeypatch, without_inductor):
    found = []
    monkeypatch.setattr(backend, "multiply_outer", lambda module: found.append(multiply_outer(module)))
    frequencies = torch.rand(1, 4, 1)

    def program(x, positions):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (frequencies @ positions[:, None, :].float()).transpose(1, 2).cos()

    x, positions = torch.randn(2, 5, 4, requires_grad=training), torch.arange(10).view(2, 5)
    with torch.set_grad_enabled(training), fxopt.record() as rec:
        torch.testing.assert_close(torch.compile(program, backend="fxopt")(x, positions), program(x, positions))
    assert rec.counts() == {"rms_norm": 1}
    assert found == ([] if training else [1])
