"""Graphs as data to draw: columns, values in words, what a rewrite saves; and a big model's page stays small."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import fxopt
from fxopt.view import save
from fxopt.view.drawing import sketch
from fxopt.view.report import GraphReport, Part, Report

SDPA = "scaled_dot_product_attention"


def drawn(program, *inputs, mode="fake"):
    return sketch(make_fx(program, tracing_mode=mode, pre_dispatch=True)(*inputs))


def spelled_out(q, k, v, scale):
    return ((q @ k.mT) * scale).softmax(-1) @ v


def test_columns_give_the_nodes_back():
    drawing = drawn(lambda x: (x + 1).relu(), torch.randn(2, 3)).drawing
    nodes = list(drawing)
    assert [node.op for node in nodes] == ["placeholder", "add.Tensor", "relu.default", "output"]
    assert [node.value for node in nodes] == ["f32[2, 3]", "f32[2, 3]", "f32[2, 3]", ""]
    assert [node.inputs for node in nodes] == [(), (0,), (1,), (2,)]
    assert len(set(drawing.strings)) == len(drawing.strings)


@pytest.mark.parametrize(
    "program, node, bytes_moved, flops",
    [
        (lambda x, w: x @ w, "matmul", 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 4 * 16),
        (lambda x, w: F.linear(x, w.t()), "linear", 4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 4 * 16),
        (lambda x, w: x.t(), "t", 0, 0),  # a view moves nothing
        (lambda x, w: x.exp(), "exp", 2 * 4 * 128, 128),
        (lambda x, w: x.sum(-1), "sum_1", 4 * (128 + 8), 128),
        (lambda x, w: x.add_(1), "add_", 2 * 4 * 128, 128),  # in place, but no view
        (lambda x, w: x.long(), "to", 4 * 128 + 8 * 128, 0),
        (lambda x, w: x.chunk(2)[0], "chunk", 0, 0),
        (lambda x, w: x.softmax(-1), "softmax", 2 * 4 * 128, 5 * 128),
        (lambda x, w: F.scaled_dot_product_attention(x, x, x), SDPA, 4 * 2 * 128, 8 * 8 * (2 * 16 + 2 * 16 + 6)),
    ],
    ids=["matmul", "linear", "view", "pointwise", "reduction", "in place", "cast", "several views", "softmax", "sdpa"],
)
def test_cost_of_a_node(program, node, bytes_moved, flops):
    found = drawn(program, torch.randn(8, 16), torch.randn(16, 4))
    assert (found.bytes[node], found.flops[node]) == (bytes_moved, flops)


def test_what_attention_saves_is_its_scores(without_inductor):
    q = torch.randn(1, 2, 6, 8)
    torch._dynamo.mark_dynamic(q, 2)
    with torch.no_grad():
        report = fxopt.explain(spelled_out, q, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), 0.35).report
    (graph,) = report.graphs
    (index,) = [i for i, step in enumerate(graph.steps) if step.fusion == "attention"]
    saving = graph.parts[0].savings[index]
    # Scores of 2 heads, 5 columns a row, 4 bytes: written and read by the product, the scale and the softmax.
    (dim,) = graph.dims
    assert saving.bytes_saved == f"{6 * 2 * 5 * 4}*{dim}"
    assert saving.example == 6 * 2 * 5 * 4 * 6
    assert saving.flops_after == saving.flops_before
    assert saving.flops_saved == "0"
    assert saving.flops_before == f"{2 * (2 * 5 * 8 * 2 + 5 + 5 * 5)}*{dim}"
    assert "size()[2], 6 at the first call" in graph.dims[dim]


def test_steps_name_nodes_that_are_drawn(without_inductor):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(8, eps=1e-6)

        def forward(self, q, k, v):
            return spelled_out(self.norm(q), k, v, 0.5)

    with torch.no_grad():
        report = fxopt.view(Model(), *(torch.randn(1, 2, 6, 8) for _ in range(3)))
    (graph,) = report.graphs
    (part,) = graph.parts
    assert part.steps == (0, len(graph.steps))
    for step in graph.steps:
        if step.applied:
            assert set(step.replaced) <= set(part.before.names)
    for site in graph.sites:
        assert site.node in part.after.names
        assert any(site.node in step.made for step in graph.steps)
    assert any(node.module == "norm" for node in part.before)
    assert save.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_nothing_is_drawn_where_nobody_listens(without_inductor, monkeypatch):
    monkeypatch.setattr("fxopt.view.record.sketch", lambda module: pytest.fail("drawn"))
    torch.compile(spelled_out, backend="fxopt")(*(torch.randn(1, 2, 6, 8) for _ in range(3)), 0.5)


def test_a_drawing_that_fails_costs_nothing(without_inductor, monkeypatch, caplog):
    monkeypatch.setattr("fxopt.view.record.sketch", lambda module: 1 / 0)
    report = fxopt.view(spelled_out, *(torch.randn(1, 2, 6, 8) for _ in range(3)), 0.5)
    assert report.counts() == {"attention": 1}
    assert "could not be drawn" in caplog.text


def test_view_takes_a_report_an_explanation_or_a_model_with_inputs(report):
    assert fxopt.view(report) is report
    assert fxopt.view(fxopt.Explanation(report)) is report
    for wrong, words in (((report, 1), "no inputs"), ((torch.nn.ReLU(),), "needs the model's inputs"), ((3,), "int")):
        with pytest.raises(TypeError, match=words):
            fxopt.view(*wrong)


def test_the_page_of_32_layers_is_small(make):
    def layer(x, w):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[0]
        q, k, v = ((n @ w.t()).view(2, 16, 4, 2).transpose(1, 2) for _ in range(3))
        a = (spelled_out(q, k, v, 0.5)).transpose(1, 2).reshape(2, 16, 8)
        h = x + a @ w
        gate = F.silu(h @ w) * (h @ w.t()) @ w
        return h + gate * torch.rsqrt(gate.pow(2).mean(-1, keepdim=True) + 1e-6)

    def model(x, w):
        for _ in range(32):
            x = layer(x, w)
        return x

    drawing = drawn(model, torch.randn(2, 16, 8), torch.randn(8, 8)).drawing
    assert len(drawing) > 1200
    steps = [make.step(replaced=drawing.names[i * 30 : i * 30 + 12], made=(drawing.names[i * 30],)) for i in range(40)]
    graph = GraphReport("graph 0", normalized=True, steps=steps, parts=[Part(drawing, drawing, (0, 40))])
    assert len(save.page_data(Report([graph]))) < 300_000
    assert len(save.page(Report([graph]))) < 600_000


def test_a_checkpointed_region_is_a_part_of_its_own(without_inductor):
    from torch.utils.checkpoint import checkpoint

    def region(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def program(x):
        return region(x) + checkpoint(region, x.sin(), use_reentrant=False)

    report = fxopt.view(program, torch.randn(3, 8, requires_grad=True))
    (graph,) = report.graphs
    assert len(graph.parts) == 2
    assert [part.steps for part in graph.parts] == [(0, 1), (1, 2)]
    for part in graph.parts:
        for step in graph.steps[slice(*part.steps)]:
            assert set(step.replaced) <= set(part.before.names)
            assert set(step.made) <= set(part.after.names)
        assert set(part.savings) == set(range(*part.steps))


def test_a_symbolic_number_is_no_hindrance(without_inductor, caplog):
    norm = torch.nn.Module()
    norm.eps = 1e-6
    norm.forward = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    with fxopt.record() as rec, torch.no_grad():
        torch.compile(norm, backend="fxopt", dynamic=True)(torch.randn(2, 3, 8))
    (graph,) = rec.graphs
    assert rec.counts() == {"rms_norm": 1}
    assert graph.parts
    assert "could not be drawn" not in caplog.text
