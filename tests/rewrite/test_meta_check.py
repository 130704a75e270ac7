"""What differs between two values without running anything."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxopt.rewrite.meta_check import alias_difference, check_meta, stride_difference


def node(value, graph=None, *inputs):
    made = (graph or Graph()).call_function(torch.relu, inputs)
    made.meta["val"] = value
    return made


def fake(*shape, mode=None, **options):
    with mode or FakeTensorMode():
        return torch.empty(shape, **options)


@pytest.mark.parametrize(
    "old, new, words",
    [
        (fake(2, 3), fake(2, 3), None),
        (fake(2, 3), fake(3, 2), "shape [2, 3] became [3, 2]"),
        (fake(2, 3), fake(2, 3, 1), "shape"),
        (fake(2), fake(2, dtype=torch.bfloat16), "dtype torch.float32 became torch.bfloat16"),
        (fake(2), fake(2, device="meta"), "device cpu became meta"),
        (fake(2), 3, "became a int"),
        ((fake(2), fake(3)), (fake(2), fake(3)), None),
        ((fake(2), fake(3)), (fake(2), fake(4)), "result 1: shape"),
        ((fake(2), fake(3)), (fake(2),), "2 results became 1"),
        (3, 3, None),
        (3, 4, "value 3 became 4"),
        (3, 3.0, "a int became a float"),
        (None, None, None),
    ],
)
def test_differences_in_words(old, new, words):
    found = check_meta(node(old), node(new))
    assert found is None if words is None else words in found


def test_conjugated_views_differ():
    z = fake(4, dtype=torch.complex64)
    assert check_meta(node(z), node(z.conj())) == "is_conj False became True"


def symbolic(*hints):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints))
    return mode.from_tensor(torch.empty(hints), symbolic_context=context), environment


def test_symbolic_sizes_are_compared_without_guards():
    x, environment = symbolic(4, 5)
    with x.fake_mode:
        same, other = torch.empty(x.shape[0], x.shape[1]), torch.empty(x.shape[1], x.shape[0])
        specialised = torch.empty(4, x.shape[1])
    before = len(environment.guards)
    assert check_meta(node(x), node(same)) is None
    assert "shape" in check_meta(node(x), node(other))
    assert "shape" in check_meta(node(x), node(specialised))
    assert not stride_difference(node(x), node(same))
    assert len(environment.guards) == before


@pytest.mark.parametrize(
    "old, new, differ",
    [
        (fake(2, 3), fake(2, 3), False),
        (fake(2, 3), fake(3, 2).t(), True),
        (fake(1, 3), fake(3, 1).t(), False),  # a dimension of size 1 addresses nothing
        (fake(0, 3), fake(3, 0).t(), False),
        (fake(2, 3), fake(2, 4), True),
        (3, 3, False),
    ],
)
def test_strides(old, new, differ):
    assert stride_difference(node(old), node(new)) == differ


def aliases(make_old, make_new):
    graph, x = Graph(), fake(4, 4)
    source = graph.placeholder("x")
    source.meta["val"] = x
    with x.fake_mode:
        old, new = node(make_old(x), graph, source), node(make_new(x), graph, source)
    return alias_difference([old], [new], {old}, {new})


def test_a_view_must_stay_a_view():
    assert aliases(lambda x: x.t(), lambda x: x.t()) is None
    assert aliases(lambda x: x * 1, lambda x: x + 0) is None
    assert aliases(lambda x: x * 1, lambda x: x.t()) == (
        "relu is fresh memory, its replacement relu_1 shares memory with x"
    )
    assert "is fresh memory" in aliases(lambda x: x.t(), lambda x: x.t().clone())


def test_outputs_that_share_memory_must_go_on_sharing_it():
    graph, x = Graph(), fake(4)
    with x.fake_mode:
        a, b = node(x + 1, graph), node(x + 1, graph)
        c, d = node(x + 2, graph), node(x + 2, graph)
        view = node(c.meta["val"][:2], graph)
    assert alias_difference([a, b], [c, d], {a, b}, {c, d}) is None
    assert "unlike their replacements" in alias_difference([a, b], [c, view], {a, b}, {c, view})
