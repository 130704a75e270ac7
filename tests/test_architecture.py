"""Data flows one way: a stage imports those before it, and the framework never imports a fusion or a kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fxopt"
STAGES = ["graph", "match", "rewrite", "tune", "lower", "view"]
FILES = [f for stage in STAGES for f in sorted((ROOT / stage).glob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_stage_imports_only_those_before_it(path):
    allowed = STAGES[: STAGES.index(path.parent.name) + 1]
    for name in imported(path):
        if name.startswith("fxopt."):
            assert name.split(".")[1] in {*allowed, "ops", "options", "compat", "cachedir", "sources", "backend"}, name
    if path.name != "explain.py":  # it runs the backend on a model, as a user would
        assert "fxopt.backend" not in imported(path)


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("*.py"))], ids=lambda f: f.name)
def test_the_framework_knows_no_fusion(path):
    for name in imported(path):
        assert not name.startswith(("fxopt.passes", "fxopt.kernels")), name


def test_files_stay_small():
    sources = [*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    assert {f.name: n for f in sources if (n := len(f.read_text().splitlines())) > 500} == {}


def test_no_package_file_where_it_would_shadow_others():
    for folder in ("passes", "kernels"):
        assert not (ROOT.parent / folder / "__init__.py").exists()
        assert (ROOT / folder).is_symlink()
