"""A graph decomposed node by node is the same program in the ops of the table, with strides and writes kept."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from fxopt.lower.decompose import DecomposeError, decompose, is_composite

aten = torch.ops.aten


def traced(program, *inputs, pre_dispatch=True, dynamic=False, table=None):
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None, static_shapes=not dynamic)
    fakes = [mode.from_tensor(x) for x in inputs]
    with mode:
        return make_fx(program, table, pre_dispatch=pre_dispatch)(*fakes)


def targets(module):
    return {n.target for n in module.graph.nodes if n.op == "call_function"}


def layer(x, w, b):
    h = F.layer_norm(F.linear(x, w, b), (8,)).softmax(-1)
    return F.silu(h).transpose(1, 2).reshape(2, -1) + F.gelu(h).flatten(1), h


@pytest.mark.parametrize("dynamic", [False, True])
def test_composites_and_table_ops_are_spelled_out(dynamic):
    inputs = torch.randn(2, 3, 8), torch.randn(8, 8), torch.randn(8)
    module = traced(layer, *inputs, dynamic=dynamic)
    table = select_decomp_table()
    assert decompose(module, table) > 0
    assert not any(is_composite(t) for t in targets(module) if "sym_" not in str(t))
    assert not {aten._softmax.default, aten.silu.default, aten.gelu.default} & targets(module)
    if not dynamic:
        assert targets(module) <= targets(traced(layer, *inputs, pre_dispatch=False, table=table))
    expected = layer(*inputs)
    for ours, theirs in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_what_the_table_lacks_is_untouched():
    module = traced(lambda x: x.sin().view(6) + 1, torch.randn(2, 3))
    before = list(module.graph.nodes)
    assert decompose(module, {}) == 0
    assert list(module.graph.nodes) == before


def test_writes_stay_where_they_are():
    def program(cache, x):
        out = F.linear(x, x)
        cache.copy_(out)
        return out.softmax(-1)

    cache, x = torch.zeros(3, 3), torch.randn(3, 3)
    module = traced(program, cache, x)
    decompose(module, select_decomp_table())
    assert aten.copy_.default in targets(module)
    out = module(cache, x)
    torch.testing.assert_close(cache, x @ x.t())
    torch.testing.assert_close(out, cache.softmax(-1))


def test_fake_values_stay_true():
    """Two layers of one form share a trace; their values share no memory."""
    module = traced(
        lambda x, w: F.linear(F.linear(x, w).view(6, 4), w).view(2, 3, 4), torch.randn(2, 3, 4), torch.eye(4)
    )
    decompose(module, select_decomp_table())
    products = [n.meta["val"] for n in module.graph.nodes if n.target is aten.mm.default]
    assert len({v.untyped_storage()._cdata for v in products}) == len(products) == 2
    for node in module.graph.nodes:
        if node.target is aten.view.default:
            source = node.args[0].meta["val"]
            assert node.meta["val"].untyped_storage()._cdata == source.untyped_storage()._cdata


def test_provenance_is_carried():
    module = traced(lambda x: x.softmax(-1), torch.randn(3))
    (node,) = module.graph.find_nodes(op="call_function", target=aten.softmax.int)
    node.meta["stack_trace"] = "where it came from"
    decompose(module, select_decomp_table())
    made = [n for n in module.graph.nodes if n.op == "call_function"]
    assert len(made) > 1
    assert {n.meta["stack_trace"] for n in made} == {"where it came from"}


def test_strides_that_somebody_reads_are_kept():
    def turned(x):
        return (x * 2).t().contiguous().t()

    module = traced(lambda x: aten.softplus(x.sin()).view(-1), torch.randn(3, 4))
    decompose(module, {aten.softplus.default: lambda x, *_: turned(x) / 2})
    x = torch.randn(3, 4)
    assert module(x).shape == (12,)
    torch.testing.assert_close(module(x), x.sin().view(-1))


def test_composites_that_write_to_their_own_memory_become_functional():
    inputs = torch.randn(3), torch.randn(3), torch.ones(3)
    module = traced(lambda a, b, c: aten.margin_ranking_loss(a, b, c, 0.5, 0), *inputs)
    assert is_composite(aten.margin_ranking_loss.default)  # it ends in clamp_min_
    decompose(module, {})
    assert aten.clamp_min.default in targets(module)
    assert not any(t._schema.is_mutable for t in targets(module))
    torch.testing.assert_close(module(*inputs), aten.margin_ranking_loss(*inputs, 0.5, 0))


def test_several_results():
    module = traced(lambda x: aten.native_layer_norm(x, [4], None, None, 1e-5), torch.randn(3, 4))
    decompose(module, select_decomp_table())
    x = torch.randn(3, 4)
    for ours, theirs in zip(module(x), aten.native_layer_norm(x, [4], None, None, 1e-5), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_results_that_nobody_asks_for_are_not_computed():
    module = traced(lambda x: aten.native_group_norm(x, None, None, 2, 4, 6, 2, 1e-5)[0], torch.randn(2, 4, 6))
    decompose(module, select_decomp_table())
    assert not [n for n in module.graph.nodes if n.op == "call_function" and not n.users]


def test_graphs_inside_are_decomposed():
    module = traced(lambda x: torch.cond(x.sum() > 0, lambda x: x.softmax(-1), lambda x: x.sin(), (x,)), torch.randn(3))
    decompose(module, select_decomp_table())
    held = [m for m in module.modules() if isinstance(m, torch.fx.GraphModule) and m is not module]
    assert len(held) == 2
    assert not any(aten.softmax.int in targets(m) or aten._softmax.default in targets(m) for m in held)


def test_data_dependent_sizes_are_refused():
    module = traced(lambda x: x.softmax(-1), torch.randn(3))
    (node,) = module.graph.find_nodes(op="call_function", target=aten.softmax.int)
    node.meta["unbacked_bindings"] = {}
    with pytest.raises(DecomposeError, match="data-dependent"):
        decompose(module, {})
