"""The fuzzer's quick profile (`make fuzz` runs the long one), and that it would find a fault."""

from __future__ import annotations

import pytest

import fuzz
from fuzz_check import Difference, write
from fuzz_program import Case, InputSpec

SEEDS, CASES = range(4), 25


@pytest.mark.parametrize("number", SEEDS)
def test_random_programs(number):
    tally = fuzz.run_batch(number, CASES)
    assert tally["normalised"] >= CASES // 2  # most programs reach what is tested


def test_a_fault_is_found_and_told_as_a_script(monkeypatch, capsys):
    monkeypatch.setattr("fxopt.graph.canonical._is_one", lambda value: isinstance(value, float))
    with pytest.raises(Difference) as caught:
        fuzz.run_batch(0, 100, shrink=False)
    script = str(caught.value).split("\n\n", 1)[1].rsplit("\n\n", 1)[0]
    exec(script.replace("backend='fxopt'", "backend='eager'"), {})
    assert "tensor" in capsys.readouterr().out


def test_the_same_numbers_are_the_same_program():
    case = Case(inputs=(InputSpec((0, 1)),), steps=((2, 1, 0), (3, 9, 9, 60, 9, 3)), returns=(1, 0, 5))
    assert write(case).source == write(case).source
