"""What goes to torch's structured trace, as tlparse would read it."""

from __future__ import annotations

import logging

import pytest

from fxopt.view.record import publish, recording
from fxopt.view.report import GraphReport


class Collect(logging.Handler):
    def __init__(self):
        super().__init__()
        self.artifacts = {}
        self.root_dir = "a folder"  # as torch's own handler has where TORCH_TRACE is set

    def emit(self, record):
        if "artifact" in record.metadata:
            self.artifacts[record.metadata["artifact"]["name"]] = record.payload


@pytest.fixture
def trace(monkeypatch):
    handler = Collect()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [handler])
    return handler


def test_artifacts(report, trace):
    publish(report.graphs[0])
    assert set(trace.artifacts) == {
        "fxopt_before",
        "fxopt_after",
        "fxopt_explain",
        "fxopt_generated_attention_causal",
    }
    assert trace.artifacts["fxopt_after"] == report.graphs[0].after
    assert "fused: attention" in trace.artifacts["fxopt_explain"]


def test_names_are_file_names(trace):
    publish(GraphReport("graph 0", generated={"../a b.py": "x"}))
    assert "fxopt_generated__a_b_py" in trace.artifacts


def test_the_trace_listens_like_a_recorder(trace):
    assert recording()


def test_a_handler_without_a_folder_does_not_listen(trace):
    trace.root_dir = None  # as torch's own handler without TORCH_TRACE, before it has removed itself
    assert not recording()
    publish(GraphReport("graph 0"))
    assert not trace.artifacts


def test_a_report_that_cannot_be_told_costs_nothing(trace, monkeypatch, caplog):
    monkeypatch.setattr("fxopt.view.text.explanation", lambda *_: 1 / 0)
    publish(GraphReport("graph 0"))
    assert "could not be written" in caplog.text
