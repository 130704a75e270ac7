"""What happened while a model was compiled, as plain data: it outlives the graphs and can be saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict


@dataclass(frozen=True)
class Site:
    """One place in a model where a fused op took over.

    implementation: "sdpa" | "triton" | "aten" | "decomposed" | "reference" (the unfused arithmetic under a new name)
    passed_over: (implementation, objection) of those that came before it
    """

    fusion: str
    op: str
    implementation: str
    source: str | None
    module: str | None
    verdict: Verdict
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass
class GraphReport:
    """One graph that Dynamo captured: before, steps, near misses, after.

    normalized: False if the graph went to the lowering stage untouched; `reason` then says why
    seconds: time of each stage ("retrace", "canonicalise", "match", "rewrite", "verify", "lower")
    generated: name -> source of code generated for this graph
    """

    name: str
    before: str = ""
    after: str = ""
    normalized: bool = False
    reason: str | None = None
    nodes: int = 0
    steps: list[Step] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    generated: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lowering: str = ""  # "inductor" or "eager", with the mode
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What happened while one or more graphs were compiled."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """All sites of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    def counts(self) -> dict[str, int]:
        """Fusion name -> number of sites."""
        return dict(Counter(site.fusion for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        from dataclasses import asdict

        return asdict(self)
