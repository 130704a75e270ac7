"""What a function returned for arguments that look alike is made again, in memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxopt.graph.fakes import Results, fresh
from fxopt.graph.query import storage


@pytest.fixture
def mode():
    return FakeTensorMode(shape_env=ShapeEnv())


class _Counted:
    """A function called on `arguments` through one Results, and how often it ran."""

    def __init__(self, function):
        self.function, self.results, self.runs = function, Results(), 0

    def __call__(self, *arguments):
        def run():
            self.runs += 1
            return self.function(*arguments)

        return self.results(run, self.function, arguments)


def _fakes(mode, *shapes, **kwargs):
    with mode:
        return [torch.empty(shape, **kwargs) for shape in shapes]


def test_alike_is_run_once_and_apart_in_memory(mode):
    max_of = _Counted(lambda x: (x.amax(-1), (x.t() * 2).to(torch.float16)))
    results = [max_of(x) for x in _fakes(mode, (3, 4), (3, 4), (3, 4))]
    assert max_of.runs == 1
    for first, second in results:
        assert (first.shape, second.shape, second.stride(), second.dtype) == ((3,), (4, 3), (1, 4), torch.float16)
        assert first.fake_mode is mode
    assert len({storage(value) for pair in results for value in pair}) == 6


def test_what_looks_otherwise_is_run(mode):
    add = _Counted(lambda x, y: x + y)
    (a, b), (c,) = _fakes(mode, (3, 4), (3, 4)), _fakes(mode, (4, 3))
    with mode:
        half, parameter = a.half(), torch.nn.Parameter(torch.empty(3, 4))
    for arguments in (
        (a, b),
        (a, a),
        (a, a[:]),
        (a, half),
        (a, c.t()),
        (a, 1),
        (a, 1.0),
        (a, True),
        (a, -0.0),
        (a, 0.0),
    ):
        before = add.runs
        add(*arguments)
        assert add.runs == before + 1
    with torch.no_grad():
        add(a, b)
        add(a, parameter)
    assert add.runs == 12
    assert add(a, parameter).requires_grad
    assert add(a, parameter).requires_grad
    assert add.runs == 14  # with gradients it is always run


def test_views_and_symbolic_sizes_are_run(mode):
    (x,) = _fakes(mode, (3, 4))
    view = _Counted(lambda x: x.t())
    assert storage(view(x)) == storage(view(x)) == storage(x)
    both = _Counted(lambda x: (y := x + 1, y.t()))
    first, second = both(x)[0], both(x)[1]
    assert storage(first) != storage(second)  # of two calls
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    symbolic = mode.from_tensor(torch.empty(5, 4), symbolic_context=context)
    doubled = _Counted(lambda x: x * 2)
    assert all(doubled(symbolic).shape[0] is not None for _ in range(2))
    assert (view.runs, both.runs, doubled.runs) == (2, 2, 2)


def test_fresh_looks_the_same(mode):
    (x,) = _fakes(mode, (3, 4), dtype=torch.bfloat16)
    made = fresh(x.t())
    assert (made.shape, made.stride(), made.dtype, made.device) == ((4, 3), (1, 4), torch.bfloat16, x.device)
    assert made.fake_mode is mode
    assert storage(made) != storage(x)
