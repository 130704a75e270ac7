"""Index maps of layout ops against running them; walks over regions of real graphs."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.match import axes
from fxopt.match.miss import Miss
from fxopt.match.region import back, carried, constant_value, consumers, number, private, producers

aten = torch.ops.aten


def trace(program, *inputs):
    """The normal form of a program of float tensors."""
    graph = make_fx(program, pre_dispatch=True, tracing_mode="fake")(*inputs).graph
    return graph, [n for n in graph.nodes if n.op == "placeholder"], graph.output_node().args[0]


def node(graph, target, index=0):
    return [n for n in graph.nodes if n.target in (target, getattr(target, "default", None))][index]


# A chain of layout ops on a base [2, 3, 4, 6] and what its index map must say: True: all elements once.
CHAINS = {
    "nothing": lambda x: x.clone(),
    "transpose": lambda x: x.transpose(1, 2).contiguous().view(2, 4, 18),
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "split": lambda x: x.reshape(2, 3, 2, 2, 6).transpose(1, 3),
    "merge and split": lambda x: x.reshape(6, 24).view(2, 3, 8, 3),
    "unaligned": lambda x: x.reshape(2, 3, 24).reshape(2, 3, 8, 3).transpose(2, 3),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    "flatten": lambda x: x.flatten(0, 1).unflatten(0, (2, 3)),
    "expand": lambda x: x[:, :, None].expand(2, 3, 5, 4, 6),
    "repeat_kv": lambda x: x[:, :, None].expand(2, 3, 5, 4, 6).reshape(2, 15, 4, 6),
    "repeat_interleave": lambda x: x.repeat_interleave(5, dim=1),
    "tiles": lambda x: x.repeat(1, 5, 1, 1),
    "new leading dimensions": lambda x: x.expand(7, 2, 3, 4, 6).reshape(14, 3, 4, 6),
    "casts": lambda x: x.double().transpose(0, 1).float(),
}


def value_of(layout, base):
    """The value that a layout describes, by walking every index."""
    shape = [int(axes.extent(group)) for group in layout]
    result = torch.empty(shape, dtype=base.dtype)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)).tolist():
        at = [0] * base.dim()
        for position, group in zip(index, layout, strict=True):
            for axis in reversed(group):
                position, step = divmod(position, axis.size)
                if axis.dim is not None:
                    at[axis.dim] += step * axis.stride
        result[tuple(index)] = base[tuple(at)]
    return result


def layout_of(program, x):
    _, (base,), (end,) = trace(lambda x: [program(x)], x)
    layout = axes.identity(x.shape)
    for n in reversed(list(back(end))[:-1]):
        layout = axes.through(n, layout)
    assert list(back(end))[-1] is base
    return layout


@pytest.mark.parametrize("program", CHAINS.values(), ids=CHAINS.keys())
def test_index_map_says_what_running_the_chain_does(program):
    x = torch.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    torch.testing.assert_close(value_of(layout_of(program, x), x), program(x))


@pytest.mark.parametrize("program", CHAINS.values(), ids=CHAINS.keys())
def test_moves_rebuild_the_chain(program):
    x = torch.arange(2.0 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    value = x
    for kind, numbers in axes.moves(x.shape, layout_of(program, x)):
        value = getattr(value, kind)(*numbers)
    torch.testing.assert_close(value, program(x))


def test_moves_are_few():
    shape = (2, 3, 4, 6)
    order = tuple(axes.identity(shape)[d] for d in (0, 2, 1, 3))
    assert axes.moves(shape, axes.identity(shape)) == []
    assert axes.moves(shape, order) == [("permute", (0, 2, 1, 3))]


def test_layouts_of_grouped_and_tiled_heads_differ():
    x = torch.randn(2, 3, 4, 6)
    grouped, tiled = layout_of(CHAINS["repeat_kv"], x), layout_of(CHAINS["tiles"], x)
    assert axes.same_layout(grouped, layout_of(CHAINS["repeat_interleave"], x))
    assert not axes.same_layout(grouped, tiled)


def test_a_layout_that_drops_elements_has_no_moves():
    assert axes.moves((4, 6), ((axes.Axis(2, 0, 2),), (axes.Axis(6, 1),))) is None


def test_a_reshape_that_cuts_across_sizes_is_not_guessed():
    assert axes.reshape(axes.identity((4, 6)), (3, 8)) is None


def test_symbolic_sizes_are_followed_without_guards():
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2 + [DimDynamic.STATIC] * 2)
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(torch.randn(5, 7, 3, 4), symbolic_context=dynamic, source=ConstantSource("x"))
        b, n = x.shape[:2]
        folded = axes.reshape(axes.identity(x.shape), (b * n, 12))
        back_again = axes.reshape(folded, (b, n * 3, 4))
        assert axes.moves(x.shape, back_again) == [("reshape", (b, n * 3, 4))]
        assert axes.reshape(folded, (n, b * 12)) is None
    assert env.guards == []


# Walks


def attention(q, k, m):
    scores = (q @ k).mul(0.5)
    scores = scores.view(2, 4, 4) + m.exp()
    return torch.softmax(scores, -1)


@pytest.fixture
def region():
    graph, inputs, _ = trace(attention, torch.randn(2, 4, 3), torch.randn(2, 3, 4), torch.randn(4, 4))
    return graph, inputs


def test_producers_find_the_nearest_through_pointwise_and_layout(region):
    graph, _ = region
    found = producers(node(graph, aten.softmax.int).args[0], lambda n: n.target is aten.matmul.default)
    assert found == [node(graph, aten.matmul.default)]


def test_carried_lists_the_steps_of_one_value(region):
    graph, _ = region
    steps = carried(node(graph, aten.matmul.default), node(graph, aten.softmax.int))
    assert steps[0].node.target is aten.mul.Tensor
    assert [s.node.target for s in steps][-2:] == [aten.add.Tensor, aten.softmax.int]
    assert all(not s.inner for s in steps)
    assert node(graph, aten.exp.default) in steps[-2].others


def test_carried_keeps_what_hangs_off_the_value_inside_one_step():
    graph, (x,), _ = trace(lambda x: torch.tanh(x - x.amax(-1, keepdim=True)), torch.randn(3, 4))
    sub, tanh = carried(x, node(graph, aten.tanh.default))
    assert sub.node.target is aten.sub.Tensor
    assert sub.inner == (node(graph, aten.amax.default),)
    assert tanh.inner == ()


def test_carried_misses_what_does_not_depend_on_the_start(region):
    graph, (_, _, m) = region
    assert isinstance(carried(m, node(graph, aten.matmul.default)), Miss)


def test_consumers_see_through_casts_and_layout():
    graph, (x,), _ = trace(lambda x: (x.float().view(6, 2).sin(), x.cos()), torch.randn(3, 4).double())
    assert {u.target for u, _ in consumers(x)} == {aten.sin.default, aten.cos.default}
    assert node(graph, aten.sin.default) in dict(consumers(x))


def test_private_stops_at_what_others_use():
    graph, _, _ = trace(lambda x: (x.t().t().sin(), x.t()), torch.randn(3, 4))
    end = node(graph, aten.sin.default)
    chain = list(back(end.args[0]))[:-1]
    assert private(chain, {end}) == chain
    shared, _, _ = trace(lambda x: [y := x.t(), y.clone().sin()], torch.randn(3, 4))
    end = node(shared, aten.sin.default)
    assert private(list(back(end.args[0]))[:-1], {end}) == [end.args[0]]


def test_constants_are_evaluated_and_inputs_are_not():
    def program(x):
        mask = torch.arange(4)[:, None] >= torch.arange(4)
        return torch.where(mask, x, torch.full([], -1e9)), x.exp()

    graph, (x,), _ = trace(program, torch.randn(4, 4))
    where = node(graph, aten.where.self)
    assert torch.equal(constant_value(where.args[0]), torch.ones(4, 4, dtype=torch.bool).tril())
    assert constant_value(where.args[0], budget=8) is None
    assert constant_value(node(graph, aten.exp.default)) is None
    assert number(where.args[2]) == -1e9
    assert number(x) is None


def test_constants_that_are_written_to_are_not_known():
    def program(x):
        mask = torch.full((4, 4), -1e9)
        mask[0] = 0.0
        return x + mask, x * torch.full([], 2.0).fill_(3.0)

    graph, _, _ = trace(program, torch.randn(4, 4))
    for target, index in ((aten.add.Tensor, 0), (aten.mul.Tensor, 0)):
        operand = node(graph, target, index).args[1]
        assert number(operand) is None
        assert constant_value(operand) is None


def test_promoted_constants_keep_no_rounding():
    graph, _, _ = trace(lambda x: x * torch.full([], 8.0, dtype=torch.bfloat16).sqrt(), torch.randn(3))
    root = node(graph, aten.sqrt.default)
    assert constant_value(root).item() == 2.828125
    assert abs(constant_value(root, promoted=True).item() - 8.0**0.5) < 1e-12
