"""`fxopt inspect DIRECTORY`: a model that was saved with its tokenizer, looked at from the command line."""

from __future__ import annotations

from fxopt.cli import run
from fxopt.view.report import Report


def test_a_saved_model(saved_bert, tmp_path, without_inductor):
    html, data = tmp_path / "r.html", tmp_path / "r.json"
    assert run(["inspect", str(saved_bert), "--html", str(html), "--json", str(data)]) == 0
    report = Report.from_json(data)
    assert report.counts()["attention"] == 2
    assert report.kernel_sources
    assert "fxopt" in html.read_text()
