"""Finding repeated layers and making them one body: what is found, what is refused, and that nothing else changes."""

from __future__ import annotations

import operator

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fxopt
from fxopt.lower.outline import Outline, Outlined, outline
from fxopt.lower.outline_compile import outlined
from fxopt.lower.outline_memory import shared_memory
from fxopt.lower.outline_periods import Run, periodic_runs
from fxopt.options import Options


def _traced(program, *inputs):
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        fakes = [mode.from_tensor(x) for x in inputs]
        return make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


def _outlined(program, *inputs, **options):
    """The outline of a program; it computes what the program does."""
    found = outline(_traced(program, *inputs), **options)
    with torch.no_grad():
        got, expected = found.module(*[x.clone() for x in inputs]), program(*[x.clone() for x in inputs])
    torch.testing.assert_close(got, expected)
    return found


def _layer(x, w, power=2.0):
    n = x * torch.rsqrt(x.pow(power).mean(-1, keepdim=True) + 1e-6)
    return x + torch.nn.functional.silu(n @ w) @ w.t() * 0.1


W = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(12)]
X = torch.rand(4, 8, generator=torch.Generator().manual_seed(12))


def _stack(layers, x, *weights):
    for i, w in enumerate(weights):
        x = layers(i, x, w)
    return x


def test_layers_become_calls_of_one_body():
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *W)
    (body,) = found.bodies
    assert body.calls in (11, 12)
    assert len(found.module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)) == (
        body.calls
    )


def _traced_with_a_symbolic_row_count(layer):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fakes = [mode.from_tensor(X, symbolic_context=context), *(mode.from_tensor(w, static_shapes=True) for w in W)]
    program = lambda x, *w: _stack(lambda i, x, w: layer(x, w), x, *w)  # noqa: E731
    with mode, torch.no_grad():
        return make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes), program


def test_a_symbolic_size_that_only_layers_ask_for():
    def layer(x, w):
        n = x * torch.rsqrt(x.pow(2.0).mean(-1, keepdim=True) + 1e-6)
        return x + torch.relu((n @ w).reshape(n.shape[0], 2, 4)).flatten(1) @ w.t() * 0.1

    traced, program = _traced_with_a_symbolic_row_count(layer)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default):
        product, (rows, *others) = node.args
        with traced.graph.inserting_before(node):
            own = traced.graph.call_function(torch.ops.aten.sym_size.int, (product, 0))
        own.meta["val"] = rows.meta["val"]
        node.args = (product, [own, *others])
    traced.graph.erase_node(rows)
    (body,) = (found := outline(traced)).bodies
    assert body.calls >= 10
    for rows in (4, 7):
        x = torch.rand(rows, 8)
        torch.testing.assert_close(found.module(x, *W), program(x, *W))


def test_no_size_is_specialised():
    """Some ops ask about sizes on the way to a kernel; what outlining tries out must not answer for the graph."""

    @torch.library.custom_op("fxopt_test::asks", mutates_args=())
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    @asks.register_fake
    def _(x):
        return torch.empty_like(x) if x.shape[0] == 4 else x.new_empty(x.shape)

    traced, program = _traced_with_a_symbolic_row_count(lambda x, w: torch.relu(_layer(x, w)))
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        node.target = torch.ops.fxopt_test.asks.default
    (body,) = (found := outline(traced)).bodies
    assert body.calls >= 10
    rows = next(iter(traced.graph.nodes)).meta["val"].shape[0]
    assert rows.node.expr.is_Symbol
    assert not rows.node.shape_env.guards
    x = torch.rand(7, 8)
    torch.testing.assert_close(found.module(x, *W), program(x, *W))


def test_a_weight_that_all_layers_share_is_handed_to_each():
    found = _outlined(lambda x, w: _stack(lambda i, x, w: _layer(x, w), x, *[w] * 8), X, W[0])
    assert found.bodies[0].calls >= 7


def test_few_layers_stay_as_they_are():
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *W[:3])
    assert not found.bodies
    assert _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *W[:3], at_least=2).bodies


def test_layers_that_differ_in_a_constant_are_not_merged():
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w, power=2.0 + i), x, *w), X, *W)
    assert not found.bodies


def test_an_integer_is_not_the_float_of_its_value():
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w, power=(2, 2.0)[i >= 6]), x, *w), X, *W)
    assert all(body.calls <= 6 for body in found.bodies)


def test_alternating_layers_repeat_in_pairs():
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w, power=2.0 + i % 2), x, *w), X, *W)
    (body,) = found.bodies
    assert body.calls in (5, 6)


def test_layers_of_other_shapes_are_not_merged():
    odd = [torch.randn(8, 8 + 8 * (i % 4)) for i in range(4)]
    assert not _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *odd).bodies


def test_layers_wired_differently_are_not_merged():
    def layers(x, *w):
        past = x
        for i, one in enumerate(w):
            past, x = x, _layer(x, one) + (past if i % 3 == 1 else x)
        return x

    found = _outlined(layers, X, *W)
    assert all(body.calls * body.nodes <= 12 * 9 for body in found.bodies)


def test_one_layer_of_other_strides_is_left_alone():
    mixed = [*W[:5], W[5].t().contiguous().t(), *W[6:]]
    found = _outlined(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *mixed)
    assert sum(body.calls for body in found.bodies) <= 11


def test_results_that_are_views_are_made_outside():
    def layers(x, *w):
        seen = []
        for one in w:
            x = _layer(x, one)
            seen.append(x.t())
        return x, seen

    found = _outlined(layers, X, *W)
    assert found.bodies
    for name in {n.args[0].target for n in found.module.graph.nodes if "invoke_subgraph" in str(n.target)}:
        body = getattr(found.module, name)
        assert not any("transpose" in str(r.target) or str(r.target) == "aten.t.default" for r in _results(body))


def _results(body: GraphModule):
    return body.graph.output_node().args[0]


def test_several_results_leave_a_body_one_by_one():
    """Their items are no views of one tensor, and are cut from the call by no write."""
    caches = [torch.zeros(2, 2) for _ in W]

    def layer(i, x, w, cache):
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        cache.copy_(mean.view(2, 2))
        n = (x - mean) * torch.rsqrt(variance + 1e-6)
        return x + torch.nn.functional.silu(n @ w) @ w.t() * 0.1

    def program(x, *given):
        for i, (w, cache) in enumerate(zip(given[: len(W)], given[len(W) :], strict=True)):
            x = layer(i, x, w, cache)
        return x

    found = _outlined(program, X, *W, *caches)
    (body,) = found.bodies
    assert body.calls >= 10
    assert not found.objections
    assert not any("var_mean" in str(r.target) for r in _results(getattr(found.module, body.name)))


def test_items_far_from_their_call_are_brought_to_it():
    def layer(i, x, w):
        variance, mean = torch.var_mean(_layer(x, w), -1, keepdim=True)
        return x + mean + variance

    traced = _traced(lambda x, *w: _stack(layer, x, *w), X, *W)
    items = traced.graph.find_nodes(op="call_function", target=operator.getitem)
    for item in items:
        next(iter(item.users)).prepend(item)
    (body,) = outline(traced).bodies
    assert body.calls >= 10
    assert len(items) == 2 * len(W)
    assert all(items[i].args[0] in (item.prev, item.prev.prev) for i, item in enumerate(items))


def test_writes_and_random_numbers_stay_outside():
    def writing(x, *caches_and_weights):
        for cache, one in zip(caches_and_weights[:12], caches_and_weights[12:], strict=True):
            x = x + cache.copy_(_layer(x, one))
        return x

    found = _outlined(writing, X, *[torch.zeros(4, 8) for _ in W], *W)
    assert found.bodies
    for node in found.module.graph.find_nodes(op="get_attr"):
        body = getattr(found.module, node.target)
        assert not any("copy_" in str(n.target) for n in body.graph.nodes)

    traced = _traced(lambda x, *w: _stack(lambda i, x, w: nn.functional.dropout(_layer(x, w)), x, *w), X, *W)
    found = outline(traced)
    assert found.bodies
    for node in found.module.graph.find_nodes(op="get_attr"):
        body = getattr(found.module, node.target)
        assert not any("dropout" in str(n.target) for n in body.graph.nodes)


def test_the_given_graph_is_not_changed():
    traced = _traced(lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w), X, *W)
    before = traced.code
    outline(traced)
    traced.recompile()
    assert traced.code == before


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_where_it_is_done_unasked(device, mode):
    mode_of_fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with mode_of_fakes, torch.no_grad():
        fakes = [torch.empty(x.shape, device=device) for x in (X, *W)]
        program = lambda x, *w: _stack(lambda i, x, w: _layer(x, w), x, *w)  # noqa: E731
        traced = make_fx(program, pre_dispatch=True)(*fakes)
    asked = outlined(traced, Options(mode=mode, outline="always"), training=False)
    unasked = outlined(traced, Options(mode=mode), training=False)
    assert asked.bodies
    assert bool(unasked.bodies) == (device == "cpu" or (device == "cuda" and mode == "reduce-overhead"))
    assert bool(unasked.bodies) != bool(unasked.objections)


def test_periodic_runs():
    labels = [9, 9, *[0, 1, 2, 3, 4, 5, 6, 7] * 5, 8]
    assert periodic_runs(labels, at_least=4, shortest=4) == [Run(2, 42, 8)]
    assert periodic_runs(labels, at_least=6, shortest=4) == []
    assert periodic_runs(labels, at_least=4, shortest=9) == []
    assert periodic_runs(list(range(50)), at_least=2, shortest=4) == []


def test_memory_that_is_not_the_bodys_own_is_seen():
    assert "memory of" in shared_memory(_traced(lambda x: (x.t(),), X))
    assert "memory of" in shared_memory(_traced(lambda x: (y := x + 1, y.t()), X))
    assert shared_memory(_traced(lambda x: (x + 1, x.t() + 2), X)) is None


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.randint(0, 64, (2, 9))


def _models():
    t = transformers
    yield "Llama", t.LlamaForCausalLM, t.LlamaConfig(**SMALL, num_hidden_layers=6, num_key_value_heads=2)
    yield "Bert", t.BertModel, t.BertConfig(**SMALL, num_hidden_layers=6)
    yield "GPT2", t.GPT2Model, t.GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=64)
    yield "ViT", t.ViTModel, t.ViTConfig(**{**SMALL, "num_hidden_layers": 6, "image_size": 16, "patch_size": 4})
    yield (
        "T5",
        t.T5ForConditionalGeneration,
        t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=7, num_heads=4, vocab_size=64),
    )


@pytest.mark.parametrize(("name", "build", "config"), list(_models()), ids=lambda v: v if isinstance(v, str) else "")
def test_layers_of_models_are_found(name, build, config, without_inductor):
    model = build(config).eval()
    inputs = {"input_ids": IDS, "use_cache": False}
    if name == "ViT":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "Bert":
        inputs = {"input_ids": IDS}
    if name == "T5":
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad(), fxopt.record() as rec:
        got = torch.compile(model, backend="fxopt")(**inputs)[0]
        expected = model(**inputs)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    calls = [calls for graph in rec.graphs for calls in graph.outlined.values()]
    assert sum(calls) >= (8 if name == "T5" else 4), str(rec)


@pytest.mark.parametrize(
    ("results", "mode", "reason"),
    [
        (1, "reduce-overhead", None),
        (3, "reduce-overhead", "caches would be written"),
        (1, "default", "cost the host time"),
    ],
)
def test_on_a_gpu_only_layers_that_write_no_cache_are_shared_in_cuda_graphs(monkeypatch, results, mode, reason):
    with FakeTensorMode():
        module = make_fx(lambda x: x + 1)(torch.empty(2, device="cuda"))
    body = Outlined("body", calls=7, nodes=9, operands=3, results=results, module=None)
    monkeypatch.setattr("fxopt.lower.outline_compile.outline", lambda module: Outline(module, (body,)))
    found = outlined(module, Options.parse(mode, None, ()), training=False)
    assert bool(found.bodies) is (reason is None)
    assert reason is None or (len(found.objections) == 1 and reason in found.objections[0])
