"""The benchmark of attention runs, at sizes that a CPU can do, and its contestants agree."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("fxopt_benchmark_attention", FOLDER / "attention.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_contestants_agree(benchmark, triton_device, tmp_path):
    contestants = ["SDPA", "SDPA flash", "Flex", "fxopt Triton", "fxopt Triton, opaque mask", "fxopt Triton, bound"]
    report = benchmark.main([str(tmp_path), "--tiny", "--only", *contestants])
    assert {row["case"].split(",")[0] for row in report["rows"]} == {
        "plain", "softcap", "ALiBi", "T5 bias", "T5 encoder", "BLOOM", "window 16", "8 documents", "sink", "decode",
        "static cache",
    }  # fmt: skip
    assert all("ms" in row and row["error"] < 1e-5 for row in report["rows"]), report["rows"]
    assert json.loads((tmp_path / "attention.json").read_text()) == report
    assert "| softcap, causal | 1, 4, 2, 64, 16 |" in (tmp_path / "attention.md").read_text()


def test_models_code_is_compiled(benchmark, tmp_path, without_inductor):
    report = benchmark.main([str(tmp_path), "--tiny", "--cases", "variants window", "--only", "fxopt", "Flex"])
    rows = {row["contestant"]: row for row in report["rows"]}
    assert rows["fxopt"]["implementations"] == ["sdpa"]
    assert "geometric mean" in (tmp_path / "attention.md").read_text()


def test_what_there_is_no_time_for_is_said(benchmark, tmp_path):
    report = benchmark.main([str(tmp_path), "--tiny", "--cases", "variants", "--seconds", "0"])
    assert {row.get("skipped") for row in report["rows"]} == {"no time left"}
    assert "no time left" in (tmp_path / "attention.md").read_text()
