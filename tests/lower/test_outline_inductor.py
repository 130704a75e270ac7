"""Outlined graphs through Inductor: equal results, static inputs as they were, plain lowering where it goes wrong."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torch._functorch.config
from torch._inductor import compile_fx as inductor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fxopt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(0, 64, (2, 9))

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh():
    """Every test compiles: what another left in a cache was not made by the code under test."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def _llama(layers=6):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_hidden_layers=layers,
    )
    return LlamaForCausalLM(config).eval()


def _calls(rec):
    return [calls for graph in rec.graphs for calls in graph.outlined.values()]


def _decode(model, backend, steps=3, device="cpu", **options):
    """Logits of a few decoding steps with a static cache, and the cache afterwards."""
    cache = StaticCache(model.config, max_cache_len=16)
    run = torch.compile(model, backend=backend, **options) if backend else model
    logits = []
    with torch.no_grad():
        model(IDS[:1].to(device), past_key_values=cache)
        for i in range(steps):
            logits.append(run(IDS[:1, i : i + 1].to(device), past_key_values=cache).logits.clone())
    return logits, [layer.keys.clone() for layer in cache.layers] + [layer.values.clone() for layer in cache.layers]


def test_decoding_with_a_static_cache_keeps_its_static_inputs(monkeypatch):
    seen = {}
    compile_inner = inductor._compile_fx_inner

    def spy(graph, *args, **kwargs):
        names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
        seen.setdefault(backend, []).append((len(names), sorted(kwargs["static_input_idxs"])))
        return compile_inner(graph, *args, **kwargs)

    monkeypatch.setattr(inductor, "_compile_fx_inner", spy)
    model = _llama()
    expected = _decode(model, None)
    backend = "fxopt"
    with fxopt.record() as rec:
        torch.testing.assert_close(_decode(model, backend, options={"outline": "always"}), expected)
    assert _calls(rec) == [5], str(rec)
    torch._dynamo.reset()
    backend = "plain"
    _decode(model, "fxopt", options={"outline": "off"})
    assert seen["fxopt"] == seen["plain"]
    assert seen["fxopt"][0][1]


def test_no_cache_or_weight_is_copied():
    from torch._inductor.utils import run_and_get_code

    model = _llama()
    _, codes = run_and_get_code(lambda: _decode(model, "fxopt", steps=1, options={"outline": "always"}))
    code = codes[-1]
    assert len(re.findall(r"= fxopt_repeated_\w+\(", code)) == 5
    assert "aten.clone" not in code
    # the caches are [1, 2, 16, 8]: nothing of their size is allocated
    assert "empty_strided_cpu((1, 2, 16, 8)" not in code


def test_dynamic_shapes_share_one_compilation():
    model = _llama()
    run = torch.compile(model, backend="fxopt")
    ids = IDS.clone()
    torch._dynamo.mark_dynamic(ids, 1)
    with torch.no_grad(), fxopt.record() as rec:
        for given in (ids, IDS[:, :5].clone(), IDS[:, :7].clone()):
            torch.testing.assert_close(run(given, use_cache=False).logits, model(given, use_cache=False).logits)
    assert len(rec.graphs) == 1
    assert _calls(rec) == [5], str(rec)


def test_a_failure_is_undone(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("fxopt.lower.compile.opening_inner", broken)
    model = _llama()
    with torch.no_grad(), fxopt.record() as rec, caplog.at_level(logging.WARNING):
        got = torch.compile(model, backend="fxopt")(IDS, use_cache=False).logits
        torch.testing.assert_close(got, model(IDS, use_cache=False).logits)
    assert not _calls(rec)
    assert rec.counts()["attention"] == 6
    assert any("no such luck" in note for note in rec.graphs[0].notes)


def test_off_means_off():
    model = _llama()
    with torch.no_grad(), fxopt.record() as rec:
        torch.compile(model, backend="fxopt", options={"outline": "off"})(IDS, use_cache=False)
    assert not _calls(rec)


def _gradients(model, run):
    model.zero_grad()
    out = run(IDS.to(DEVICE), use_cache=False).logits
    out.pow(2).mean().backward()
    return out, [p.grad.clone() for p in model.parameters()]


def test_training_is_outlined_only_when_asked_for(without_inductor):
    model = _llama()
    with fxopt.record() as rec:
        _gradients(model, torch.compile(model, backend="fxopt"))
    assert not _calls(rec)
    assert any('outline="always"' in note for note in rec.graphs[0].notes)


@pytest.mark.parametrize("layers", [5, 8])
def test_gradients_through_shared_bodies(layers):
    model = _llama(layers).to(DEVICE)
    expected = _gradients(model, model)
    with fxopt.record() as rec:
        run = torch.compile(model, backend="fxopt", options={"outline": "always"})
        torch.testing.assert_close(_gradients(model, run), expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(_gradients(model, run), expected, rtol=1e-3, atol=1e-6)
    assert _calls(rec)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_in_cuda_graphs():
    from torch._dynamo.utils import counters

    model = _llama().to(DEVICE)
    expected = _decode(model, None, device=DEVICE)
    counters.clear()
    with fxopt.record() as rec:
        got = _decode(model, "fxopt", device=DEVICE, options={"outline": "always", "mode": "reduce-overhead"})
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert _calls(rec), str(rec)
    assert not counters["inductor"]["cudagraph_skips"]
