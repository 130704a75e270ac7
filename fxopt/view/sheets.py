"""The page's sheets of source: each kernel and each piece of generated code once, however many sites it serves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxopt.view import text
from fxopt.view.kernels import kernel_of, kernel_sources
from fxopt.view.report import GraphReport, Kernel, Report, Site


@dataclass(frozen=True)
class Sheet:
    """One piece of source in a page, under an id that its sites name."""

    id: str
    language: str
    title: str
    note: str
    source: str


def sheets(report: Report) -> list[Sheet]:
    """Kernels first, then what stands in the places of ops that were computed otherwise."""
    uses = Counter(sheet for graph in of_sites(report) for site in graph for sheet, _ in site)
    found = []
    for i, kernel in enumerate(kernel_sources(report)):
        note = f"{_lines(kernel.source)}, {_sites(uses[f'kernel-{i}'])}"
        found.append(Sheet(f"kernel-{i}", "Triton", f"{kernel.op}, {kernel.implementation}", note, kernel.source))
    launched = {(site.code, graph.generated.get(site.code)) for graph in report.graphs for site in graph.sites}
    for (name, source), sheet in _code(report).items():
        if uses[sheet] or (name, source) not in launched:  # the call of a kernel is on the kernel's own sheet
            found.append(Sheet(sheet, "Python", name, f"{_lines(source)}, {_sites(uses[sheet])}", source))
    return found


def of_sites(report: Report) -> list[list[list[tuple[str, str]]]]:
    """For each graph, for each site: its sheets as (id, what there is to say of it)."""
    kernels, code = kernel_sources(report), _code(report)
    return [[_of_site(site, graph, kernels, code) for site in graph.sites] for graph in report.graphs]


def _of_site(
    site: Site, graph: GraphReport, kernels: list[Kernel], code: dict[tuple[str, str], str]
) -> list[tuple[str, str]]:
    kernel = kernel_of(site, kernels)
    own = kernel is not None and kernel.implementation == site.implementation
    named = []
    name = site.code or f"{site.op}, {site.implementation}"
    if name in graph.generated and not own:
        named.append((code[name, graph.generated[name]], "what stands in its place"))
    if kernel is not None:
        why = dict(site.passed_over).get(kernel.implementation, "it was not chosen")
        said = "what computes it" if own else f"the op's own kernel, passed over here: {why}"
        named.append((f"kernel-{kernels.index(kernel)}", said))
    return named


def _code(report: Report) -> dict[tuple[str, str], str]:
    """(name, source) of generated code -> the id of its sheet."""
    pairs = dict.fromkeys(pair for graph in report.graphs for pair in graph.generated.items())
    return {pair: f"code-{i}" for i, pair in enumerate(pairs)}


def _lines(source: str) -> str:
    return text.count(len(source.splitlines()), "line")


def _sites(number: int) -> str:
    return text.count(number, "site")
