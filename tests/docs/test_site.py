"""The documentation site: it builds without a warning, fetches nothing, and has a page for everything it promises."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fxopt
import fxopt.view.show
from fxopt.testing import CHECKS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PUBLIC = [name for name in fxopt.__all__ if name != "__version__"]
BUNDLED = re.findall(r'^(\w+) = "fxopt\.passes\.', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)


def thing(name):
    return fxopt.view.show.view if name == "view" else getattr(fxopt, name)


# -- what needs no build


def test_every_public_name_is_in_the_reference_with_its_own_words():
    page = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\([\w.#-]+\) \| (.*) \|$", page, re.MULTILINE))
    first = {name: " ".join(inspect.getdoc(thing(name)).split("\n\n")[0].split()) for name in PUBLIC}
    assert {name: words.replace("|", "\\|") for name, words in first.items()} == listed
    assert set(fxopt.__all__) <= set(dir(fxopt))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_typed_and_documented(name):
    """Parameters and results of functions and methods have types, methods docstrings, and fields a word on each."""
    it = thing(name)
    if not inspect.isclass(it):
        assert_typed(it)
        return
    for key, member in vars(it).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not key.startswith("_") and inspect.isfunction(function):
            assert_typed(function)
            assert inspect.getdoc(function), f"{name}.{key} has no docstring"
    if dataclasses.is_dataclass(it):
        own = {field.name for field in dataclasses.fields(it)} & set(vars(it).get("__annotations__", ()))
        told = set(re.findall(r"^    (\w+): ", inspect.getdoc(it).partition("Attributes:\n")[2], re.MULTILINE))
        assert own == told, f"{name}: fields without a word, or words without a field: {own ^ told}"


def assert_typed(function):
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty, f"{function.__qualname__} has no result type"
    for parameter in signature.parameters.values():
        typed = parameter.annotation is not inspect.Parameter.empty
        assert typed or parameter.name in ("self", "cls"), f"{function.__qualname__}({parameter.name}) has no type"


def test_the_checks_of_the_conformance_kit_are_listed():
    page = (DOCS / "reference" / "testing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(CHECKS)


def test_links_work_where_the_repository_is_read():
    """Each relative link of a page that is in the tree leads to a file in the tree, and each anchor to a heading."""
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    assert len(pages) > 30
    for page in pages:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor and not anchor.startswith("fxopt."):
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {link}"


def slug(heading):
    """As mkdocs and forges make it, so headings that they would treat differently are found missing."""
    assert not re.search(r"\w [^\w\s] \w", heading), f"{heading}: forges make two hyphens of it, mkdocs one"
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_nothing_names_a_machine():
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp/\w|Users)/", page.read_text(encoding="utf-8")), page


def test_measurements_name_fusions_that_exist():
    page = (DOCS / "measurements.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", page.split("\n## By fusion\n")[1].split("\n## ")[0], re.MULTILINE)
    assert len(set(named)) == len(named) > 3
    assert set(named) <= set(BUNDLED)


def test_the_comparison_counts_what_the_table_of_forms_shows():
    lines = (DOCS / "torch-forms.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line)[3:6] for line in lines if re.match(r"^\| \w.*\| (0|1) \|", line)]
    right = [row for row in rows if row[0] == "1"]
    theirs, ours = (sum(row[i] == "1" for row in right) for i in (1, 2))
    words = " ".join((DOCS / "comparison.md").read_text(encoding="utf-8").split())
    assert f"Of {len(right)} forms of attention Inductor (torch 2.13) fuses {theirs} and fxopt {ours}" in words


# -- what needs one


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make setup)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    quiet = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetches(HTMLParser):
    """What a page loads by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.found.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given["href"])


@pytest.mark.slow
def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        for source in parser.found:
            assert not re.match(r"(https?:)?//", source), f"{page.name}: {source}"
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8").replace('"', "").replace("'", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_every_fusion_has_a_page(site, name):
    page = (site / "fusions" / f"{name}.html").read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>", "", page)
    assert "before" in words
    assert "after" in words
    assert words.count("def graph(") >= 2
    for section in ("Before and after", "What is left alone", "Contract", "Measured"):
        assert section in words
    assert str(ROOT) not in page
    assert "0x" not in words  # no object's address


@pytest.mark.slow
def test_every_public_name_has_an_anchor(site):
    made = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    missing = [name for name in PUBLIC if f'id="fxopt.{name}"' not in made]
    assert not missing


@pytest.mark.slow
def test_the_plugin_tutorials_commands_work(tmp_path):
    """Its shell script, on the project that it has made, in an environment of its own."""
    (script,) = re.findall(
        r"^```sh\n(.*?)^```$", (DOCS / "tutorials" / "ship-a-plugin.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    link = tmp_path / "env" / "lib" / version / "site-packages" / "development.pth"
    link.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", encoding="utf-8")
    shutil.copytree(ROOT / "tests" / "plugin_project", tmp_path / "fxopt-quick-gelu")
    quiet = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1"}
    path = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, capture_output=True, text=True, env=os.environ | quiet | path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "11 passed" in done.stdout
    assert "quick_gelu" in done.stdout.splitlines()[-1]
