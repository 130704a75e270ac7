"""Placing implementations: the chosen one stands in the graph, opaque or traced; strides survive where they matter."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fxopt
from fxopt.lower.compile import compile_graph, missing_compiler, start_compilers
from fxopt.lower.strides import same_strides
from fxopt.ops import Target, find_op, fused_op
from fxopt.options import Options


@fused_op("test_scaled(Tensor x, float by) -> (Tensor, Tensor)")
def scaled(x, by):
    return x * by, x + by


@scaled.fake
def _(x, by):
    return torch.empty_like(x), torch.empty_like(x)


@scaled.implementation("triton", opaque=True, when=lambda target, x, by: None if target.training else "trains only")
def _(x, by):
    return x * by, x + by


@scaled.implementation("decomposed", when=lambda target, x, by: None if target.compiled else "needs a compiler")
def _(x, by):
    return x * by, x + by


def test_select_goes_by_order_and_keeps_the_objections():
    x = torch.randn(3)
    chosen, passed = scaled.select(Target(x.device, training=True), x, 2.0)
    assert (chosen.name, passed) == ("triton", [])
    chosen, passed = scaled.select(Target(x.device), x, 2.0)
    assert (chosen.name, passed) == ("decomposed", [("triton", "trains only")])
    chosen, passed = scaled.select(Target(x.device, compiled=False), x, 2.0)
    assert chosen.name == "reference"
    assert [name for name, _ in passed] == ["triton", "decomposed"]


def test_without_tuning_nothing_opaque_is_chosen():
    x = torch.randn(3)
    chosen, passed = scaled.select(Target(x.device, training=True, opaque=False), x, 2.0)
    assert chosen.name == "decomposed"
    assert passed == [("triton", 'with tune="off" only what the compiler sees into is used')]


def test_an_unknown_implementation_names_the_known_ones():
    with pytest.raises(ValueError, match="it has triton, decomposed, reference"):
        scaled.run("cuda", torch.randn(2), 1.0)


def test_schema_and_reference_must_agree():
    with pytest.raises(ValueError, match="not those of the schema"):

        @fused_op("test_wrong(Tensor x, float by) -> Tensor")
        def wrong(x, factor):
            return x * factor


def test_the_overload_is_named_after_the_source():
    assert scaled.overload._overloadname.startswith("v")
    assert find_op(scaled.overload) is scaled


def _graph(training):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import symbolic_trace

    from fxopt.lower.implementations import place_implementations

    module = symbolic_trace(lambda x: scaled.overload(x, 3.0)[1] + 1)
    mode = FakeTensorMode()
    for node in module.graph.nodes:
        with mode:
            if node.op == "placeholder":
                node.meta["val"] = torch.empty(4)
            elif node.op == "call_function":
                node.meta["val"] = node.target(*torch.fx.map_arg(node.args, lambda n: n.meta["val"]))
    return module, place_implementations(module, Target(torch.device("cpu"), training))


def test_a_transparent_implementation_is_traced_in_and_an_opaque_one_stays():
    module, (choice,) = _graph(training=False)
    assert choice.implementation == "decomposed"
    assert not any(find_op(n.target) for n in module.graph.nodes)
    module_2, (choice,) = _graph(training=True)
    assert choice.implementation == "triton"
    assert any(find_op(n.target) for n in module_2.graph.nodes)
    x = torch.randn(4)
    torch.testing.assert_close(module(x), x + 4)
    torch.testing.assert_close(module_2(x), x + 4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_operands_that_come_from_alike_ops_are_not_confused(dynamic):
    """q and k are results of two sites that share one trace; each must stay itself."""

    def program(x, y, w):
        q, k = (torch.nn.functional.layer_norm(t, (8,), w) for t in (x, y))
        return torch.nn.functional.scaled_dot_product_attention(q, k, y)

    x, y, w = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(8)
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt", dynamic=dynamic)(x, y, w)
    assert rec.counts() == {"layer_norm": 2, "attention": 1}
    torch.testing.assert_close(out, program(x, y, w))


def test_inductor_gets_mode_and_options(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda module, inputs, config_patches: seen.update(config_patches)
    )
    compile_graph(
        torch.fx.symbolic_trace(lambda x: x + 1),
        [],
        Options(mode="max-autotune-no-cudagraphs", inductor={"shape_padding": False}),
    )
    assert seen["max_autotune"] is True
    assert seen["shape_padding"] is False


def test_a_missing_compiler_is_a_reason(monkeypatch):
    from fxopt.lower import compile as lowering

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", _raise)
    lowering._missing_for.cache_clear()
    assert "C++ compiler" in missing_compiler([torch.randn(2)])
    monkeypatch.undo()
    lowering._missing_for.cache_clear()
    assert missing_compiler([torch.randn(2)]) is None


def _raise():
    from torch._inductor.exc import InvalidCxxCompiler

    raise InvalidCxxCompiler


def test_same_strides_ignores_dimensions_of_size_one():
    assert same_strides(torch.empty(1, 3), torch.empty_strided((1, 3), (99, 1)))
    assert not same_strides(torch.empty(2, 3), torch.empty(3, 2).t())


def test_attention_result_that_leaves_the_graph_keeps_its_strides():
    q = torch.randn(2, 3, 5, 4)

    def program(q):
        return (q @ q.mT * 0.5).softmax(-1) @ q

    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(program, backend="fxopt")(q)
    assert rec.counts() == {"attention": 1}
    assert out.stride() == program(q).stride()
    torch.testing.assert_close(out, program(q))


@pytest.mark.parametrize(("device", "started"), [("cpu", 0), ("cuda", 1)])
def test_compiler_processes_are_started_for_gpus(monkeypatch, device, started):
    from torch._inductor import async_compile

    calls = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: calls.append(1))
    with FakeTensorMode():
        start_compilers([3, torch.empty(2), torch.empty(2, device=device)])
    assert len(calls) == started


@pytest.fixture
def compile_fx(monkeypatch):
    """Configurations that Inductor is asked to compile with; with one that it is told to refuse it fails."""
    configs: list = []

    def compile_fx(module, inputs, config_patches):
        configs.append(config_patches)
        if config_patches.get("combo_kernels") in refused:
            raise RuntimeError("no such kernel")
        return module.forward

    refused: list = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return configs, refused


def _asked(configs, *, device="cuda", **options):
    with FakeTensorMode(), torch.no_grad():
        module = torch.fx.symbolic_trace(torch.nn.Identity())
        compile_graph(module, [torch.empty(2, device=device)], Options.parse(None, options, ()))
    return [config.get("combo_kernels") for config in configs]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"mode": "reduce-overhead"}, [True]),
        ({"mode": "reduce-overhead", "inductor": {"combo_kernels": False}}, [False]),
        ({"mode": "reduce-overhead", "device": "cpu"}, [None]),
        ({}, [None]),
    ],
)
def test_small_kernels_are_launched_together_in_cuda_graphs(compile_fx, options, asked):
    assert _asked(compile_fx[0], **options) == asked


def test_what_inductor_cannot_launch_together_it_launches_one_by_one(compile_fx, caplog):
    configs, refused = compile_fx
    refused.append(True)
    assert _asked(configs, mode="reduce-overhead") == [True, None]
    assert "no such kernel" in caplog.text
    refused.append(None)
    with pytest.raises(RuntimeError, match="no such kernel"):
        _asked(configs, mode="reduce-overhead")
