"""torch.func transforms inside a compiled function become plain ops, with eager mode's values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

aten = torch.ops.aten

x = torch.randn(4, 4)


def outcome(captured, program, *inputs, grad=False, dtype=torch.float64):
    """Result and gradients by eager and through the normal form."""
    results = []
    for run in (program, lambda *a: captured.run(program, *a)):
        fresh = [i.detach().to(dtype, copy=True).requires_grad_(grad) if i.is_floating_point() else i for i in inputs]
        torch.manual_seed(0)
        out = run(*fresh)
        if grad:
            out.square().sum().backward()
        results.append((out, [f.grad for f in fresh]))
    return results


def same(a, b, rounding=1e-9):
    torch.testing.assert_close(a, b, rtol=rounding, atol=rounding, equal_nan=True)


def test_vmap_becomes_batched_ops(captured):
    eager, ours = outcome(captured, lambda x: vmap(lambda row: row.softmax(0) * row.sum())(x).cos(), x)
    same(eager, ours)
    assert not captured.reasons
    assert aten.cos.default in captured.targets()


def test_nested_vmaps_of_a_mask_beside_gradients(captured):
    def program(x):
        row = torch.arange(4)
        mask = vmap(lambda i: vmap(lambda j: (i >= j) & (j != 1))(row))(row)
        return torch.where(mask, x @ x, 0).sum() + vmap(lambda i: i + 1)(row).sum()

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
    assert not captured.reasons


def test_vmap_in_an_autocast_region_has_the_casts_of_the_place(captured):
    def program(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = vmap(lambda row: x @ row)(x)
        return y, vmap(lambda row: x @ row)(x)

    eager, ours = outcome(captured, program, x, dtype=torch.float32)
    same(eager, ours, 1e-5)
    assert [y.dtype for y in eager[0]] == [torch.bfloat16, torch.float32]
    assert not captured.reasons
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_switched_off_inside_a_vmap(captured):
    def rows(row):
        with torch.autocast("cpu", enabled=False):
            return x @ row

    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, ours = outcome(captured, lambda x: vmap(rows)(x).cos() @ x, x, dtype=torch.float32)
        assert torch.is_autocast_enabled("cpu")
    same(eager, ours, 1e-5)
    assert not captured.reasons


def scores(x):
    return F.softmax(x.sin() @ x.mT, -1) @ x


PROGRAMS = {
    "vmap": lambda x: vmap(lambda row: row.softmax(0) * row.sum())(x).cos() @ x,
    "vmap of a product": lambda x: vmap(lambda a, b: a @ b, (0, None))(x[None] * 2, x).sin(),
    "vmap over columns": lambda x: vmap(lambda a: F.layer_norm(a, (4,)).exp(), 1, 1)(x),
    "vmap with in-place ops": lambda x: vmap(lambda a: a.clone().mul_(3).add_(a))(x),
    "nested vmap": lambda x: vmap(lambda a: vmap(lambda b: b * a.sum())(a))(x.exp()),
    "vmap of attention": lambda x: vmap(scores)(torch.stack([x, x * 2])).sum(0),
    "vmap with dropout": lambda x: vmap(lambda a: F.dropout(a, 0.5), randomness="different")(x),
    "vmap, detached in part": lambda x: vmap(lambda a: a.exp() * a.sin().detach())(x),
    "grad": lambda x: grad(lambda y: scores(y).sum())(x).cos(),
    "grad of grad": lambda x: grad(lambda y: grad(lambda z: z.pow(4).sum())(y).sin().sum())(x),
    "grad beside what it reads": lambda x: grad(lambda y: (y * x).sin().sum())(x.cos()) * x,
    "grad of each row": lambda x: vmap(grad(lambda row: row.softmax(0).pow(3).sum()))(x),
    "vjp, called later": lambda x: vjp(scores, x)[1](x.cos())[0] * x,
    "vjp, called twice": lambda x: (lambda f: f(x)[0] + f(x * 2)[0])(vjp(torch.sin, x)[1]),
    "jvp": lambda x: jvp(scores, (x,), (x.cos(),))[1],
    "jacrev": lambda x: jacrev(lambda y: scores(y).sum(0))(x),
    "jacfwd": lambda x: jacfwd(lambda y: scores(y).sum(0))(x),
    "hessian": lambda x: hessian(lambda y: y.pow(3).sum() * y.sin().sum())(x[0]),
    "two transforms": lambda x: grad(lambda y: y.sin().sum())(x) + vmap(torch.cos)(x),
}


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients_are_those_of_eager(captured, name, differentiated):
    eager, ours = outcome(captured, PROGRAMS[name], x, grad=differentiated)
    same(eager, ours)
    assert not captured.reasons
    assert captured.graphs


def test_grad_without_gradients_around_it(captured):
    def program(x):
        with torch.no_grad():
            return grad(lambda y: y.sin().sum())(x) + x.detach()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    ours = captured.run(program, x)
    same(ours, program(x))
    assert not ours.requires_grad
    assert not captured.reasons


def test_what_follows_a_transform_is_normalised(captured):
    eager, ours = outcome(captured, lambda x: torch.softmax(vjp(torch.sin, x)[1](x)[0] @ x, -1), x, grad=True)
    same(eager, ours)
    assert aten.softmax.int in captured.targets()
    assert aten.matmul.default in captured.targets()


def test_a_row_that_is_written_to(captured):
    def program(x, rows):
        vmap(lambda a, b: a.add_(b))(rows, x)
        return rows.sin() * x

    for differentiated in (False, True):
        eager, ours = outcome(captured, lambda x: program(x, x.detach().clone()), x, grad=differentiated)
        same(eager, ours)
    rows = torch.zeros(4, 4)
    captured.run(program, x, rows)
    same(rows, x)


def test_dynamic_sizes(captured):
    torch._dynamo.reset()
    program = lambda x: vmap(grad(lambda row: row.softmax(0).pow(3).sum()))(x) @ x.mT  # noqa: E731
    run = torch.compile(program, backend=captured, dynamic=True)
    for rows in (3, 5, 6):
        y = torch.randn(rows, 4)
        same(run(y), program(y), 1e-5)
    assert not captured.reasons


def test_gradients_switched_off_inside(captured):
    def row(a):
        with torch.no_grad():
            b = a.sin()
        return a * b

    eager, ours = outcome(captured, lambda x: vmap(row)(x), x, grad=True)
    same(eager, ours)
    assert all("gradients are switched" in reason for reason in captured.reasons)
    assert captured.reasons


class Tripled(torch.autograd.Function):
    """Its backward is deliberately not its derivative."""

    @staticmethod
    def forward(x):
        return x * 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 100


def test_an_autograd_function_inside_keeps_its_backward(captured):
    """Under vmap Dynamo (torch 2.13) itself drops it."""
    eager, ours = outcome(captured, grad(lambda y: Tripled.apply(y.sin()).sum()), x, grad=True)
    same(eager, ours)
    assert any("higher-order op" in reason or "autograd function" in reason for reason in captured.reasons)


def test_hooks_on_saved_tensors_switched_off(captured):
    def program(x):
        with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
            y = torch.softmax(x @ x.mT, -1)
        return y @ x

    eager, ours = outcome(captured, program, x, grad=True)
    same(eager, ours)
    assert not captured.reasons
    assert captured.targets().count(aten.softmax.int) == 1


def test_a_failed_trace_leaves_nothing_behind(captured, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr("fxopt.graph.transforms.burned_in", fail)
    eager, ours = outcome(captured, lambda x: jvp(torch.sin, (x,), (x,))[1] + grad(lambda y: y.sum())(x), x)
    same(eager, ours)
    assert "no" in captured.reasons[0]
    assert torch._C._functorch.peek_interpreter_stack() is None
    assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None
    assert torch.is_grad_enabled()


def test_behind_a_higher_order_op(captured):
    def program(x):
        y = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return vmap(lambda row: row.softmax(0) * row.sum())(y)

    for differentiated in (False, True):
        eager, ours = outcome(captured, program, x, grad=differentiated)
        same(eager, ours)
    assert not captured.reasons


def test_behind_a_float_that_may_change(captured):
    """With dynamic shapes an attribute of the module is an input, and read by `.item()`."""

    class Masked(torch.nn.Module):
        eps = 1e-6

        def forward(self, x):
            normed = x * torch.rsqrt(x.square().mean(-1, True) + self.eps)
            row = torch.arange(x.shape[1])
            return torch.where(vmap(lambda i: i >= row)(row), normed, 0.0)

    model, batch = Masked(), torch.randn(2, 4, 4)
    same(captured.run(model, batch, dynamic=True), model(batch), 1e-6)
    model.eps = 1e-2
    same(captured.run(model, batch, dynamic=True), model(batch), 1e-6)
    assert not captured.reasons
