"""Integers that count up are tensors to a CUDA graph, where that changes nothing; else they stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import SymInt

import fxopt
from fxopt import backend

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip


class Cache:
    """Knows how many tokens it has seen, in Python."""

    def __init__(self):
        self.seen = 40


def counting(of):
    """(cache, program): an RMSNorm, so that something fuses, and what `of` makes of x [5, 8] and what was seen."""
    cache = Cache()

    def program(x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        result = of(x, cache.seen)
        cache.seen += 3
        return result

    return cache, program


def rows(x, n):
    """A position of each row, as sliding-window caches have it."""
    return x + (torch.arange(5, device=x.device) + max(0, n - 63))[:, None]


def compared(x, n):
    place = torch.arange(5, device=x.device, dtype=torch.int32) + 44
    return x.masked_fill((place < n)[:, None], 0.0), (place >= n - 2) & (place != 2 * n // 5), place * n


def whole(x, n):
    return x + torch.full((), 3, device=x.device, dtype=torch.int64).add(n)


@pytest.fixture
def compiled_for(monkeypatch):
    """The inputs that graphs were compiled for, one list a graph."""
    found = []
    original = backend.compile_graph

    def compile_graph(module, example_inputs, options):
        found.append(list(example_inputs))
        return original(module, example_inputs, options)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    return found


def run(of, device, mode="reduce-overhead"):
    torch._dynamo.reset()
    (expected, eager), (cache, program) = counting(of), counting(of)
    step = torch.compile(program, backend="fxopt", fullgraph=True, options={"mode": mode, "fusions": ["rms_norm"]})
    with torch.no_grad(), fxopt.record() as rec:
        for _ in range(12):
            x = torch.randn(5, 8, device=device)
            torch.testing.assert_close(step(x.clone()), eager(x))
            assert (cache.seen, type(cache.seen)) == (expected.seen, int)
    assert rec.counts()["rms_norm"] == len(rec.graphs) >= 2  # one for the first number, one for others
    return [note for graph in rec.graphs for note in graph.notes if "integers" in note]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("of", [rows, compared, whole])
def test_integers_become_tensors(compiled_for, of, device):
    assert not run(of, device)
    assert not any(isinstance(x, (int, SymInt)) for x in compiled_for[-1])
    assert any(x.shape == () and x.dtype == torch.int64 for x in compiled_for[-1])


@pytest.mark.parametrize("of, reason", [
    (lambda x, n: x.new_zeros(n), "a size"),
    (lambda x, n: x[:, : n % 7 + 1], "a size"),
    (lambda x, n: x * n, "mul"),  # not exact: half precision would round the tensor
    (lambda x, n: x.sum(1) + torch.arange(5, device=x.device) / n, "div"),
    (lambda x, n: x.sum(1) + torch.arange(n, n + 5, device=x.device), "arange"),
])  # fmt: skip
def test_others_stay_and_say_why(compiled_for, of, reason):
    notes = run(of, "cpu")
    assert notes
    assert all(reason in note for note in notes)
    assert any(isinstance(x, (int, SymInt)) for x in compiled_for[-1])


def test_only_where_graphs_are_replayed(compiled_for):
    assert not run(rows, "cpu", mode="default")
    assert any(isinstance(x, (int, SymInt)) for x in compiled_for[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_recording_serves_all(monkeypatch):
    from torch._inductor.cudagraph_trees import CUDAGraphNode

    recorded = []
    original = CUDAGraphNode.__init__

    def noted(self, *args, **kwargs):
        recorded.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(CUDAGraphNode, "__init__", noted)
    run(rows, "cuda")
    assert len(recorded) <= 2  # one a compiled graph
