"""Programs that a second capture could get wrong come out right, or are turned away with their reason."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

aten = torch.ops.aten


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


def same(a, b, rounding=1e-5):
    """To `rounding` of each tensor's largest value: what cancels is no more exact than what it is made of."""
    a, b = (tree_leaves(t) for t in (a, b))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        largest = x.detach().abs().max().item() if isinstance(x, torch.Tensor) and x.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=rounding, atol=rounding * max(1.0, largest), equal_nan=True)


BF16 = 2 * torch.finfo(torch.bfloat16).eps  # AOTAutograd alone rounds sums and gradients in another order


x = torch.randn(4, 4)


def test_autograd_function_keeps_its_backward(captured, doubled):
    eager, ours = outcome(captured, lambda x: doubled(x.sin()) + 1, x, grad=True)
    same(eager, ours)
    assert torch.ops.higher_order.autograd_function_apply in captured.targets()


def test_autocast_inside(captured):
    def program(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    eager, ours = outcome(captured, program, x)
    same(eager, ours)
    assert eager[0].dtype == torch.bfloat16
    assert captured.targets().count(aten.to.dtype) == 2


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_around(captured, grad):
    w, b = torch.randn(3, 4), torch.randn(3)

    def program(x, w, b):
        y = F.linear(x, w, b)  # cast, bias and all
        with torch.autocast("cpu", enabled=False):
            z = x @ x
        with torch.autocast("cpu", dtype=torch.float16):
            return y.sum() + z.sum() + (x @ x).sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = outcome(captured, program, x, w, b, grad=grad)
    same(eager, ours, BF16)
    assert not captured.reasons
    assert {n.args[1] for g in captured.graphs for n in g.graph.nodes if n.target is aten.to.dtype} >= {
        torch.bfloat16,
        torch.float16,
    }


def test_autocast_of_a_composite_op_that_has_no_rule_of_its_own(captured):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = outcome(captured, lambda x: torch.einsum("ij,kj->ik", x, x), x)
    same(eager, ours)
    assert eager[0].dtype == torch.bfloat16
    assert aten.to.dtype in captured.targets()


def test_autocast_leaves_the_state_as_it_was(captured):
    def program(x):
        with torch.autocast("cpu", dtype=torch.float16):
            return x @ x

    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured.run(program, x)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def attended(y):
    return torch.softmax(y @ y.transpose(-1, -2) / 2, -1) @ y


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_is_normalised_inside(captured, reentrant, cast):
    def program(x):
        return checkpoint(attended, x.sin(), use_reentrant=reentrant).sum()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours, BF16 if cast else 1e-5)
    assert not captured.reasons
    assert aten.softmax.int in captured.targets()


def test_nested_checkpoints(captured):
    def inner(y):
        return checkpoint(attended, y, use_reentrant=False).cos()

    eager, ours = outcome(captured, lambda x: checkpoint(inner, x, use_reentrant=False).sum(), x, grad=True)
    same(eager, ours)
    assert len(captured.graphs) == 3


def test_selective_checkpointing_keeps_its_ops(captured):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def program(x):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(attended, x, use_reentrant=False, context_fn=contexts).sum()

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
    assert aten.softmax.int not in captured.targets()  # left as Dynamo made it


def test_cond(captured):
    def program(x):
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    eager, ours = outcome(captured, program, x)
    same(eager, ours)
    assert not captured.reasons


def test_flex_attention(captured):
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    same(flex_attention(q, q, q), captured.run(lambda q: flex_attention(q, q, q), q))
    assert not captured.reasons


def test_while_loop(captured):
    from torch._higher_order_ops.while_loop import while_loop

    def program(x):
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[1]

    same(x.sin().sin().sin(), captured.run(program, x))
    assert not captured.reasons


def test_map_scan_and_associative_scan(captured):
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
        assert not captured.reasons, name


def test_nested_compile_region(captured):
    region = torch.compiler.nested_compile_region(lambda y: (y @ y).sin())  # twice: fused in like any code
    same(x @ x, x @ x)
    eager, ours = outcome(captured, lambda x: region(region(x)), x)
    same(eager, ours)
    assert captured.targets().count(aten.matmul.default) == 2
    assert not captured.reasons


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


def test_a_float_that_became_an_input_of_a_copied_graph(captured):
    """Backends copy graphs, and a copy of a node lacks Dynamo's attributes."""

    class Scaled(torch.nn.Module):
        by = 1.5

        def forward(self, x):
            return x.softmax(-1) * self.by

    torch._dynamo.reset()
    run = torch.compile(Scaled(), backend=lambda graph, given: captured(copy.deepcopy(graph), given), dynamic=True)
    for x in (torch.randn(3, 4), torch.randn(5, 6)):
        same(x.softmax(-1) * 1.5, run(x))
    assert captured.graphs
    assert not captured.reasons
