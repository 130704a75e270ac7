"""Calls copied in the retrace: the same graph, node by node, as when each of them is traced."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.query import storage, val
from fxopt.graph.replay import Replay
from fxopt.graph.retrace import retrace

KEYS = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten")


class _Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8, bias=False)

    def forward(self, x):
        heads = x.view(2, 5, 2, 4).transpose(1, 2).float()  # `float` returns its argument
        scores = (heads @ heads.mT * 0.5).softmax(-1, dtype=torch.float32).to(heads.dtype)
        a, b = (scores @ heads).transpose(1, 2).reshape(2, 5, 8).chunk(2, dim=-1)
        x = x + torch.cat((-b, a), dim=-1)[..., None, :].squeeze(-2)
        return x + self.down(F.dropout(F.gelu(self.up(x)), training=False))


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _writes(x):
    for _ in range(3):
        x = x + 1
        x[:1].T.zero_()
        x = x.t()
        x.add_(1)
    return x


def _writes_to_input(x):
    for row in (x[0:1], x[1:2], x[2:3]):
        row.mul_(2)
    return x.sum(), x[1:3]


def _one_tensor_twice(x):
    y = x.clone()
    return (x - y) + (x - x) + (y - y) + (y - x)


def _in_regions(x):
    a = (x + 1) @ x.t()
    with torch.no_grad():
        b = (x + 1) @ x.t()
    with torch.autocast("cpu"):
        c = (x + 1) @ x.t()
    return a, b, c, (x + 1) @ x.t()


def _by_type(x):
    return x + 1, x + 1.0, x + True, x * -0.0, x * 0.0, x.to(torch.float64) + 1, x[1:2], x[1], x[True], x[1:2]


def _returns_argument(x):
    a = x.contiguous()
    b = a.to(torch.float32)
    c = x.contiguous()
    return a + 1, b.to(torch.float32) + 1, c + 1, x.expand(3, 4), x.expand(3, 4)


def _views_of_one_of_two(x):
    a, b = x.view(12), x.clone()
    return a.expand_as(x.view(1, 12)), torch.expand_copy(b, b.shape), x.view_as(a), b.view_as(a), b.view_as(b.view(12))


def _random(x):
    return F.dropout(x, 0.5), F.dropout(x, 0.5), torch.rand_like(x)


def _complex(x):
    a, b = torch.view_as_complex(x.view(3, 2, 2)), torch.view_as_complex(x.view(3, 2, 2))
    return a.conj() * b, b.conj() * a, a.real, b.real


PROGRAMS = [_writes, _writes_to_input, _one_tensor_twice, _in_regions, _by_type, _returns_argument, _random, _complex]
PROGRAMS += [_views_of_one_of_two]


def _traces(monkeypatch, program, make, *, mode, dynamic=None):
    """The traces of `program` without and with copies, and how many calls were copied in the second."""
    copied = []
    found = []
    replayed, copy = Replay.__call__, Replay.__call__.__globals__["_copy"]
    for call in (lambda self, run, *_: run(), replayed):
        monkeypatch.setattr(Replay, "__call__", call)
        monkeypatch.setitem(replayed.__globals__, "_copy", lambda *a: (copied.append(1), copy(*a))[1])
        torch._dynamo.reset()
        with mode():
            torch.compile(program, backend=lambda m, i: (found.append(retrace(m, i)), m.forward)[1], dynamic=dynamic)(
                make()
            )
    return found, len(copied)


def _described(trace):
    """Everything that later stages read of a trace, with memory named after the first node that has it."""
    homes = {}
    rows = []
    for node in trace.graph.nodes:
        values = [
            (v.dtype, v.device, tuple(map(str, (*v.shape, "|", *v.stride(), v.storage_offset()))), v.is_inference(),
             homes.setdefault(storage(v), node.name))
            if isinstance(v, torch.Tensor) else repr(v)
            for v in tree_leaves(val(node))
        ]  # fmt: skip
        sources = [(s.name, s.pass_name) for s in node.meta.get("from_node", ())]
        meta = [str(node.meta.get(key)) for key in KEYS] + [str(node.meta.get("tensor_meta")), sources]
        given = tree_map(str, (node.args, node.kwargs))
        rows.append((node.name, node.op, str(node.target), given, values, meta, sorted(node.meta)))
    return rows


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_layers_are_copied(monkeypatch, mode):
    model = _Model().eval()
    (plain, replayed), copied = _traces(monkeypatch, model, lambda: torch.randn(2, 5, 8), mode=mode)
    assert _described(plain) == _described(replayed)
    assert copied >= 30 if mode is not torch.enable_grad else copied == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("program", PROGRAMS)
def test_same_trace(monkeypatch, program, mode):
    def make():
        return torch.randn(4, 3).t() if program is _writes_to_input else torch.randn(3, 4)

    traces, _ = _traces(monkeypatch, program, make, mode=mode)
    assert traces
    for plain, replayed in zip(traces[: len(traces) // 2], traces[len(traces) // 2 :], strict=True):
        assert _described(plain) == _described(replayed)


def test_symbolic_sizes_are_traced(monkeypatch):
    model = _Model().eval()

    def program(x):
        return torch.relu(torch.relu(x)), [layer.down(layer.up(x)) for layer in model.layers]

    (plain, replayed), copied = _traces(
        monkeypatch, program, lambda: torch.randn(6, 8), mode=torch.no_grad, dynamic=True
    )
    assert [n.name for n in plain.graph.nodes] == [n.name for n in replayed.graph.nodes]
    assert copied == 0


def test_what_user_code_does_is_done_each_time(monkeypatch):
    factors = itertools.count(2)

    @torch._dynamo.allow_in_graph
    def scaled(x):
        return x * next(factors)

    (_, replayed), _ = _traces(
        monkeypatch, lambda x: scaled(scaled(scaled(x))), lambda: torch.randn(3), mode=torch.no_grad
    )
    products = replayed.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert len({node.args[1] for node in products}) == 3
