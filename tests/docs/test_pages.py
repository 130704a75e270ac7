"""The documentation does what it says: its code is run, in order, and prints what the page shows."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import fxopt.backend
from fxopt.rewrite.plugins import registered, unregister
from fxopt.testing import CHECKS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
STAGES = sorted((DOCS / "how-it-works").glob("*.md"))
INCLUDED = re.compile(r'--8<-- "[\w./-]+"\n')
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(path, *kinds):
    """(kind, code) of a page's blocks of code; what is included of other files is tested there."""
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(kind, code) for kind, code in found if kind in kinds or not kinds if not INCLUDED.fullmatch(code)]


def matches(want, got):
    return doctest.OutputChecker().check_output(want, got, FLAGS)


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    """Without Inductor, which takes seconds a graph and is not what the pages are about; in an empty folder."""
    monkeypatch.setattr(fxopt.backend, "compile_graph", lambda module, inputs, options: module.forward)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch._dynamo.reset()
    yield
    for item in registered():
        if item.distribution == "-":  # by a page
            unregister(item.fusion.name)
    torch._dynamo.reset()


END = "-- end of a block --"


@pytest.fixture
def execute(tmp_path, monkeypatch, capsys):
    """Run a page as a module in a file (torch and fxopt read the source of what is defined): the module, and what each
    block of code printed beside what the page shows of it."""

    def execute(path):
        code, shown = [], []
        for kind, block in blocks(path):
            if kind == "text" and code:
                shown[-1] = block
            elif kind in ("python", "console"):
                command, _, output = block.partition("\n")
                code.append(f"{block if kind == 'python' else called(command)}\nprint({END!r})\n")
                shown.append(output if kind == "console" else None)
        name = f"fxopt_page_{path.stem.replace('-', '_')}"
        (tmp_path / f"{name}.py").write_text("\n".join(code), encoding="utf-8")
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)
        printed = capsys.readouterr().out.split(f"{END}\n")
        return module, list(zip(shown, printed[:-1], strict=True))

    return execute


def called(command):
    """A command line of fxopt, as Python."""
    assert command.startswith("$ fxopt ")
    return f"import fxopt.cli\nassert fxopt.cli.run({shlex.split(command)[2:]}) in (0, 1)"


@pytest.mark.parametrize("path", [p for p in [*TUTORIALS, *STAGES] if blocks(p, "python")], ids=lambda p: p.stem)
def test_code(path, execute):
    if path.stem == "write-a-kernel" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the page runs its kernel under Triton's interpreter")
    module, outputs = execute(path)
    for shown, printed in outputs:
        assert shown is None or matches(shown, printed), printed
    for name, test in dict(vars(module)).items():
        if name.startswith("test_"):  # what the page says to put in a test file
            for what in CHECKS:
                test(what)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_holds_no_code_that_is_not_run(path):
    """Besides Python, its output and commands of fxopt only files that are included, and the plugin's shell script."""
    allowed = {"python", "text", "console"} | ({"sh"} if path.stem == "ship-a-plugin" else set())
    kinds = {kind for kind, _ in blocks(path)}
    assert "python" in kinds
    assert kinds <= allowed


def test_seeing_page(tmp_path, execute):
    _, outputs = execute(DOCS / "seeing.md")
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "report.json", "report.dot"}
    assert "".join(printed for _, printed in outputs).count("the check passes with every rewrite") == 2


@pytest.mark.parametrize("path", [p for p in STAGES if p.stem != "index"], ids=lambda p: p.stem)
def test_files_that_are_named_exist(path):
    page = path.read_text(encoding="utf-8")
    folders = re.findall(r"`([\w/]+/)`", re.search(r"^Code: .*$", page, re.MULTILINE)[0])
    assert folders
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", page):
        assert any((ROOT / folder / name).exists() for folder in ["", *folders]), name
