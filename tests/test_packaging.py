"""What is installed and shipped: one package, both entry-point groups, and the README's example."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ("view/assets", "cli/templates", "tune/tables")


def _points(group):
    return [point for point in entry_points(group=group) if point.dist is not None and point.dist.name == "fxopt"]


@pytest.mark.parametrize("group", ["torch_dynamo_backends", "fxopt.passes", "console_scripts"])
def test_entry_points_load(group):
    points = _points(group)
    assert points, f"the installed fxopt has no entry points in {group}: install it again (make setup)"
    for point in points:
        assert callable(point.load())


def test_every_fusion_in_passes_is_an_entry_point():
    classes = {
        f"fxopt.passes.{path.stem}:{name}"
        for path in (ROOT / "passes").glob("[!_]*.py")
        for name in re.findall(r"^class ((?:Fuse|Raise)\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    listed = re.findall(r'"(fxopt\.passes\.\w+:\w+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(listed) == classes


def test_top_level_folders_are_no_packages():
    for name in ("passes", "kernels"):
        assert not (ROOT / name / "__init__.py").exists()  # it would hide the package `kernels` of Hugging Face
        assert (ROOT / "fxopt" / name).resolve() == ROOT / name


def test_the_readmes_example_is_the_file_that_runs():
    example = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    code = example[example.index("import torch") :]
    assert f"```python\n{code}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    done = subprocess.run([sys.executable, ROOT / "examples" / "quickstart.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 site fused (attention 1)" in done.stdout


@pytest.mark.slow
def test_wheel_through_sdist_holds_one_package(tmp_path):
    """Built as for the package index: from an sdist made of the tracked files, with the installed build tools."""
    _copy_of_the_tree(tmp_path / "tree")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "tree")]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fxopt"}
    for folder in ("passes", "kernels"):
        sources = {f"fxopt/{folder}/{path.name}" for path in (tmp_path / "tree" / folder).glob("*.py")}
        assert sources
        assert sources <= set(names)
    assert len(names) == len(set(names))
    data = {f"fxopt/{f.relative_to(ROOT / 'fxopt')}" for folder in DATA for f in _data(folder)}
    assert len(data) > 10
    assert data <= set(names)
    for line in ("fxopt = fxopt.backend:fxopt", "fxopt = fxopt.cli:main", "attention = fxopt.passes.attention:"):
        assert line in points
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "passes/attention.py", "kernels/attention.py"} <= shipped


def _data(folder):
    return {path for path in (ROOT / "fxopt" / folder).iterdir() if path.is_file()}


def _copy_of_the_tree(target):
    names = ("fxopt", "passes", "kernels", "tests", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
    ignore = shutil.ignore_patterns("__pycache__")
    target.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, target / name)
