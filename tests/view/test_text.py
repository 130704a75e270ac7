"""The table and the explanation, as text."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from fxopt.rewrite.fusion import Verdict
from fxopt.view import text
from fxopt.view.report import GraphReport, Report


def test_table(report, golden):
    golden("table.txt", text.render(report, width=120))


def test_narrow_table_folds_and_loses_nothing(report, golden):
    golden("table_narrow.txt", text.render(report, width=80))


def test_explanation(report, golden):
    golden("explanation.txt", text.explanation(report, ["call to print (toy/model.py:40 in forward: print(x))"]))


def test_empty_report(golden):
    golden("empty.txt", text.render(Report(), width=120))


def test_nothing_fused_is_said():
    assert "nothing to fuse" in text.explanation(Report([GraphReport("graph 0", normalized=True, nodes=3)]))


def test_str_and_rich_show_the_same(report):
    out = io.StringIO()
    Console(file=out, width=120).print(report)
    words = out.getvalue().split()
    assert words == text.render(report, width=120).split()


def test_repr_is_short(report):
    assert repr(report) == f"<Report: {text.summary(report)}>"
    assert "def forward" not in repr(report.graphs[0])


def test_lines_fit_the_width(report):
    for width in (80, 120):
        assert max(len(line) for line in text.render(report, width=width).splitlines()) <= width


def test_markup_and_control_characters_are_data():
    graph = GraphReport("[red]g[/red]", nodes=1, reason="[bold]why[/bold] \x1b[31m :smile: \u202e")
    for shown in (text.render(Report([graph]), width=120), text.explanation(Report([graph]))):
        assert "[bold]why[/bold] \\x1b[31m :smile: \\u202e" in shown
        assert "\x1b" not in shown


def test_sites_that_differ_in_the_layer_are_told_together(make):
    shown = text.explanation(Report([GraphReport("graph 0", normalized=True, sites=[make.site(i) for i in range(30)])]))
    assert "30 times" in shown
    assert "in layers.0.attention ... layers.29.attention" in shown
    assert shown.count("fused: attention") == 1
    assert "error at most 7.75 times" in shown  # the worst of the group


def test_sites_that_differ_in_more_are_told_apart(make):
    sites = [make.site(0), make.site(1, implementation="triton", passed_over=())]
    shown = text.explanation(Report([GraphReport("graph 0", normalized=True, sites=sites)]))
    assert shown.count("fused: attention") == 2


def test_how_an_equal_site_was_checked_does_not_split_a_group(make):
    sites = [make.site(i, verdict=Verdict("equal", f"{i} trials", 0.5)) for i in range(3)]
    assert "3 times" in text.explanation(Report([GraphReport("graph 0", normalized=True, sites=sites)]))
    sites = [make.site(i, verdict=Verdict("unchecked", f"{i} MiB, over the budget")) for i in range(3)]
    shown = text.explanation(Report([GraphReport("graph 0", normalized=True, sites=sites)]))
    assert shown.count("over the budget") == 3


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict("equal", "10 trials", 0.25), "checked: equal, error at most 0.25 times the original's own"),
        (Verdict("meta"), "shapes, dtypes and aliasing checked, numbers not"),
        (Verdict("meta", "error 3", 3.0), "checked: approximate: error 3"),
        (Verdict("unchecked", "over budget"), "not checked numerically: over budget"),
        (Verdict("failed", "0.5 off"), "failed verification: 0.5 off"),
    ],
)
def test_verdict_in_words(verdict, words):
    assert text.verdict(verdict) == words


def test_near_misses_best_first(make):
    rows = text.grouped_misses(
        [make.miss(reason="a", progress=1), make.miss(reason="b", progress=2), make.miss(reason="a", progress=1)]
    )
    assert [(row.reason, row.count) for row in rows] == [("b", 1), ("a", 2)]


def test_table_says_how_many_misses_it_leaves_out(make):
    graph = GraphReport(
        "graph 0", normalized=True, misses=[make.miss(reason=f"reason {i}", anchor=f"softmax_{i}") for i in range(25)]
    )
    assert "Near misses (first 10 of 25)" in text.render(Report([graph]), width=120)
    assert text.explanation(Report([graph])).count("not fused") == 25


def test_nan_is_the_worst_error():
    assert math.isnan(text.worst([Verdict("equal", error=1.0), Verdict("failed", error=math.nan)]))
    assert text.worst([Verdict("meta")]) is None


def test_an_undone_rewrite_is_no_site_and_not_timed(make):
    graph = GraphReport(
        "graph 0", normalized=True, sites=[make.site()], steps=[make.step(), make.step(applied=False, microseconds=1e6)]
    )
    (row,) = text.fused(Report([graph]))
    assert (row.sites, row.seconds) == (1, pytest.approx(850e-6))
    assert "1 rewrite undone" in text.summary(Report([graph]))


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("/usr/lib/site-packages/a/b.py:3 in f: x + 1", "a/b.py:3 in f: x + 1"),
        ("/elsewhere/b.py:3 in f: x: int = 1", "/elsewhere/b.py:3 in f: x: int = 1"),
        ("C:\\m.py:3 in f: x", "C:\\m.py:3 in f: x"),
        ("/a/b.py:3 in torch_dynamo_resume_in_forward_at_2: x", "/a/b.py:3 in forward: x"),
        ("not a source line", "not a source line"),
        (None, "source line unknown"),
    ],
)
def test_short_source(source, short):
    assert text.short_source(source) == short


def test_source_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert text.short_source(f"{tmp_path}/m.py:1 in f: x", code=False) == "m.py:1 in f"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0 us"), (12e-6, "12 us"), (0.0034, "3.4 ms"), (1.254, "1.25 s")])
def test_duration(seconds, shown):
    assert text.duration(seconds) == shown
