"""The retrace is the same program: static inputs, aliases, writes, symbols, provenance."""

from __future__ import annotations

import pytest
import torch

from fxopt.graph.query import module_path, source_line
from fxopt.graph.retrace import retrace

aten = torch.ops.aten


def test_static_inputs_are_those_of_plain_inductor(monkeypatch):
    import torch._inductor.compile_fx as inductor

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    seen = []
    original = inductor.compile_fx_inner

    def spy(*args, **kwargs):
        seen.append(tuple(kwargs.get("static_input_idxs") or ()))
        return original(*args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx_inner", spy)

    def through_retrace(module, example_inputs):
        return inductor.compile_fx(retrace(module, example_inputs), example_inputs, inner_compile=spy)

    def plain(module, example_inputs):
        return inductor.compile_fx(module, example_inputs, inner_compile=spy)

    with torch.no_grad(), torch._inductor.utils.fresh_inductor_cache():
        for backend in (plain, through_retrace):
            torch._dynamo.reset()
            torch.compile(model, backend=backend)(torch.randn(2, 4))
    assert len(seen) == 2
    assert seen[0] == seen[1] != ()


def test_real_inputs_are_not_run(captured):
    cache = torch.zeros(4)

    def program(cache, x):
        cache.add_(x)
        return cache * 2

    out = captured.run(program, cache, torch.ones(4))
    assert cache.tolist() == [1.0] * 4  # written once, by the run; never by the compilation
    assert out.tolist() == [2.0] * 4
    assert captured.graphs


def test_slice_assignment_into_an_input(captured):
    cache, row = torch.zeros(4, 3), torch.arange(3.0)

    def program(cache, row, i):
        cache[i] = row
        return cache.sum(0)

    assert captured.run(program, cache, row, torch.tensor(2)).tolist() == [0, 1, 2]
    assert cache[2].tolist() == [0, 1, 2]


def test_static_cache_step(captured):
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(0, 64, (1, 5))

    def generate(step):
        cache = StaticCache(config=model.config, max_cache_len=16)
        logits = [model(ids, past_key_values=cache).logits[:, -1]]
        for _ in range(3):
            token = logits[-1].argmax(-1, keepdim=True)
            logits.append(step(token, past_key_values=cache).logits[:, -1])
        return torch.stack(logits)

    with torch.no_grad():
        expected = generate(model)
        torch._dynamo.reset()
        ours = generate(torch.compile(model, backend=captured))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert captured.graphs
    assert not captured.reasons


def test_output_that_is_an_input_or_a_view_of_one(captured):
    x = torch.randn(3, 4)
    same, view, fresh = captured.run(lambda x: (x, x.t(), x + 1), x)
    assert same is x
    assert view.data_ptr() == x.data_ptr()
    assert fresh.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dynamic", [None, True])
def test_symbols_are_not_specialised(captured, dynamic):
    torch._dynamo.reset()
    run = torch.compile(lambda x: x.reshape(x.shape[0] * 2, -1).softmax(-1), backend=captured, dynamic=dynamic)
    for rows in (3, 5, 6, 9):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(run(x), x.reshape(rows * 2, -1).softmax(-1))
    assert len(captured.graphs) == (1 if dynamic else 2)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x).relu() * 2


def test_every_node_knows_its_source_line_and_module(captured):
    with torch.no_grad():
        captured.run(torch.nn.Sequential(Block(), Block()), torch.randn(2, 4))
    nodes = [n for n in captured.graphs[0].graph.nodes if n.op == "call_function"]
    assert len(nodes) == 6
    assert all("in forward: return self.inner(x).relu() * 2" in source_line(n) for n in nodes)
    assert module_path(nodes[0]).endswith("inner")
    assert module_path(nodes[0]) != module_path(nodes[3])


def test_weights_replaced_after_compiling(captured):
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with torch.no_grad():
        run = torch.compile(layer, backend=captured)
        torch._dynamo.reset()
        run(x)
        layer.weight.data.copy_(torch.randn(4, 4))
        torch.testing.assert_close(run(x), layer(x))
        layer.weight.data = torch.randn(4, 4)
        torch.testing.assert_close(run(x), layer(x))
        layer.weight = torch.nn.Parameter(torch.randn(4, 4))
        torch.testing.assert_close(run(x), layer(x))


def test_one_compiled_layer_serves_several_modules(captured):
    layers = [torch.nn.Linear(4, 4) for _ in range(3)]
    forward = torch.compile(torch.nn.Linear.forward, backend=captured)
    torch._dynamo.reset()
    x = torch.randn(2, 4)
    with torch.no_grad():
        for layer in layers:
            torch.testing.assert_close(forward(layer, x), layer(x))


def test_graph_break(captured):
    def program(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.softmax(-1)

    x = torch.randn(3, 3)
    torch.testing.assert_close(captured.run(program, x), program(x))
    assert len(captured.graphs) == 2


BATCH_NORMS = {
    "functional": lambda x, mean, var: torch.nn.functional.batch_norm(x, mean, var, training=True),
    "instances": lambda x, mean, var: torch.instance_norm(x[..., None], None, None, mean, var, True, 0.1, 1e-5, False),
    "native": lambda x, mean, var: torch.native_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5)[0],
    "in its schema": lambda x, *stats: aten._native_batch_norm_legit(x, None, None, *stats, True, 0.1, 1e-5)[0],
    "in its schema only": lambda x, *stats: aten._native_batch_norm_legit(x, None, None, *stats, False, 0, 1e-5)[0],
    "with update": lambda x, mean, var: aten._batch_norm_with_update(x, mean + 1, mean * 1, mean, var, 0.1, 1e-5)[0],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_writes_to_its_statistics(captured, name, grad):
    def program(x, mean, var):
        return BATCH_NORMS[name](x, mean, var).sin(), mean * 1

    mine = [torch.randn(4, 3, 2, requires_grad=grad), torch.zeros(3), torch.ones(3)]
    theirs = [t.detach().clone().requires_grad_(t.requires_grad) for t in mine]
    for run, inputs in ((lambda *a: captured.run(program, *a), mine), (program, theirs)):
        outputs = run(*inputs)
        if grad:
            (gradient,) = torch.autograd.grad(outputs[0].sum(), inputs[0])
            outputs += (gradient,)
        inputs += outputs
    torch.testing.assert_close(mine, theirs)
    assert captured.graphs, captured.reasons


@pytest.mark.parametrize("rate, training", [(0.5, False), (0.0, True)])
def test_dropout_in_place_that_does_nothing_writes_nothing(captured, rate, training):
    x = torch.randn(3, 4)
    before = x.clone()
    out = captured.run(lambda x: torch.nn.functional.dropout(x, rate, training, inplace=True).softmax(-1), x)
    torch.testing.assert_close(out, before.softmax(-1))
    torch.testing.assert_close(x, before)
    assert captured.graphs


def test_writing_through_data_without_gradients(captured):
    def program(x):
        y = x + 1
        y.data[:, 1:].copy_(x[:, :-1])
        return y * 2

    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(captured.run(program, x), program(x))
    assert captured.graphs
