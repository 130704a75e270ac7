"""The OpInfo sweep's subset for CI, and that the sweep would notice a fault.

The subset is every op of op_db once in float32, forward, in-place variants included; ops that fusions begin at or that
canonicalisation knows get five samples, with gradients. The whole sweep's results are in docs/opinfo.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

SCRIPT = Path(__file__).with_name("sweep.py")
SHARDS = 8


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("fxopt_test_sweep", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fxopt_test_sweep"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(1, SHARDS + 1))
def test_every_op(shard, tmp_path):
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(SCRIPT), "run", "--quick", "--shard", f"{shard}/{SHARDS}", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tallies = [json.loads(line)["tally"] for line in out.read_text().splitlines()]
    assert len(tallies) > 80
    assert sum(t.get("ok", 0) for t in tallies) > 80


def test_a_fault_is_fxopts_own(sweep, monkeypatch):
    monkeypatch.setattr("fxopt.graph.canonical._functional_form", lambda node: torch.ops.aten.add.Tensor)
    (op,) = [op for op in sweep.op_db if sweep.key(op) == "mul"]
    with sweep.running.rewritten_always(), sweep.running.lowered_by(aot_eager):
        assert sweep.check(op, "in-place", torch.float32, 2, True)["tally"]["own"] == 2


def test_a_crash_and_an_endless_op_are_told(sweep):
    apart = sweep.running.in_a_fork
    assert apart(lambda: os.kill(os.getpid(), 9), 60) == {"died": "signal 9"}  # 11 would print a traceback
    assert apart(lambda: time.sleep(60), 0.2) == {"died": "no end within 0 s"}
    assert apart(lambda: {"a": 1}, 60) == {"a": 1}


def test_a_run_goes_on_where_it_was_cut_off(sweep, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    assert sweep.main(["run", "--ops", "neg", "--samples", "1", "--out", str(out)]) == 0
    before = out.read_text()
    assert sweep.main(["run", "--ops", "neg", "--samples", "1", "--out", str(out)]) == 0
    assert out.read_text() == before
    sweep.main(["summary", str(out)])
    assert "| neg | 1 ok | 1 ok |" in capsys.readouterr().out


def test_as_near_to_float64_as_eager_is_near_enough(sweep):
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    eager = (exact + 0.02).bfloat16()
    assert sweep.as_near(eager, (exact - 0.03).bfloat16(), exact)
    assert not sweep.as_near(eager, (exact - 0.2).bfloat16(), exact)
    assert not sweep.as_near(eager, torch.full((3,), torch.nan).bfloat16(), exact)
