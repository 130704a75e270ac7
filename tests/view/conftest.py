"""Hand-made reports, and golden files: `pytest tests/view --update-golden` writes what the tests then compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view import record
from fxopt.view.report import GraphReport, Report, Site

FOLDER = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files of tests/view anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): `text` is what the golden file of that name holds."""

    def check(name: str, text: str) -> None:
        path = FOLDER / name
        if request.config.getoption("--update-golden", default=False):
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"no golden file {name}: run pytest tests/view --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(encoding="utf-8")

    return check


@pytest.fixture(autouse=True)
def _no_recorder_left_open() -> None:
    yield
    assert not record._open
    record.forget()


def source(line: int, code: str) -> str:
    return f"/usr/lib/python3/site-packages/toy/model.py:{line} in forward: {code}"


def site(layer: int = 0, **changes: object) -> Site:
    fields = {
        "fusion": "attention",
        "op": "fxopt::attention",
        "implementation": "sdpa",
        "source": source(12, "p = scores.softmax(-1)"),
        "module": f"layers.{layer}.attention",
        "verdict": Verdict("equal", error=0.5 + layer / 4),
        "passed_over": (("triton", "the inputs are on cpu, not on a CUDA device"),),
    }
    return Site(**(fields | changes))


def step(**changes: object) -> Step:
    fields = {
        "fusion": "attention",
        "rule": "attention.py:20",
        "op": "fxopt::attention",
        "replaced": ("matmul", "mul", "softmax", "matmul_1"),
        "made": ("attention",),
        "sources": (source(11, "scores = q @ k.mT * scale"), source(12, "p = scores.softmax(-1)")),
        "module": "layers.0.attention",
        "microseconds": 850.0,
        "verdict": Verdict("equal", error=0.5),
    }
    return Step(**(fields | changes))


def miss(**changes: object) -> NearMiss:
    fields = {
        "fusion": "attention",
        "anchor": "softmax_2",
        "reason": "the softmax runs over dimension 1, not the last",
        "node": "softmax_2",
        "source": source(30, "gate = x.softmax(1)"),
        "progress": 3,
    }
    return NearMiss(**(fields | changes))


@pytest.fixture
def make() -> SimpleNamespace:
    """make.site(layer, **changes), make.step(**changes), make.miss(**changes): parts of a report."""
    return SimpleNamespace(site=site, step=step, miss=miss)


@pytest.fixture
def report() -> Report:
    """One of everything: fused, raised, undone, missed; a graph passed through; generated source."""
    fused = GraphReport(
        name="graph 0",
        before="def forward(self, x):\n    return x.softmax(-1)",
        after="def forward(self, x):\n    return attention(x)",
        normalized=True,
        nodes=42,
        steps=[
            step(),
            step(module="layers.1.attention", microseconds=150.0, verdict=Verdict("equal", error=0.75)),
            step(
                fusion="raise_softmax",
                op="aten::softmax.int",
                microseconds=90.0,
                verdict=Verdict("meta"),
                tags={"dim": -1},
            ),
            step(
                fusion="rms_norm",
                op="fxopt::rms_norm",
                applied=False,
                verdict=Verdict("failed", "element 3 of 16 differs by 0.25", error=1e6),
                sources=(source(20, "x = x * rstd"),),
            ),
        ],
        misses=[
            miss(),
            miss(
                fusion="rms_norm",
                anchor="mean",
                reason="the mean is not over the last dimension",
                node="mean",
                progress=1,
                source=None,
            ),
            miss(anchor="softmax_3", node="softmax_3", source=source(31, "gate = y.softmax(1)")),
        ],
        sites=[site(0), site(1)],
        generated={"attention_causal": "@triton.jit\ndef kernel(): ..."},
        seconds={"retrace": 0.25, "canonicalise": 0.012, "match": 0.00004, "lower": 1.5},
        lowering="inductor, mode=default",
        notes=["one dimension is symbolic"],
    )
    passed = GraphReport(
        name="graph 1",
        nodes=7,
        reason="autocast is on: its casts are invisible to the retrace",
        lowering="inductor, mode=default",
    )
    return Report([fused, passed])
