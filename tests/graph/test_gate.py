"""Programs that a second capture would get wrong are turned away with their reason, or come out right."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint


class Doubled(torch.autograd.Function):
    """Its backward is deliberately not its derivative: a dropped backward shows."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.5

    @staticmethod
    def backward(ctx, grad):
        return grad * 100


def outcome(captured, program, *inputs, grad=False):
    """Result and gradients by eager and through the normal form."""
    results = []
    for run in (program, lambda *a: captured.run(program, *a)):
        fresh = [i.detach().clone().requires_grad_(grad and i.is_floating_point()) for i in inputs]
        out = run(*fresh)
        if grad:
            out.sum().backward()
        results.append((out, [f.grad for f in fresh]))
    return results


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


x = torch.randn(4, 4)


def test_autograd_function_keeps_its_backward(captured):
    eager, ours = outcome(captured, lambda x: Doubled.apply(x.sin()) + 1, x, grad=True)
    same(eager, ours)
    assert "autograd" in captured.reasons[0]


def test_autocast_inside(captured):
    def program(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    eager, ours = outcome(captured, program, x)
    same(eager, ours)
    assert eager[0].dtype == torch.bfloat16
    assert "autocast" in captured.reasons[0]


def test_autocast_around(captured):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = outcome(captured, lambda x: x @ x, x)
    same(eager, ours)
    assert "autocast is on for cpu" in captured.reasons[0]


def test_checkpoint(captured):
    def program(x):
        return checkpoint(lambda y: (y @ y).sin(), x, use_reentrant=False).sum()

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
    assert "higher-order op" in captured.reasons[0]


def test_vmap(captured):
    eager, ours = outcome(captured, lambda x: torch.vmap(lambda row: row.softmax(0) * row.sum())(x), x)
    same(eager, ours)
    assert "torch.func transform" in captured.reasons[0]


def test_func_grad(captured):
    eager, ours = outcome(captured, lambda x: torch.func.grad(lambda y: y.sin().sum())(x), x)
    same(eager, ours)
    assert captured.reasons


def test_cond(captured):
    def program(x):
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    eager, ours = outcome(captured, program, x)
    same(eager, ours)
    assert "higher-order op cond" in captured.reasons[0]


def test_flex_attention(captured):
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    same(flex_attention(q, q, q), captured.run(lambda q: flex_attention(q, q, q), q))
    assert "flex_attention" in captured.reasons[0]


def test_while_loop_and_scan_are_turned_away(captured):
    from torch._higher_order_ops.while_loop import while_loop

    def program(x):
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[1]

    same(x.sin().sin().sin(), captured.run(program, x))
    assert "higher-order op while_loop" in captured.reasons[0]


def test_map_scan_and_associative_scan_are_turned_away(captured):
    from torch._higher_order_ops.associative_scan import associative_scan
    from torch._higher_order_ops.map import map as hop_map
    from torch._higher_order_ops.scan import scan

    programs = {
        "map_impl": lambda x: hop_map(lambda row: row.sin(), x),
        "scan": lambda x: scan(lambda carry, row: (carry + row, row * 2), x[0].clone(), x)[1],
        "associative_scan": lambda x: associative_scan(torch.add, x, 0, combine_mode="generic"),
    }
    expected = {
        "map_impl": x.sin(),
        "scan": x * 2,
        "associative_scan": x.cumsum(0),
    }
    for name, program in programs.items():
        captured.reasons.clear()
        same(expected[name], captured.run(program, x))
        assert any("higher-order op" in reason or "torch.func" in reason for reason in captured.reasons), name


def test_nested_compile_region(captured):
    region = torch.compiler.nested_compile_region(lambda y: (y @ y).sin())
    same(x @ x, x @ x)
    eager, ours = outcome(captured, lambda x: region(region(x)), x)
    same(eager, ours)
    assert "higher-order op invoke_subgraph" in captured.reasons[0]


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_input_is_right(captured, layout):
    sparse = x.to_sparse(layout=layout) if layout is torch.sparse_coo else x.to_sparse_csr()
    same(sparse @ x, captured.run(lambda s, y: s @ y, sparse, x))


def test_nested_tensor_input_is_right(captured):
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    ours = captured.run(lambda n: n * 2, nested)
    same((nested * 2).values(), ours.values())


def test_data_attribute_is_right(captured):
    eager, ours = outcome(captured, lambda x: (x * x.data).sum(), x, grad=True)
    same(eager, ours)


def test_item_is_right(captured):
    torch._dynamo.config.capture_scalar_outputs = True
    try:
        program = lambda x, n: x * n.item()  # noqa: E731
        same(program(x, torch.tensor(3)), captured.run(program, x, torch.tensor(3)))
    finally:
        torch._dynamo.config.capture_scalar_outputs = False


def test_no_grad_region_inside_training(captured):
    def program(x):
        y = x.sin()
        with torch.no_grad():
            z = y * 2
        return (y * z).sum()

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
    assert not captured.reasons


def test_inference_mode(captured):
    with torch.inference_mode():
        y = torch.randn(3, 3)
        same(y.softmax(-1) @ y, captured.run(lambda y: y.softmax(-1) @ y, y))


def test_saved_tensor_hooks_are_kept(captured):
    def program(x):
        with torch.autograd.graph.save_on_cpu():
            return (x.sin() @ x).sum()

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
