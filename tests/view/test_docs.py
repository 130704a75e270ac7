"""The documentation does what it says: its Python is run, in order, and prints what the page shows."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fxopt.backend
import fxopt.view.show
from fxopt.options import Options
from fxopt.rewrite.plugins import registered, unregister

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "writing-a-fusion.md").read_text(encoding="utf-8")
SEEING = (ROOT / "docs" / "seeing.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
HOW = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page, *kinds):
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return "\n".join(code for kind, code in found if kind in kinds)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """Without Inductor, which takes seconds a graph and is not what the pages are about."""
    monkeypatch.setattr(fxopt.backend, "compile_graph", lambda module, inputs, options: module.forward)
    yield
    for item in registered():
        if item.distribution == "-":  # by a page
            unregister(item.fusion.name)
    torch._dynamo.reset()


def test_tutorial(tmp_path, monkeypatch, capsys):
    # A module in a file, because torch and fxopt read the source of what is defined.
    (tmp_path / "fxopt_tutorial.py").write_text(blocks(TUTORIAL, "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("fxopt_tutorial")
    monkeypatch.delitem(sys.modules, "fxopt_tutorial")
    printed = capsys.readouterr().out
    assert doctest.OutputChecker().check_output(blocks(TUTORIAL, "text"), printed, FLAGS), printed


def test_seeing_page(tmp_path, monkeypatch, capsys):
    (tmp_path / "fxopt_seeing.py").write_text(blocks(SEEING, "python"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.import_module("fxopt_seeing")
    monkeypatch.delitem(sys.modules, "fxopt_seeing")
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "report.json", "report.dot"}
    assert capsys.readouterr().out.count("the check passes with every rewrite") == 2


def summary(name):
    """The first sentence of a public name's docstring, on one line."""
    thing = fxopt.view.show.view if name == "view" else getattr(fxopt, name)
    return " ".join(inspect.getdoc(thing).split("\n\n")[0].split())


def test_every_public_name_is_on_the_api_page_with_its_own_words():
    listed = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", API, re.MULTILINE))
    public = [name for name in fxopt.__all__ if name != "__version__"]
    assert {name: summary(name).replace("|", "\\|") for name in public} == listed
    assert set(fxopt.__all__) <= set(dir(fxopt))


def test_view_section(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(blocks(HOW, "python"), {"torch": torch, "model": torch.nn.LayerNorm(8).eval(), "x": torch.ones(2, 8)})
    assert "layer_norm" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()


def test_files_that_are_named_exist():
    named = set()
    for section in re.split(r"^## ", HOW, flags=re.MULTILINE)[1:]:
        folder = section.split("/", 1)[0]
        for name in re.findall(r"`([\w/]+\.py)`", section):
            path = ROOT / name if "/" in name else ROOT / "fxopt" / folder / name
            assert path.is_file(), name
            named.add(path)
    assert len(named) > 15


def test_options_that_are_named_exist():
    table = HOW.split("## Options")[1]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert {"fusions", "verify", "mode"} <= set(named) <= {field.name for field in dataclasses.fields(Options)}
