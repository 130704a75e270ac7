"""A report in words: one summary line, a table for terminals, and a longer explanation, site by site.

Everything here is a pure function of the report. What came from a model (source lines, names, reasons) is data: it is
never read as markup, and control characters in it are shown, not sent to the terminal.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view.report import GraphReport, Site

if TYPE_CHECKING:
    from fxopt.view.report import Report

#: near misses that the table shows; the saved forms show all
TOP_MISSES = 10

_PLAIN = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)  # one rule under the heading, ASCII only


# -- words ---------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """`text` with control characters (but newline and tab) and lone surrogates written as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def count(number: int, noun: str) -> str:
    """ "1 site", "2 sites", "no sites"; a noun in -s or -x takes -es."""
    plural = noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")
    return f"{number or 'no'} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it: "12 us", "3.4 ms", "1.25 s"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def verdict(verdict: Verdict) -> str:
    """What verification found, in words."""
    if verdict.status == "equal":
        bound = "" if verdict.error is None else f", error at most {_error(verdict.error)} times the original's own"
        return f"checked: equal{bound}"
    words = {
        "meta": "shapes, dtypes and aliasing checked, numbers not" if verdict.error is None else "checked: approximate",
        "unchecked": "not checked numerically",
        "failed": "failed verification",
    }.get(verdict.status, verdict.status)
    return f"{words}: {verdict.detail}" if verdict.detail else words


def computed(site: Site, lowering: str) -> str:
    """Who computes a site, in words; `lowering` is its graph's."""
    if site.opaque or site.implementation == "triton":
        return f"One call of the op's own kernel ({site.implementation}), which the compiler doesn't look into."
    if site.implementation.startswith("sdpa"):
        return "PyTorch's scaled_dot_product_attention, by kernels of its own: none was generated for this site."
    if site.implementation == "aten":
        return "An op of ATen's that does the same: no kernel was generated for this site."
    behind = (
        "which Inductor compiles together with their neighbours, into kernels of its own"
        if lowering.startswith("inductor")
        else "which run one by one"
    )
    if site.implementation == "reference":
        return f"The op's reference, the unfused arithmetic: nodes of the graph, {behind}."
    return f"Spelled out again, as nodes of the graph, {behind}."


_SOURCE = re.compile(r"(?P<file>.+?):(?P<line>\d+) in (?P<function>\S+)(?:: (?P<code>.*))?", re.DOTALL)

_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+")  # Dynamo's name for the rest of a function after a break


def short_source(source: str | None, code: bool = True) -> str:
    """A source line with its path cut to what the reader needs: below the working directory, or inside a package."""
    if not source:
        return "source line unknown"
    found = _SOURCE.fullmatch(source)
    if found is None:
        return source
    function = _RESUMED.sub(r"\1", found["function"])
    place = f"{short_path(found['file'])}:{found['line']} in {function}"
    return f"{place}: {found['code']}" if code and found["code"] else place


def short_path(path: str) -> str:
    """`path` relative to its package's folder or to the working directory, if it lies there."""
    for packages in ("site-packages/", "dist-packages/"):
        if packages in path:
            return path.rsplit(packages, 1)[1]
    try:
        return str(Path(path).relative_to(os.getcwd()))
    except (ValueError, OSError):
        return path


# -- groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """One fusion's row: its sites by implementation and verdict, its worst error and the time it took."""

    fusion: str
    sites: int
    implementations: dict[str, int]
    verdicts: dict[str, int]
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Missed:
    """Near misses of one fusion for one reason."""

    fusion: str
    reason: str
    count: int
    progress: int
    source: str | None  # of the first
    node: str | None  # of the first
    hint: str | None = None  # what would make it fuse, of the first
    share: float = 1.0  # how much of what the fusion looks for is there, at most


def fused(report: Report) -> list[Fused]:
    """A row for each fusion that has sites, most sites first."""
    rows = []
    steps = [step for step in report.steps if step.applied]
    for fusion, number in Counter(site.fusion for site in report.sites).items():
        sites = [site for site in report.sites if site.fusion == fusion]
        own = [step for step in steps if step.fusion == fusion]
        rows.append(
            Fused(
                fusion,
                number,
                _counted(site.implementation for site in sites),
                _counted(site.verdict.status for site in sites),
                worst([site.verdict for site in sites] + [step.verdict for step in own]),
                sum(step.microseconds for step in own) / 1e6,
            )
        )
    return sorted(rows, key=lambda row: (-row.sites, row.fusion))


def raised(report: Report) -> dict[str, int]:
    """Rule -> applications, for what was applied and left no site of its own: raising rules, and inner fusions."""
    sites = {site.fusion for site in report.sites}
    return _counted(step.fusion for step in report.steps if step.applied and step.fusion not in sites)


def undone(report: Report) -> list[Step]:
    """The applications that failed verification and were undone (not the raised forms that nothing fused)."""
    return [step for step in report.steps if failed(step)]


def failed(step: Step) -> bool:
    """Whether the application was undone because it failed, or (at verify="strict") could not be checked."""
    # A raised form that nothing consumed gets its original nodes back: that is how raising works, not a failure.
    return not step.applied and "nothing fused the result" not in step.verdict.detail


def grouped_sites(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that differ only in the module that they are in (layers), together; in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        key = (
            site.fusion,
            site.op,
            site.implementation,
            site.source,
            site.verdict.status,
            "" if site.verdict.status == "equal" else site.verdict.detail,  # that says how it was tried
            site.passed_over,
        )
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def overall(sites: Sequence[Site]) -> str:
    """The verdict on sites that `grouped_sites` put together, in words: the worst error of all."""
    first = sites[0].verdict
    return verdict(Verdict(first.status, first.detail, worst(site.verdict for site in sites)))


def grouped_misses(misses: Iterable[NearMiss]) -> list[Missed]:
    """Near misses by (fusion, reason), the farthest first, then the most frequent."""
    groups: dict[tuple[str, str], list[NearMiss]] = {}
    for miss in misses:
        groups.setdefault((miss.fusion, miss.reason), []).append(miss)
    rows = [
        Missed(
            fusion,
            reason,
            len(group),
            max(m.progress for m in group),
            first.source,
            first.node,
            first.hint,
            max(m.share for m in group),
        )
        for (fusion, reason), group in groups.items()
        for first in group[:1]
    ]
    return sorted(rows, key=lambda row: (-row.share, -row.progress, -row.count, row.fusion, row.reason))


def nearest(misses: Iterable[NearMiss]) -> list[NearMiss]:
    """Of the near misses that began at one node, that which got nearest: a site is one thing or another."""
    best: dict[str, NearMiss] = {}
    for miss in misses:
        known = best.get(miss.anchor)
        if known is None or (miss.share, miss.progress) > (known.share, known.progress):
            best[miss.anchor] = miss
    return list(best.values())


def worst(verdicts: Iterable[Verdict]) -> float | None:
    """The largest error of those compared numerically; a NaN is worse than any number."""
    errors = [v.error for v in verdicts if v.error is not None]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors, default=None)


# -- the table -----------------------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """One line: how many sites in how many graphs, and what did not work."""
    counts = ", ".join(f"{name} {number}" for name, number in sorted(report.counts().items()))
    parts = [
        count(len(report.graphs), "graph"),
        count(len(report.sites), "site") + " fused" + (f" ({counts})" if counts else ""),
    ]
    passed = sum(not graph.normalized for graph in report.graphs)
    if passed:
        parts.append(f"{count(passed, 'graph')} passed through")
    if undone(report):
        parts.append(f"{count(len(undone(report)), 'rewrite')} undone")
    if report.misses:
        parts.append(count(len(report.misses), "near miss"))
    return ", ".join(parts)


def render(report: Report, width: int | None = None) -> str:
    """The table as plain text, `width` columns wide (the terminal's width if not given, 120 where there is none)."""
    width = width or max(80, shutil.get_terminal_size(fallback=(120, 24)).columns)
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=False, force_jupyter=False, color_system=None, legacy_windows=False
    )
    console.print(table(report), markup=False, highlight=False, emoji=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def table(report: Report) -> RenderableType:
    """The table for a rich console."""
    parts: list[RenderableType] = [_text(summary(report), "bold")]
    if rows := fused(report):
        parts.append(
            _table(
                "Fused",
                ("fusion", "sites", "implementation", "verdict", "worst error", "time"),
                [
                    (
                        r.fusion,
                        str(r.sites),
                        _list(r.implementations),
                        _list(r.verdicts),
                        _error(r.error) + ("x" if r.error is not None else ""),
                        duration(r.seconds),
                    )
                    for r in rows
                ],
                right=(1, 4, 5),
            )
        )
    if raised(report):
        parts.append(_text(f"\nApplied on the way: {_list(raised(report))}"))
    if steps := undone(report):
        parts.append(
            _table(
                "Undone",
                ("fusion", "why", "first source line"),
                [(s.fusion, verdict(s.verdict), short_source(next(iter(s.sources), None), code=False)) for s in steps],
            )
        )
    if graphs := [graph for graph in report.graphs if graph.normalized and graph.turned_away]:
        parts.append(_text("\n" + "\n".join(f"{g.name} was {taken_up(g)}" for g in graphs)))
    if graphs := [graph for graph in report.graphs if not graph.normalized]:
        parts.append(
            _table(
                "Passed through",
                ("graph", "nodes", "why"),
                [(g.name, str(g.nodes), g.reason or "no reason was given") for g in graphs],
                right=(1,),
            )
        )
    if misses := grouped_misses(report.misses):
        more = f" (first {TOP_MISSES} of {len(misses)})" if len(misses) > TOP_MISSES else ""
        parts.append(
            _table(
                f"Near misses{more}",
                ("fusion", "times", "why", "first source line"),
                [(m.fusion, str(m.count), m.reason, short_source(m.source, code=False)) for m in misses[:TOP_MISSES]],
                right=(1,),
            )
        )
    if stages := stage_seconds(report):
        parts.append(_text("\nTime: " + ", ".join(f"{stage} {duration(s)}" for stage, s in stages.items())))
    return Group(*parts)


def taken_up(graph: GraphReport) -> str:
    """Where a graph was rewritten that could not be at the usual place, and why it couldn't."""
    return f"rewritten {graph.entry} (turned away by the first entry: {graph.turned_away})"


def stage_seconds(report: Report) -> dict[str, float]:
    """Stage -> seconds over all graphs, in the order in which the stages ran."""
    total: dict[str, float] = {}
    for graph in report.graphs:
        for stage, seconds in graph.seconds.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> RenderableType:
    made = Table(box=_PLAIN, pad_edge=False, show_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(_text, row))
    return Group(_text(f"\n{title}", "bold"), made)


def _text(words: str, style: str = "") -> Text:
    return Text(clean(words), style=style)


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _list(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.3g}"


# -- the explanation -----------------------------------------------------------------------------------------------


def explanation(report: Report, breaks: Sequence[str] = (), left: Sequence[str] = ()) -> str:
    """What fused and what did not, site by site, without times: the same model gives the same text.

    `breaks` and `left` are lines on graph breaks, and on ops that no fusion nearly took.
    """
    lines = [summary(report) + (f", {count(len(breaks), 'graph break')}" if breaks else "")]
    for graph in report.graphs:
        lines += ["", *_graph(graph)]
    if left:
        lines += ["", "left as they are", *(f"  {line}" for line in left)]
    if breaks:
        lines += ["", "graph breaks (fxopt sees each piece by itself)", *(f"  {line}" for line in breaks)]
    return clean("\n".join(lines))


def _graph(graph: GraphReport) -> list[str]:
    head = f"{graph.name}: {count(graph.nodes, 'node')}"
    if not graph.normalized:
        why = graph.reason or "no reason was given"
        return [f"{head}, passed through untouched", f"  {why}", *(f"  note: {note}" for note in graph.notes)]
    lines = [head + (f", compiled by {graph.lowering}" if graph.lowering else "")]
    lines += _sites(graph.sites)
    lines += [f"  undone: {s.fusion}: {verdict(s.verdict)}\n    {_first(s.sources)}" for s in graph.steps if failed(s)]
    lines += _misses(graph.misses)
    lines += [f"  compiled once, called {calls} times: {body}" for body, calls in graph.outlined.items()]
    lines += [f"  note: {note}" for note in graph.notes]
    if len(lines) == 1:
        lines.append("  nothing to fuse: no fusion matched here, and none nearly did")
    if graph.turned_away:
        lines.insert(1, f"  {taken_up(graph)}")
    return lines


def _sites(sites: Iterable[Site]) -> list[str]:
    lines = []
    for group in grouped_sites(sites):
        first, last = group[0], group[-1]
        times = f", {len(group)} times" if len(group) > 1 else ""
        lines.append(f"  fused: {first.fusion} -> {first.op}, computed by {first.implementation}{times}")
        lines.append(f"    at {short_source(first.source)}")
        if first.module:
            lines.append(f"    in {first.module}" + (f" ... {last.module}" if last.module != first.module else ""))
        lines.append("    " + overall(group))
        lines += [f"    not by {name}: {objection}" for name, objection in first.passed_over]
    return lines


def _misses(misses: Iterable[NearMiss]) -> list[str]:
    lines = []
    for miss in grouped_misses(nearest(misses)):
        first = f" (the first of {miss.count})" if miss.count > 1 else ""
        lines.append(f"  not fused: {miss.fusion}: {miss.reason}")
        lines.append(f"    at node {miss.node}, {short_source(miss.source)}{first}")
        if miss.hint:
            lines.append(f"    to have it fused: {miss.hint}")
    return lines


def _first(sources: Sequence[str]) -> str:
    return "at " + short_source(next(iter(sources), None))
