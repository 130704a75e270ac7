"""What two backends' results have in common."""

import pytest
import torch

from fxopt.demo.compare import first_difference, largest_error, tally, tally_text, worst_cosine
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view.report import GraphReport, Report, Site


@pytest.mark.parametrize(
    "ours, theirs, at", [("abc", "abc", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "", None), ("xbc", "abc", 0)]
)
def test_first_difference(ours, theirs, at):
    assert first_difference(list(map(ord, ours)), list(map(ord, theirs))) == at


def _step(fusion, applied):
    verdict = Verdict("equal" if applied else "failed")
    return Step(fusion, "file.py:1", "op", ("a",), ("b",), (), None, 1.0, verdict, applied)


def test_what_was_found_and_undone_is_told_apart():
    site = Site("rms_norm", "rms_norm", "aten", None, None, Verdict("equal"))
    graph = GraphReport("0", normalized=True, sites=[site], steps=[_step("rms_norm", True), _step("rms_norm", False)])
    report = Report([graph, GraphReport("1", reason="autocast")])
    assert [(t.fusion, t.found, t.fused) for t in tally(report)] == [("rms_norm", 2, 1)]
    assert tally_text(report) == "rms_norm 1/2, 1 of 2 graphs untouched"


def test_a_raised_form_that_was_given_back_is_no_site():
    assert tally(Report([GraphReport("0", normalized=True, steps=[_step("raise_softmax", False)])])) == []


def test_nothing_fused():
    assert tally_text(Report()) == "nothing fused"


def test_the_worst_row_counts():
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert worst_cosine(ours, ours) == 1.0
    assert worst_cosine(ours, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == 0.0
    assert largest_error(ours, ours + torch.tensor([0.0, 0.25])) == 0.25
