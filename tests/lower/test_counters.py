"""Counters are counted at the end, in one op, where nothing comes after them; else they stay where they are."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fxopt
from fxopt import backend
from fxopt.lower.counters import MOST_ELEMENTS, count_together

aten = torch.ops.aten


def _counted(program, *inputs):
    """(how many counters share an op, what they are afterwards) of a traced program; equal to eager in any case."""
    module = make_fx(program, tracing_mode="fake", pre_dispatch=True)(*(x.clone() for x in inputs))
    found = count_together(module)
    module.graph.lint()
    given, expected = [x.clone() for x in inputs], [x.clone() for x in inputs]
    with torch.no_grad():
        torch.testing.assert_close(module(*given), program(*expected))
    torch.testing.assert_close(given, expected)
    return found, module


def _count(*shape):
    return torch.full(shape, 7)


def test_counters_of_layers_share_one_op():
    def program(x, a, b, c):
        for counter in (a, b, c):
            x = x + counter
            counter.add_(1)
        return (x,)

    found, module = _counted(program, torch.ones(4), _count(), _count(), _count())
    assert found == 3
    (together,) = module.graph.find_nodes(op="call_function", target=aten._foreach_add_.Scalar)
    assert [n.name for n in together.args[0]] == ["a_1", "b_1", "c_1"]
    assert together.next is module.graph.output_node()
    assert not module.graph.find_nodes(op="call_function", target=aten.add_.Tensor)


def test_updates_that_differ_share_an_op_with_their_like():
    def program(a, b, c, d):
        a.add_(1)
        b.add_(2)
        c.add_(1)
        d.add_(1)
        return ()

    assert _counted(program, _count(), _count(), _count(), _count().int())[0] == 2


def later_read(a, b):
    a.add_(1)
    b.add_(1)
    return (a * 2,)


def read_by_a_view(a, b):
    row = a.view(1, -1)
    a.add_(1)
    b.add_(1)
    return (row.sum(),)


def used_result(a, b):
    b.add_(1)
    return (a.add_(1) * 2,)


def later_write(a, b):
    a.add_(1)
    b.add_(1)
    a.mul_(2)
    return ()


def scaled(a, b):
    a.add_(1, alpha=2)
    b.add_(1, alpha=2)
    return ()


@pytest.mark.parametrize("program", [later_read, read_by_a_view, used_result, later_write, scaled])
def test_what_is_not_last_stays(program):
    assert _counted(program, _count(3), _count(3))[0] == 0


def test_twice_the_same_counter_shares_only_the_last():
    def program(a, b):
        a.add_(1)
        a.add_(1)
        b.add_(1)
        return ()

    assert _counted(program, _count(), _count())[0] == 2


def test_large_tensors_stay():
    def program(a, b):
        a.add_(1)
        b.add_(1)
        return ()

    assert _counted(program, _count(MOST_ELEMENTS), _count(MOST_ELEMENTS))[0] == 2
    assert _counted(program, _count(MOST_ELEMENTS + 1), _count(MOST_ELEMENTS + 1))[0] == 0


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_programs_count(device, monkeypatch):
    monkeypatch.setattr(backend, "launches", lambda inputs: True)
    shared = []
    monkeypatch.setattr(backend, "count_together", lambda module: shared.append(count_together(module)))
    counters = [torch.full((), n, device=device) for n in range(4)]

    def program(x):
        for counter in counters:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) + counter
            counter.add_(1)
        return x

    x = torch.randn(3, 8, device=device)
    run = torch.compile(program, backend="fxopt", **({"mode": "reduce-overhead"} if device == "cuda" else {}))
    with torch.no_grad(), fxopt.record() as rec:
        for step in range(4):
            got = run(x)
            assert [int(c) for c in counters] == [n + step + 1 for n in range(4)]
            for counter in counters:
                counter.sub_(1)
            torch.testing.assert_close(got, program(x))
    assert rec.counts() == {"rms_norm": 4}
    assert shared == [4]
