"""The comparison of whole models runs, at a tiny size on a CPU, and its table adds up."""

from __future__ import annotations

import pytest

import models


def row(case, contestant, ms=None, failed=""):
    return {"case": case, "contestant": contestant} | ({"failed": failed} if ms is None else {"ms": ms})


def test_the_table_adds_up():
    rows = [
        row("encode A", "inductor, eager", 8.0), row("encode A", "inductor, sdpa", 3.0),
        row("encode A", "fxopt, eager", 2.0), row("encode B", "inductor, eager", 1.0),
        row("encode B", "inductor, sdpa", failed="not offered"), row("encode B", "fxopt, eager", 1.0),
    ]  # fmt: skip
    text = models.table({"device": "a GPU", "torch": "2", "rows": rows})
    assert "| encode A | 8 | 3 | 2 | 1.50 |  |  |" in text
    assert "| encode B | 1 | not offered | 1 | 1.00 |  |  |" in text
    assert "geometric mean 2.000" in text


def test_limits_and_errors_are_in_the_table():
    eager, ours = row("decode A", "eager mode, sdpa", 9.0), row("decode A", "fxopt, reduce-overhead, sdpa", 2.0)
    for found, error in ((eager, 0.02), (ours, 0.03)):
        found |= {"error": error, "weights": 10**9}
    text = models.table({"device": "a GPU", "torch": "2", "bandwidth": 1e12, "rows": [eager, ours]})
    assert "| decode A | 9 | 2 | 4.50 | 1.000 (50%) | 1.50 |" in text


def test_a_model_is_known_by_its_name():
    names = [case.name for case in models.all_cases()]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == {"encode", "decode", "prefill", "llama"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["encode ViT", "decode GPT-2", "prefill Qwen3", "llama decode, 8 layers, B=4"])
def test_it_runs(tmp_path, case):
    pytest.importorskip("transformers")
    report = models.main(
        [str(tmp_path), "--tiny", "--cases", case, "--only", "eager mode", "fxopt, reduce", "fxopt, sdpa"]
    )
    assert {r["contestant"].split(",")[0] for r in report["rows"]} == {"eager mode", "fxopt"}
    for found in report["rows"]:
        assert found["ms"] > 0
        assert found["error"] < 0.05
        assert not found["passed_through"]
    assert (tmp_path / "models.md").read_text() == models.table(report)
