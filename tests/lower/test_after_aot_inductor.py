"""The second entry with Inductor behind it: caches, static inputs, guards and results are as in plain Inductor."""

from __future__ import annotations

import random

import pytest
import torch

import fxopt


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def plain(x):
    return torch.nn.functional.linear(x.sin(), x[0, 0]).softmax(-1).cumsum(-1), x.to(torch.bfloat16).exp()


@pytest.fixture(autouse=True)
def _second(monkeypatch):
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "the test says so")
    torch._dynamo.reset()


@pytest.fixture
def uncached():
    """Every graph is compiled (in the user's cache directory: a fresh one costs a minute)."""
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        yield


def test_where_nothing_fuses_the_result_is_inductors_own_to_the_bit(uncached):
    x = torch.randn(2, 4, 4)
    with fxopt.record() as rec, torch.no_grad():
        ours = torch.compile(plain, backend="fxopt")(x)
        torch._dynamo.reset()
        theirs = torch.compile(plain, backend="inductor")(x)
    assert rec.graphs[0].entry == "after AOTAutograd"
    assert rec.counts() == {}
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_static_inputs_and_code_are_those_of_plain_inductor(monkeypatch, uncached):
    import torch._inductor.compile_fx as inductor

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)
            self.register_buffer("cache", torch.zeros(2, 4, 8))

        def forward(self, x, i):
            self.cache.index_copy_(1, i, self.layer(x))
            return (self.cache @ x.mT).tanh()

    seen = []
    original = inductor.compile_fx_inner

    def spy(graph, *args, **kwargs):
        written = [n.args[0].name for n in graph.graph.nodes if n.target is torch.ops.aten.copy_.default]
        seen.append((tuple(kwargs["static_input_idxs"]), bool(kwargs["cudagraphs"]), written))
        return original(graph, *args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx_inner", spy)
    results = []
    for backend in (lambda module, inputs: inductor.compile_fx(module, inputs, inner_compile=spy), "fxopt"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Step()
        with torch.no_grad():
            out = torch.compile(model, backend=backend)(torch.randn(2, 1, 8), torch.tensor([2]))
        results.append((out, model.cache))
    assert seen[0] == seen[1]
    assert seen[0][0]
    assert seen[0][2]
    torch.testing.assert_close(results[0], results[1])


def test_a_warm_start_tells_what_the_cold_one_did(tmp_path, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    unlike = random.random()  # any program seen before

    def attend(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * unlike, -1) @ v

    cases = (({}, 1), ({}, 1), ({"disable": ["attention"]}, 0), ({"verify": "meta"}, 1))
    reports = []
    for options, sites in cases:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with fxopt.record() as rec, torch.no_grad():
            out = torch.compile(attend, backend="fxopt", options=options)(*inputs)
        torch.testing.assert_close(out, attend(*inputs))
        assert rec.counts().get("attention", 0) == sites
        reports.append((rec, torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]))
    assert [hits for _, hits in reports] == [0, 1, 0, 0]
    cold, warm = reports[0][0].graphs[0], reports[1][0].graphs[0]
    assert (warm.sites, warm.steps, warm.misses) == (cold.sites, cold.steps, cold.misses)

    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        torch.compile(attend, backend="fxopt")(*inputs)  # what is kept beside the caches is gone
    assert "came from a cache" in rec.graphs[0].notes[0]


def test_no_guards_beyond_inductors_own(uncached):
    inputs = [[torch.randn(2, 3, n, 8) for n in (5 + i, 7 + 2 * i, 7 + 2 * i)] for i in range(4)]
    compiled = {}
    for backend in ("inductor", "fxopt"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(attend, backend=backend, dynamic=True)
        with torch.no_grad():
            for qkv in inputs:
                torch.testing.assert_close(run(*qkv), attend(*qkv))
        compiled[backend] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled["fxopt"] == compiled["inductor"] == 1


def test_a_pass_of_the_users_runs_after_ours(uncached):
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Look(CustomGraphPass):
        def __call__(self, graph):
            seen.append({n.target for n in graph.nodes})

        def uuid(self):
            return None

    inputs = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    with torch.no_grad():
        torch.compile(attend, backend="fxopt", options={"inductor": {"joint_custom_pre_pass": Look()}})(*inputs)
    assert len(seen) == 1
    assert torch.ops.aten._softmax.default not in seen[0]


@pytest.mark.gpu
def test_cuda_graphs_replay_a_static_cache_step():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cache = torch.zeros(2, 3, 16, 64, device="cuda", dtype=torch.float16)

    def step(q, k, at):
        cache.index_copy_(2, at, k)
        return attend(q, cache, cache)

    run = torch.compile(step, backend="fxopt", mode="reduce-overhead")
    ours, theirs = cache.clone(), cache.clone()
    with torch.no_grad():
        for i in range(6):
            q, k = (torch.randn(2, 3, 1, 64, device="cuda", dtype=torch.float16) for _ in range(2))
            at = torch.tensor([i], device="cuda")
            cache.copy_(ours)
            out = run(q, k, at).clone()
            ours = cache.clone()
            cache.copy_(theirs)
            expected = step(q, k, at)
            theirs = cache.clone()
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernels_of_a_gpu_are_raised_and_fused(masked):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q = torch.randn(2, 3, 128, 64, device="cuda", dtype=torch.float16)
    mask = torch.randn(2, 1, 128, 128, device="cuda", dtype=torch.float16) if masked else None

    def program(q, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt")(q, mask)
    assert rec.counts() == {"attention": 1}
    torch.testing.assert_close(out, program(q, mask), rtol=1e-2, atol=1e-2)
