"""A report as a file: JSON to load again, text to read, or one page that needs neither network nor script.

A file appears whole or not at all: it is written beside its place under another name and then moved there.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view import text
from fxopt.view.report import GraphReport, Site

if TYPE_CHECKING:
    from fxopt.view.report import Report

#: raised whenever a field changes its meaning, so that an old file is refused and not misread
SCHEMA = 1


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
    return {"schema": SCHEMA, "graphs": _plain(list(report.graphs))}


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
        return Report([_graph(graph) for graph in data["graphs"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the report is damaged: {type(error).__name__}: {error}") from error


def load(path: str | os.PathLike[str]) -> Report:
    """The report in a JSON file. Raises ValueError, naming the file, where it isn't one."""
    try:
        return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def page(report: Report) -> str:
    """One self-contained HTML page: what came from a model is escaped, nothing is fetched, no script runs."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fxopt.view", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text.clean(value) if type(value) is str else value,
    )
    environment.filters.update(short=text.short_source, verdict=text.verdict, seconds=text.duration, failed=text.failed)
    return environment.get_template("report.html.j2").render(
        report=report,
        summary=text.summary(report),
        fused=text.fused(report),
        raised=text.raised(report),
        misses=text.grouped_misses(report.misses),
        generated=any(graph.generated for graph in report.graphs),
    )


def frame(report: Report) -> str:
    """The page inside of a sandboxed frame, for notebooks: its style stays within, and it can reach nothing outside."""
    return f'<iframe sandbox="" srcdoc="{html.escape(page(report))}" style="width:100%;height:40rem;border:0"></iframe>'


def _json(report: Report) -> str:
    return json.dumps(to_dict(report), indent=1, allow_nan=False) + "\n"


_FORMS: dict[str, Callable[[Report], str]] = {
    ".json": _json,
    ".txt": lambda report: text.render(report) + "\n",
    ".html": page,
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
    }
    return GraphReport(**{**data, **lists})


def _step(data: Mapping[str, Any]) -> Step:
    names = {key: tuple(data[key]) for key in ("replaced", "made", "sources")}
    return Step(**{**data, **names, "verdict": _verdict(data["verdict"]), "microseconds": float(data["microseconds"])})


def _site(data: Mapping[str, Any]) -> Site:
    passed_over = tuple((name, objection) for name, objection in data["passed_over"])
    return Site(**{**data, "verdict": _verdict(data["verdict"]), "passed_over": passed_over})


def _verdict(data: Mapping[str, Any]) -> Verdict:
    error = data["error"]
    return Verdict(**{**data, "error": None if error is None else float(error)})
