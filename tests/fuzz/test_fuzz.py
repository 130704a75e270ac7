"""The fuzzer's quick profile (`make fuzz` runs the long one), and that it would find a fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the fuzzer is a program of several files beside this one

import fuzz
from fuzz_check import Difference, write
from fuzz_program import Case, InputSpec

SEEDS, CASES = range(6), 20


@pytest.mark.parametrize("number", SEEDS)
def test_random_programs(number):
    tally = fuzz.run_batch(number, CASES)
    assert tally["normalised"] >= CASES // 2  # most programs reach what is tested


@pytest.mark.parametrize(
    "where, fault",
    [
        ("fxopt.graph.canonical._is_one", lambda value: value in (1, 2, 0.5)),
        ("fxopt.graph.canonical._same_kind", lambda a, b: a.shape == b.shape),
        ("fxopt.graph.canonical.same_shape", lambda a, b: True),
    ],
)
def test_a_fault_is_found(monkeypatch, where, fault):
    monkeypatch.setattr(where, fault)
    with pytest.raises(Difference):
        fuzz.run_batch(0, 200, shrink=False)


def test_a_difference_comes_with_a_script_that_runs(monkeypatch, capsys):
    monkeypatch.setattr("fxopt.graph.canonical._is_one", lambda value: value in (1, 2, 0.5))
    with pytest.raises(Difference) as caught:
        fuzz.run_batch(0, 200, shrink=False)
    script = str(caught.value).split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    exec(script.replace("backend='fxopt'", "backend='eager'"), {})
    assert "tensor" in capsys.readouterr().out


def test_the_same_numbers_are_the_same_program():
    case = Case(inputs=(InputSpec((0, 1)),), steps=((2, 1, 0), (3, 9, 9, 60, 9, 3)), returns=(1, 0, 5))
    assert write(case).source == write(case).source
