"""Two reports compared: which sites and near misses came, went, or are served otherwise."""

from __future__ import annotations

from collections import Counter

from fxopt.view import text
from fxopt.view.report import Report, Site


def differences(before: Report, after: Report) -> list[str]:
    """What `after` has and `before` has not ("+") and the other way round ("-"), and what changed ("~"), a line each.

    Sites are told apart by fusion, module and source line, so two reports of one model compare even if its graphs
    were cut in other places. No line: nothing differs that a reader of the reports would act on (times do not count).
    """
    was, now = text.summary(before), text.summary(after)
    lines = [f"~ {was}", f"~ {now}"] if was != now else []
    return [*lines, *_sites(before, after), *_counted(_misses(before), _misses(after)), *_reasons(before, after)]


def _sites(before: Report, after: Report) -> list[str]:
    old, new = _by_place(before), _by_place(after)
    lines = []
    for place in [*old, *(place for place in new if place not in old)]:
        was, now = old.get(place, []), new.get(place, [])
        for a, b in zip(was, now, strict=False):
            if a.implementation != b.implementation:
                lines.append(f"~ {place}: computed by {b.implementation}, was {a.implementation}")
            if a.verdict.status != b.verdict.status:
                lines.append(f"~ {place}: verdict {b.verdict.status}, was {a.verdict.status}")
        lines += [f"- {place}"] * (len(was) - len(now)) + [f"+ {place}"] * (len(now) - len(was))
    return lines


def _by_place(report: Report) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in report.sites:
        place = f"{site.fusion} in {site.module}" if site.module else site.fusion
        found.setdefault(f"{place}, {text.short_source(site.source, code=False)}", []).append(site)
    return found


def _misses(report: Report) -> Counter[str]:
    return Counter(
        f"not fused: {m.fusion}: {m.reason} ({text.short_source(m.source, code=False)})" for m in report.misses
    )


def _reasons(before: Report, after: Report) -> list[str]:
    def passed(report: Report) -> Counter[str]:
        return Counter(f"passed through: {graph.reason}" for graph in report.graphs if not graph.normalized)

    return _counted(passed(before), passed(after))


def _counted(before: Counter[str], after: Counter[str]) -> list[str]:
    def times(sign: str, lines: Counter[str]) -> list[str]:
        return [f"{sign} {line}" + (f", {n} times" if n > 1 else "") for line, n in lines.items()]

    return times("-", before - after) + times("+", after - before)
