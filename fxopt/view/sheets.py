"""The page's sheets of source: each kernel and each piece of generated code once, however many sites it serves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fxopt.view import inductor, text
from fxopt.view.kernels import kernel_of, kernel_sources
from fxopt.view.report import GraphReport, Report, Site

#: characters of one graph's output code that a page has room for (without layers that repeat, 32 have two millions)
LONGEST = 200_000


@dataclass(frozen=True)
class Sheet:
    """One piece of source in a page, under an id that its sites name."""

    id: str
    language: str
    title: str
    source: str
    sites: int = 0

    @property
    def note(self) -> str:
        """Its size, and how many sites name it."""
        lines = text.count(len(self.source.splitlines()), "line")
        return f"{lines}, {text.count(self.sites, 'site')}" if self.sites else lines


class Sheets:
    """The sheets of a report, and which of them each site names."""

    def __init__(self, report: Report) -> None:
        self._kernels = kernel_sources(report)
        self._known: dict[tuple[str, str], Sheet] = {}
        #: for each graph, for each site: (id, what there is to say of that sheet)
        self.of_sites = [self._of_graph(graph) for graph in report.graphs]
        launched = {(site.code, graph.generated.get(site.code)) for graph in report.graphs for site in graph.sites}
        for pair in (pair for graph in report.graphs for pair in graph.generated.items()):
            if pair not in launched:  # the call of a kernel is on the kernel's own sheet
                self._sheet("Python", *pair)

    def all(self) -> list[Sheet]:
        """Every sheet, in the order in which sites name them."""
        uses = Counter(id for graph in self.of_sites for site in graph for id, _ in site)
        return [Sheet(s.id, s.language, s.title, s.source, uses[s.id]) for s in self._known.values()]

    def _of_graph(self, graph: GraphReport) -> list[list[tuple[str, str]]]:
        found = inductor.kernels(graph.compiled)
        holding = {site.node: inductor.holding(site.placed, found) for site in graph.sites}
        # A layer that is compiled once for all is written with the names of one of them.
        alike = {site.code: kernels for site in reversed(graph.sites) if (kernels := holding[site.node])}
        return [self._of_site(site, graph, holding[site.node] or alike.get(site.code, [])) for site in graph.sites]

    def _of_site(self, site: Site, graph: GraphReport, compiled: list[inductor.Compiled]) -> list[tuple[str, str]]:
        kernel = kernel_of(site, self._kernels)
        own = kernel is not None and kernel.implementation == site.implementation
        named = []
        if not own:
            for made in compiled:
                what = "Inductor's kernel, in which its nodes and their neighbours are"
                named.append((self._sheet("Triton", made.name, made.source), what))
            name = site.code or f"{site.op}, {site.implementation}"
            if name in graph.generated:
                named.append((self._sheet("Python", name, graph.generated[name]), "what stands in its place"))
        if kernel is not None:
            why = dict(site.passed_over).get(kernel.implementation, "it was not chosen")
            said = "what computes it" if own else f"the op's own kernel, passed over here: {why}"
            named.append((self._sheet("Triton", f"{kernel.op}, {kernel.implementation}", kernel.source), said))
        if not own and not compiled and 0 < len(graph.compiled) <= LONGEST:
            title = f"Inductor's output code, {graph.name}"
            named.append(
                (self._sheet("Inductor", title, graph.compiled), "the whole, in which its nodes are somewhere")
            )
        return named

    def _sheet(self, language: str, title: str, source: str) -> str:
        """The id of the sheet of that title and source."""
        key = title, source
        self._known.setdefault(key, Sheet(f"sheet-{len(self._known)}", language, title, source))
        return self._known[key].id
