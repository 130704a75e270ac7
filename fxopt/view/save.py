"""A report as a file: JSON to load again, text to read, or one page that needs no network.

A file appears whole or not at all: it is written beside its place under another name and then moved there.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view import export, text
from fxopt.view.drawing import Drawing, Saving
from fxopt.view.report import GraphReport, Kernel, Part, Site

if TYPE_CHECKING:
    from fxopt.view.report import Report
    from fxopt.view.sheets import Sheets

#: raised whenever a field changes its meaning, so that an old file is refused and not misread
SCHEMA = 2

#: characters of a graph as text, before and after together, that a page has room for (a 32-layer model has a million)
LONGEST = 200_000


def save(report: Report, path: str | os.PathLike[str]) -> Path:
    """Write `report` in the form that the suffix of `path` names. Raises ValueError for an unknown suffix."""
    path = Path(path)
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"can't save a report as {path.name!r}: its suffix must be one of {', '.join(sorted(_FORMS))}")
    write(path, form(report))
    return path


def write(path: Path, content: str) -> None:
    """Put `content` (UTF-8) at `path`, parent folders included; a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content.encode("utf-8", "backslashreplace"))
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data, the schema's version first."""
    from fxopt.view.kernels import kernel_sources

    return {"schema": SCHEMA, "graphs": _plain(list(report.graphs)), "kernels": _plain(kernel_sources(report))}


def from_dict(data: Mapping[str, Any]) -> Report:
    """The report that `to_dict` made. Raises ValueError where `data` isn't one, or of another schema."""
    from fxopt.view.report import Report

    if not isinstance(data, Mapping) or "schema" not in data:
        raise ValueError("this is not an fxopt report: it has no schema version")
    if data["schema"] != SCHEMA:
        raise ValueError(
            f"the report has schema {data['schema']!r}, this version of fxopt reads {SCHEMA}: record it again"
        )
    try:
        kernels = [Kernel(**kernel) for kernel in data["kernels"]] if "kernels" in data else None
        return Report([_graph(graph) for graph in data["graphs"]], kernels)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the report is damaged: {type(error).__name__}: {error}") from error


def load(path: str | os.PathLike[str]) -> Report:
    """The report in a JSON file. Raises ValueError, naming the file, where it isn't one."""
    try:
        return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def page(report: Report) -> str:
    """One self-contained HTML page to step through the rewrites; without scripts it is the report as tables.

    What came from a model is escaped, nothing is fetched, and by the page's own policy no script runs but this one.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from fxopt.view.explain import left
    from fxopt.view.highlight import highlighted
    from fxopt.view.sheets import Sheets

    def asset(name: str) -> Markup:
        return Markup(files("fxopt.view").joinpath("assets", name).read_text(encoding="utf-8").strip())  # our own

    environment = Environment(
        loader=PackageLoader("fxopt.view", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text.clean(value) if type(value) is str else value,
    )
    environment.filters.update(short=text.short_source, verdict=text.verdict, seconds=text.duration, failed=text.failed)
    environment.filters.update(grouped=text.grouped_sites, overall=text.overall)
    environment.filters.update(highlighted=lambda source: highlighted(text.clean(source)))
    script, sheets = asset("page.js"), Sheets(report)
    return environment.get_template("page.html.j2").render(
        report=report,
        summary=text.summary(report),
        fused=text.fused(report),
        raised=text.raised(report),
        misses=text.grouped_misses(report.misses),
        left=left(report),
        sheets=sheets.all(),
        data=Markup(page_data(report, sheets)),
        style=asset("page.css"),
        dagre=asset("dagre.min.js"),
        layout=asset("layout.js"),
        script=script,
        longest=LONGEST,
        digest=Markup(base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()),
    )


def page_data(report: Report, sheets: Sheets | None = None) -> str:
    """The report as the page's script reads it: JSON that is safe inside of a script element.

    What the page has in its tables is left out: the graphs as text, and source, of which each site names its sheets.
    """
    from fxopt.view.sheets import Sheets

    data = to_dict(report)
    data["kernels"] = []
    for graph, known, named in zip(data["graphs"], report.graphs, (sheets or Sheets(report)).of_sites, strict=True):
        graph |= {"before": "", "after": "", "generated": {}, "compiled": ""}
        for site, told, names in zip(graph["sites"], known.sites, named, strict=True):
            site |= {"computed": text.computed(told, known.lowering), "sheets": names}
    encoded = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def frame(report: Report) -> str:
    """The page inside of a sandboxed frame, for notebooks: its style stays within, and it can reach nothing outside."""
    style = "width:100%;height:44rem;border:1px solid #8884;border-radius:6px"
    return f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(page(report))}" style="{style}"></iframe>'


def _json(report: Report) -> str:
    return json.dumps(to_dict(report), separators=(",", ":"), allow_nan=False) + "\n"


_FORMS: dict[str, Callable[[Report], str]] = {
    ".json": _json,
    ".txt": lambda report: text.render(report) + "\n",
    ".html": page,
    ".graphml": lambda report: export.graphml(report),
    ".dot": lambda report: export.dot(report),
}


def _plain(value: Any) -> Any:
    """`value` with nothing in it that JSON can't say: tuples become lists, inf and nan words, the rest its `str`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or type(value) in (bool, int, str):
        return value
    return str(value)


def _graph(data: Mapping[str, Any]) -> GraphReport:
    lists = {
        "steps": [_step(step) for step in data["steps"]],
        "misses": [NearMiss(**miss) for miss in data["misses"]],
        "sites": [_site(site) for site in data["sites"]],
        "seconds": {stage: float(seconds) for stage, seconds in data["seconds"].items()},
        "parts": [_part(part) for part in data["parts"]],
    }
    return GraphReport(**{**data, **lists})


def _part(data: Mapping[str, Any]) -> Part:
    first, last = data["steps"]
    savings = {int(step): Saving(**saving) for step, saving in data["savings"].items()}
    return Part(_drawing(data["before"]), _drawing(data["after"]), (first, last), savings)


def _drawing(data: Mapping[str, Any]) -> Drawing:
    columns = {name: tuple(column) for name, column in data.items()}
    return Drawing(**{**columns, "inputs": tuple(map(tuple, data["inputs"]))})


def _step(data: Mapping[str, Any]) -> Step:
    names = {key: tuple(data[key]) for key in ("replaced", "made", "sources")}
    return Step(**{**data, **names, "verdict": _verdict(data["verdict"]), "microseconds": float(data["microseconds"])})


def _site(data: Mapping[str, Any]) -> Site:
    made = {
        "verdict": _verdict(data["verdict"]),
        "passed_over": tuple((name, objection) for name, objection in data["passed_over"]),
        "arguments": tuple(data.get("arguments", ())),
        "placed": tuple(data.get("placed", ())),
    }
    return Site(**{**data, **made})


def _verdict(data: Mapping[str, Any]) -> Verdict:
    error = data["error"]
    return Verdict(**{**data, "error": None if error is None else float(error)})
