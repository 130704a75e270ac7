"""Two reports compared: only what a reader would act on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxopt.rewrite.fusion import Verdict
from fxopt.view.diff import differences
from fxopt.view.report import GraphReport, Report


def changed(report, **fields):
    return Report([replace(report.graphs[0], **fields), *report.graphs[1:]])


def test_the_same_report_has_no_difference(report):
    assert differences(report, changed(report, seconds={}, notes=["other"])) == []


def test_a_site_that_went_and_one_that_came(report, make):
    other = changed(report, sites=[make.site(0), make.site(7)])
    lines = differences(report, other)
    assert [line for line in lines if line[0] in "+-"] == [
        "- attention in layers.1.attention, toy/model.py:12 in forward",
        "+ attention in layers.7.attention, toy/model.py:12 in forward",
    ]
    assert [line.translate({43: 45, 45: 43}) for line in differences(other, report)][::-1] == lines


@pytest.mark.parametrize(
    "change, words",
    [({"implementation": "triton"}, "computed by triton, was sdpa"), ({"verdict": Verdict("meta")}, "verdict meta")],
    ids=["implementation", "verdict"],
)
def test_a_site_served_otherwise(change, words, report, make):
    lines = differences(report, changed(report, sites=[make.site(0, **change), make.site(1)]))
    assert len(lines) == 1
    assert words in lines[0]
    assert "layers.0" in lines[0]


def test_near_misses_are_counted(report):
    lines = differences(report, changed(report, misses=report.misses[:1]))
    assert any(line.startswith("- not fused: attention: the softmax runs over dimension 1") for line in lines)
    assert any(line.startswith("- not fused: rms_norm") for line in lines)


def test_a_graph_that_passes_through_no_more(report):
    assert differences(report, Report([report.graphs[0], GraphReport("graph 1", normalized=True)])) == [
        "~ 2 graphs, 2 sites fused (attention 2), 1 graph passed through, 1 rewrite undone, 3 near misses",
        "~ 2 graphs, 2 sites fused (attention 2), 1 rewrite undone, 3 near misses",
        "- passed through: autocast is on: its casts are invisible to the retrace",
    ]
