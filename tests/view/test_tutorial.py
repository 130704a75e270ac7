"""docs/writing-a-fusion.md does what it says: its Python is run, in order, and prints what the page shows."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import fxopt.backend
from fxopt.rewrite.plugins import unregister

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-fusion.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def clean(monkeypatch):
    """Without Inductor, which takes seconds a graph and is not what the page is about."""
    monkeypatch.setattr(fxopt.backend, "compile_graph", lambda module, inputs, options: module.forward)
    yield
    unregister("soft_cap")
    unregister("swiglu")
    torch._dynamo.reset()


def test_page(clean, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    program = "\n".join(code for kind, code in blocks if kind == "python")
    shown = "".join(text for kind, text in blocks if kind == "text")
    # A module in a file, because torch and fxopt read the source of what is defined.
    (tmp_path / "fxopt_tutorial.py").write_text(program, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("fxopt_tutorial")
    monkeypatch.delitem(sys.modules, "fxopt_tutorial")
    printed = capsys.readouterr().out
    assert len(blocks) > 8
    assert doctest.OutputChecker().check_output(shown, printed, FLAGS), printed
