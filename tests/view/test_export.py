"""Graphs for other tools: every node and edge, what was fused, and strings that stay strings."""

from __future__ import annotations

import io

import networkx
import pytest
import torch

import fxopt
from fxopt.view.drawing import Drawing
from fxopt.view.export import dot, graphml, to_networkx
from fxopt.view.report import GraphReport, Part, Report


@pytest.fixture
def recorded(without_inductor):
    norm = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    with torch.no_grad():
        return fxopt.view(norm, torch.randn(2, 8))


def test_nodes_edges_and_fusions(recorded):
    for side, drawing in (("before", recorded.graphs[0].parts[0].before), ("after", recorded.graphs[0].parts[0].after)):
        graph = to_networkx(recorded, side)
        assert len(graph) == len(drawing)
        assert graph.number_of_edges() == sum(map(len, drawing.inputs))
        assert networkx.is_directed_acyclic_graph(graph)
        assert {data["fusion"] for _, data in graph.nodes(data=True)} == {"", "layer_norm"}


def test_graphml_reads_back(recorded):
    graph = networkx.read_graphml(io.BytesIO(graphml(recorded).encode()), force_multigraph=True)
    assert dict(graph.nodes(data=True)) == dict(to_networkx(recorded).nodes(data=True))


def test_saved_by_suffix(recorded, tmp_path):
    assert recorded.save(tmp_path / "g.dot").read_text() == dot(recorded)
    assert recorded.save(tmp_path / "g.graphml").read_text() == graphml(recorded)


def test_hostile_strings_stay_strings():
    bad = 'a" ]; b -> c \\'
    drawing = Drawing(("x", bad), ((), (0,)), (1, 1), (1, 1), (1, 1), (1, 1), ("", bad))
    text = dot(Report([GraphReport("g", parts=[Part(drawing, drawing)])]))
    assert '"0/0/a\\" ]; b -> c \\\\"' in text
    (edge,) = [line for line in text.splitlines() if line.startswith('  "') and '" -> "' in line]
    assert edge == '  "0/0/x" -> "0/0/a\\" ]; b -> c \\\\";'


def test_what_has_no_graph_says_what_to_do():
    with pytest.raises(ValueError, match=r"record the compilation with fxopt\.record"):
        to_networkx(Report([GraphReport("g")]))
    with pytest.raises(ValueError, match="'before' or 'after'"):
        to_networkx(Report(), "middle")
