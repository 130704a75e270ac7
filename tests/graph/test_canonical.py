"""Canonicalisation drops and renames only what changes neither values nor aliasing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import fxopt
from fxopt.graph.canonical import canonicalise
from fxopt.graph.normalise import normal_forms

aten = torch.ops.aten
x = torch.randn(4, 6)


@pytest.mark.parametrize(
    "program, gone",
    [
        (lambda x: F.dropout(x.sin(), 0.5, training=False) + 1, aten.dropout.default),
        (lambda x: F.dropout(x.sin(), 0.5, training=False, inplace=True) + 1, aten.dropout_.default),
        (lambda x: x.sin().to(torch.float32) + 1, aten.to.dtype),
        (lambda x: x.sin().contiguous() + 1, aten.contiguous.default),
        (lambda x: x.sin().expand(4, 6) + 1, aten.expand.default),
        (lambda x: x.sin().reshape(4, 6) + 1, aten.reshape.default),
        (lambda x: x.sin()[:, :] + 1, aten.slice.Tensor),
        (lambda x: (x.sin() * 1.0) + 1, aten.mul.Tensor),
        (lambda x: x.sin().add_(1) + 1, aten.add_.Tensor),
        (lambda x: x.sin().view(24) + 1, aten.view.default),
        (lambda x: x * torch.tensor(0.5), aten.lift_fresh_copy.default),
    ],
)
def test_dropped(captured, program, gone):
    torch.testing.assert_close(captured.run(program, x), program(x))
    assert gone not in captured.targets()


@pytest.mark.parametrize(
    "program, kept",
    [
        (lambda x: F.dropout(x, 0.5, training=True).shape[0] + x.sin(), aten.sin.default),
        (lambda x: x.t().contiguous() + 1, aten.contiguous.default),
        (lambda x: x.to(torch.float64) + 1, aten.to.dtype),
        (lambda x: x.sin() * 2.0, aten.mul.Tensor),
        (lambda x: x.sin()[1:], aten.slice.Tensor),
    ],
)
def test_kept(captured, program, kept):
    torch.testing.assert_close(captured.run(program, x), program(x))
    assert kept in captured.targets()


def test_a_view_that_is_written_to_stays_a_view(captured):
    def program(x):
        y = x.sin()
        v = y.view(24)
        v[3] = 7.0
        return y

    torch.testing.assert_close(captured.run(program, x), program(x))


def test_a_product_with_one_is_a_copy(captured):
    def program(x):
        y = x * 1
        y.add_(1)
        return y, (x * 1).view(-1)

    x = torch.zeros(3)
    y, view = captured.run(program, x)
    assert (x.tolist(), y.tolist()) == ([0.0] * 3, [1.0] * 3)
    assert view.data_ptr() != x.data_ptr()


def test_in_place_on_a_value_with_views_is_left_alone(captured):
    def program(x):
        y = x.sin()
        head = y[:2]
        y.mul_(3)
        return head + 1, y

    torch.testing.assert_close(captured.run(program, x), program(x))
    assert aten.mul_.Tensor in captured.targets()


def test_in_place_keeps_the_dtype_of_its_target(captured):
    def program(x):
        y = x.bfloat16() + 1
        y.add_(x)
        return y * 2

    out = captured.run(program, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, program(x))
    assert aten.add_.Tensor not in captured.targets()


def test_chain_of_in_place_steps(captured):
    def program(x):
        y = x + 1
        y.mul_(2)
        z = y * 3
        y.add_(z).relu_()
        return y, z

    torch.testing.assert_close(captured.run(program, x), program(x))


def test_in_place_on_an_input_is_left_alone(captured):
    mine, theirs = x.clone(), x.clone()

    def program(x):
        x.mul_(2)
        return x + 1

    torch.testing.assert_close(captured.run(program, mine), program(theirs))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "step",
    [lambda y: y.ldexp_(torch.tensor(2)), lambda y: y.pow_(2), lambda y: y.pow_(y.abs()), lambda y: y.float_power_(2)],
)
def test_the_functional_form_takes_what_the_in_place_one_took(captured, step):
    x = torch.rand(2, 3).double()
    program = lambda x: step(x + 1)  # noqa: E731
    torch.testing.assert_close(captured.run(program, x), program(x))
    assert not any(t._schema.is_mutable for t in captured.targets() if hasattr(t, "_schema"))


def test_in_place_before_views_becomes_functional(captured):
    def program(x, y):
        z = x @ y
        z += y
        return z.view(2, -1).add(1).view(4, 4), z.sum()

    inputs = (torch.randn(4, 4), torch.randn(4, 4))
    for actual, expected in zip(captured.run(program, *inputs), program(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    assert aten.add_.Tensor not in captured.targets()


def test_in_place_between_views_is_left_alone(captured):
    def program(x, y):
        z = x @ y
        z += y
        first = z.view(2, -1)
        z += y
        return first.sum()

    inputs = (torch.randn(4, 4), torch.randn(4, 4))
    torch.testing.assert_close(captured.run(program, *inputs), program(*inputs))
    assert aten.add_.Tensor in captured.targets()


def test_masks_computed_twice_are_computed_once(captured):
    def program(x, lengths):
        one, two = (torch.arange(4) < lengths[:, None] for _ in range(2))
        other = torch.arange(4) <= lengths[:, None]
        return x.masked_fill(one, 1.0) + x.masked_fill(two, 2.0) + x.masked_fill(other, 3.0)

    inputs = (torch.randn(3, 4), torch.tensor([1, 2, 3]))
    torch.testing.assert_close(captured.run(program, *inputs), program(*inputs))
    targets = captured.targets()
    assert (targets.count(aten.arange.default), targets.count(aten.lt.Tensor), targets.count(aten.le.Tensor)) == (
        1,
        1,
        1,
    )


def test_narrow_integers_are_merged_where_they_are_only_compared(captured):
    def program(x, m):
        return x.masked_fill(m.view(4, 6) == 0, -1.0) + x.masked_fill(m.view(4, 6) == 0, 1.0) * m.view(4, 6)

    m = torch.arange(24, dtype=torch.int32) % 3
    torch.testing.assert_close(captured.run(program, x, m), program(x, m))
    assert captured.targets().count(aten.eq.Scalar) == 1


def test_masks_that_are_written_to_or_returned_stay_apart(captured):
    def program(x, y):
        one, two = x > 0, x > 0
        two.logical_or_(y > 0)
        return one, x > 0, torch.where(two, x, y)

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    actual = captured.run(program, x, y)
    for mine, right in zip(actual, program(x, y), strict=True):
        torch.testing.assert_close(mine, right)
    assert actual[0].data_ptr() != actual[1].data_ptr()


def test_masks_before_and_after_a_write_differ(captured):
    def program(x, y):
        y = y + 0
        one = y > 0
        y.sub_(1)
        return x.masked_fill(one, 1.0) + x.masked_fill(y > 0, 2.0)

    x, y = torch.randn(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(captured.run(program, x, y), program(x, y))


def test_numbers_of_different_types_are_different(captured):
    def program(x):
        return torch.full((3,), 1), torch.full((3,), True) & (x > 0), x.long() * 1, x.long() * True

    x = torch.randn(3)
    for mine, right in zip(captured.run(program, x), program(x), strict=True):
        torch.testing.assert_close(mine, right)


def test_numbers_are_read_off_the_inputs_first():
    """With dynamic=True a float attribute is read where it is used first: too late for a norm whose sum others read."""

    class Norm(torch.nn.Module):
        eps = 1e-5

        def forward(self, x, r):
            h = x + r
            return h.cumsum(0), h, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)

    model = Norm()
    with torch.no_grad(), fxopt.record() as rec:
        compiled = torch.compile(model, backend="fxopt", dynamic=True)
        for model.eps in (1e-5, 0.5):
            torch.testing.assert_close(compiled(x, x + 1), model(x, x + 1))
    assert len(rec.graphs) == 1
    assert rec.counts() == {"rms_norm": 1}


def test_numbers_that_are_first_already_stay_in_order():
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in "abc"]
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        for node in inputs:
            node.meta["val"] = mode.from_tensor(torch.tensor(1.0))
    items = [graph.call_function(aten.item.default, (node,)) for node in inputs]
    for item in items:
        item.meta["val"] = 1.0
    graph.output(tuple(items))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert canonicalise(module) == 0
    assert [n for n in graph.nodes if n.op == "call_function"] == items


def test_a_number_in_an_input_that_is_written_to_is_read_where_it_was():
    def program(x, n):
        n.add_(1)
        return x + 1, x * n.item()

    def backend(module, inputs):
        part = normal_forms(module, inputs)[0]
        canonicalise(part)
        targets = [n.target for n in part.graph.nodes]
        assert targets.index(aten.add_.Tensor) < targets.index(aten.item.default)
        return part

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(program, backend=backend, fullgraph=True)
        for actual, expected in zip(compiled(x, torch.tensor(2.0)), program(x, torch.tensor(2.0)), strict=True):
            torch.testing.assert_close(actual, expected)


def _constant_on_a_gpu(*steps):
    """A graph of `where(x, torch.tensor(0.3, device="cuda", dtype=torch.bfloat16), -1)`, as it is traced there: the
    constant is made on the CPU, and the `steps` bring it over. That takes no GPU."""
    graph, module = torch.fx.Graph(), torch.nn.Module()
    module.register_buffer("constant", torch.tensor(0.3, dtype=torch.float64))
    with FakeTensorMode() as mode:
        x, there = torch.empty(3, dtype=torch.bool, device="cuda"), torch.empty((), dtype=torch.bfloat16, device="cuda")
        here = mode.from_tensor(module.constant)
        given, at = graph.placeholder("x"), graph.get_attr("constant")
        given.meta["val"], at.meta["val"] = x, here
        found = at
        for target in steps:
            more = (torch.bfloat16,) if target is aten.to.dtype else ()
            named = {"dtype": torch.bfloat16, "device": x.device} if target is aten._to_copy.default else {}
            found = graph.call_function(target, (found, *more), named)
            found.meta["val"] = there if named else here if not more else here.to(torch.bfloat16)
        where = graph.call_function(aten.where.ScalarOther, (given, found, -1.0))
        where.meta["val"] = torch.empty(3, dtype=torch.bfloat16, device="cuda")
    graph.output(where)
    return torch.fx.GraphModule(module, graph)


LIFT, MOVE, DETACH = aten.lift_fresh_copy.default, aten._to_copy.default, aten.detach_.default


@pytest.mark.parametrize("steps", [(LIFT, MOVE, DETACH), (LIFT, DETACH, MOVE), (LIFT, aten.to.dtype, MOVE)])
def test_a_number_on_a_gpu_is_a_number(steps):
    module = _constant_on_a_gpu(*steps)
    canonicalise(module)
    (full,) = (node for node in module.graph.nodes if node.op == "call_function" and "where" not in str(node.target))
    assert full.target is aten.full.default
    assert full.args == ([], torch.tensor(0.3, dtype=torch.bfloat16).item())
    assert full.kwargs == {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    assert not hasattr(module, "constant")
