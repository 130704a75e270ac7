"""The page's scripts under node: the layout, and (where jsdom is installed) what it shows as one steps through."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fxopt
from fxopt.view import save
from fxopt.view.report import GraphReport, Part, Report

SCRIPTS = Path(__file__).parent / "scripts"
ASSETS = Path(save.__file__).parent / "assets"
NODE = shutil.which("node")


def run(*arguments, given=""):
    if NODE is None:
        pytest.skip("needs node")
    done = subprocess.run([NODE, *map(str, arguments)], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def opened(tmp_path):
    """opened(report): what its page shows."""

    def read(report):
        if NODE is None or subprocess.run([NODE, "-e", "require('jsdom')"], capture_output=True).returncode:
            pytest.skip("needs node with jsdom (npm install jsdom, and NODE_PATH)")
        return run(SCRIPTS / "page.js", report.save(tmp_path / "page.html"))

    return read


@pytest.fixture
def recorded(without_inductor):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(8, eps=1e-6)
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, x):
            h = self.proj(self.norm(x))
            return x + ((h @ x.mT) * 0.3).softmax(-1) @ x

    with torch.no_grad():
        return fxopt.view(torch.nn.Sequential(Block(), Block()), torch.randn(2, 6, 8))


def test_boxes_do_not_overlap_and_data_flows_down():
    edges = [[0, 1], [0, 2], [1, 3], [2, 3], [0, 3]]
    job = {"id": 7, "sizes": [[80, 42]] * 4, "edges": edges}
    found = run(SCRIPTS / "layout.js", ASSETS / "dagre.min.js", ASSETS / "layout.js", given=json.dumps(job))
    at = found["nodes"]
    assert found["id"] == 7
    assert len(found["edges"]) == len(edges)
    for i, (x, y) in enumerate(at):
        assert 0 < x < found["width"]
        assert 0 < y < found["height"]
        assert all(abs(x - u) >= 80 or abs(y - v) >= 42 for u, v in at[:i])
    assert all(at[a][1] < at[b][1] for a, b in edges)


def test_dagre_comes_with_its_licence():
    assert "Permission is hereby granted, free of charge" in (ASSETS / "dagre.LICENSE").read_text()
    assert "dagre.LICENSE" in (ASSETS / "dagre.min.js").read_text()


def test_stepping_through(recorded, opened):
    shown = opened(recorded)
    assert shown["errors"] == []
    assert shown["groups"] == ["attention2", "rms_norm2"]
    step = next(s for s in recorded.steps if s.fusion == "attention")
    assert set(shown["lit"]) == {*step.replaced, *step.made}
    assert shown["selected"] == ["0", "1"]  # the modules of the first two rewrites
    for words in ("attention", "checked", "memory traffic", "softmax(-1)", "nodes replaced", "computed by"):
        assert words in shown["details"], words
    assert "replaced by" in shown["node"]
    assert {"rms_norm", "linear_1", "softmax"} <= set(shown["boxes"])  # a small model is open at once
    assert shown["report"] == [False, True]


def test_hostile_strings_stay_text(make, opened):
    bad = "</script><b onclick='x'>bold</b>"
    drawing = fxopt.view.drawing.Drawing((bad, "b"), ((), (0,)), (1, 1), (1, 1), (1, 1), (1, 1), ("", bad))
    step = make.step(fusion=bad, replaced=(bad,), made=("b",), sources=(bad,), module=bad, tags={bad: bad})
    site = make.site(fusion=bad, node="b", implementation=bad)
    graph = GraphReport(bad, normalized=True, steps=[step], sites=[site], misses=[make.miss(reason=bad, node=bad)])
    graph.parts.append(Part(drawing, drawing, (0, 1)))
    shown = opened(Report([graph]))
    assert shown["errors"] == []
    assert shown["bold"] == 0
    assert bad in shown["details"]


@pytest.mark.parametrize("graphs", [[], [GraphReport("g", reason="vmap")]], ids=["empty", "passed through"])
def test_pages_with_nothing_to_draw_open(graphs, opened):
    assert opened(Report(graphs))["errors"] == []


def test_undone_missed_and_passed_through_can_be_selected(report, opened):
    shown = opened(report)  # recorded without drawings
    assert shown["errors"] == []
    assert shown["groups"] == [
        "attention2",
        "Undone1",
        "Near misses3",
        "Passed through1",
        "Applied on the way1",
    ]


def test_a_near_miss_is_drawn_where_it_ended(without_inductor, opened):
    with torch.no_grad():
        rec = fxopt.view(lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6), torch.randn(4, 8))
    (miss,) = rec.misses
    shown = opened(rec)
    assert shown["errors"] == []
    assert miss.reason in shown["details"]
    assert miss.node in shown["lit"]
