"""The notebooks in examples/: they run, say what they promise, and are shown as notebooks show them."""

from __future__ import annotations

import html
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

#: what must be among the outputs
SAID = {
    "1_see_a_rewritten_llama": ["attention", "largest difference", "llama.html", "kernels/attention_0.py"],
    "2_a_fusion_in_20_lines": ["fused: soft_cap -> soft_cap", "where cap is the number 20.0", "undone: wrongly"],
    "3_why_did_it_not_fuse": [
        "have it fused: don't return softmax",
        "have it fused: call model.eval()",
        "1 site fused (attention 1)",
        "the softmax is over dimension 2",
        "graph break",
    ],
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """executed(path): the notebook with its outputs; each is run once."""
    nbformat = pytest.importorskip(
        "nbformat", reason="needs nbformat (pip install -c constraints.txt nbclient ipykernel)"
    )
    nbclient = pytest.importorskip(
        "nbclient", reason="needs nbclient (pip install -c constraints.txt nbclient ipykernel)"
    )
    done = {}

    def run(path):
        if path not in done:
            notebook = nbformat.read(path, as_version=4)
            folder = tmp_path_factory.mktemp("notebook")
            nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
            done[path] = notebook
        return done[path]

    return run


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook):
    """The notebook as a page: sources as text, outputs as notebooks put them in, markup included."""
    parts = []
    for cell in notebook.cells:
        parts.append(f"<pre>{html.escape(cell.source)}</pre>")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            plain = output.get("text", data.get("text/plain", ""))
            parts.append(data.get("text/html") or f"<pre>{html.escape(plain)}</pre>")
    return "<!doctype html><meta charset=utf-8><title>notebook</title>" + "\n".join(parts)


def test_every_notebook_is_here():
    assert [path.stem for path in NOTEBOOKS] == list(SAID)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    data = json.loads(path.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in data["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, executed):
    notebook = executed(path)
    text = "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook)
    )
    for words in SAID[path.stem]:
        assert words in text, words


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_pages_open_in_a_browser(path, executed, tmp_path):
    spec = importlib.util.spec_from_file_location("browser", ROOT / "tests" / "view" / "browser.py")
    browsing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(browsing)
    with browsing.browser() as started:
        page = started.new_context(offline=True, viewport={"width": 1100, "height": 900}).new_page()
        errors, requests = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        file = tmp_path / "notebook.html"
        file.write_text(shown(executed(path)), encoding="utf-8")
        page.goto(file.as_uri())
        assert page.locator("iframe[sandbox=allow-scripts]").count() == 1
        inner = page.frame_locator("iframe")
        inner.locator("g.node").first.wait_for()
        inner.locator("#list .row").first.click()
        assert inner.locator("#details h2").inner_text()
        if path.stem.startswith("1"):  # a rewrite, and not a near miss: what it replaced, from which line, by what
            inner.locator("g.old").first.wait_for()
            details = inner.locator("#details").inner_text()
            assert "transformers/models/llama/modeling_llama.py:" in details
            assert "nodes replaced" in details
            assert inner.locator("#details .sheet pre").count() >= 1
        page.screenshot(path=tmp_path / "notebook.png", full_page=True)
    assert errors == []
    assert [url for url in requests if not url.startswith(("blob:", "data:", "about:"))] == [file.as_uri()]
