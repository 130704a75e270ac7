"""A plugin as others write it: made by `fxopt new-pass`, installed into an environment of its own, found and tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from fxopt.cli import run
from fxopt.cli.new_pass import checked, project
from fxopt.rewrite.fusion import name_of

PROJECT = Path(__file__).parents[1] / "plugin_project"


def files(folder):
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in found}


def test_the_project_in_the_tree_is_what_the_command_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["new-pass", "quick_gelu"]) == 0
    assert "written: fxopt-quick-gelu" in capsys.readouterr().out
    assert files(tmp_path / "fxopt-quick-gelu") == files(PROJECT) == project("quick_gelu")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["Soft-Cap"], "use lower-case letters"),
        (["lambda"], "use lower-case letters"),
        (["norm_2d"], "called 'norm2d' in reports"),
        (["norm_"], "called 'norm' in reports"),
        (["a_b"], "called 'ab' in reports"),
        (["rms_norm"], "there is a fusion 'rms_norm' already"),
        (["mine", "--directory", "."], "exists already"),
        (["mine", "--directory", "taken"], "exists already"),
        ([], "missing argument"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert run(["new-pass", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error.lower()
    assert "\n" not in error


@pytest.mark.parametrize("name", ["soft_cap", "norm2d", "qk_norm", "x", "l2"])
def test_the_class_is_called_as_the_project(name):
    (fusion,) = [text for path, text in project(name).items() if path.endswith("fusion.py")]
    assert name_of(re.search(r"class (\w+)\(", fusion)[1]) == checked(name) == name


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the plugin installed, which sees the packages of this one: its interpreter, the project."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PROJECT, folder / "project")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    if not python.is_file():
        pytest.skip("environments are laid out in another way on this system")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = sysconfig.get_path("purelib")
    link = folder / "env" / "lib" / version / "site-packages" / "development.pth"
    link.write_text(f"import site; site.addsitedir({here!r})\n")
    arguments = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", str(folder / "project")]
    pip = [sys.executable, "-m", "pip", "--python", str(python), *arguments]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python, folder / "project"


def call(python, *arguments):
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([python, *arguments], capture_output=True, text=True, env=os.environ | quiet, timeout=500)


@pytest.mark.slow
def test_it_is_found_through_its_entry_point(environment):
    python, _ = environment
    names = "{r.fusion.name: r.distribution for r in registered()}"
    done = call(python, "-c", f"from fxopt.rewrite.plugins import registered; print({names})")
    assert "'quick_gelu': 'fxopt-quick-gelu'" in done.stdout, done.stderr
    assert "'rms_norm': 'fxopt'" in done.stdout


@pytest.mark.slow
def test_it_passes_its_own_tests(environment):
    python, folder = environment
    done = call(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder / "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout


@pytest.mark.slow
def test_the_pytest_plugin_runs_its_conformance(environment):
    python, folder = environment
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder)
    done = call(python, *arguments, "--fxopt-fusion", "quick_gelu")
    assert "9 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    done = call(python, *arguments, "--fxopt-fusion", "quick_gelo")
    assert done.returncode != 0
    assert "no fusion 'quick_gelo' is installed" in done.stdout + done.stderr
