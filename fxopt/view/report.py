"""What happened while a model was compiled, as plain data: it outlives the graphs and can be saved."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.match.miss import NearMiss
from fxopt.rewrite.fusion import Step, Verdict
from fxopt.view.drawing import Drawing, Saving

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Site:
    """One place in a model where a fused op took over.

    Attributes:
        fusion: the fusion's name
        op: the op's name
        implementation: who computes it: "sdpa", "triton", "aten", "decomposed" or "reference" (the unfused arithmetic
            under a new name)
        source: the user's source line, or None
        module: the nn.Module that it is in, or None
        verdict: what verification found
        passed_over: (implementation, objection) of those that came before it
        node: the fused op's node, as a step's `made` names it
        arguments: the op's arguments as expressions, sizes and strides as at the first call
        code: name of what stands in the op's place, in the graph's `generated`
        opaque: it is one call, which the compiler doesn't see into; else nodes that are compiled with their neighbours
        placed: those nodes, by name, or the call
    """

    fusion: str
    op: str
    implementation: str
    source: str | None
    module: str | None
    verdict: Verdict
    passed_over: tuple[tuple[str, str], ...] = ()
    node: str = ""
    arguments: tuple[str, ...] = ()
    code: str = ""
    opaque: bool = False
    placed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """The source of an opaque implementation with all that it needs beside torch and Triton: one for all its sites.

    Attributes:
        op: the op's name
        implementation: the implementation's
        source: imports, kernels, and functions `launch` and `reference`, of the op's arguments
        drawn: whether there is a function `draw` too, which makes arguments
    """

    op: str
    implementation: str
    source: str
    drawn: bool = False


@dataclass(frozen=True)
class Part:
    """The graph itself, or one that it holds (a checkpointed region), drawn before and after its rewrites.

    steps: (first, last + 1) of the graph report's steps that are its own
    savings: index of a step -> what it saves
    """

    before: Drawing
    after: Drawing
    steps: tuple[int, int] = (0, 0)
    savings: dict[int, Saving] = field(default_factory=dict)


#: where a graph was taken up: Dynamo's own, retraced, or AOTAutograd's
PRE_DISPATCH, AFTER_AOT = "pre-dispatch", "after AOTAutograd"


@dataclass
class GraphReport:
    """One graph that Dynamo captured: before, steps, near misses, after.

    Attributes:
        name: "graph 0", "graph 1", ...
        before: the normal form before its rewrites, printed
        after: the normal form after them, printed
        normalized: False if the graph went to the lowering stage untouched; `reason` then says why
        reason: why it was turned away, or None
        entry: "pre-dispatch", or "after AOTAutograd" where the first one turned the graph away for `turned_away`
        turned_away: why the first entry turned it away, or None
        nodes: number of nodes that Dynamo captured
        steps: applications of fusions and rules, in order, undone ones included
        misses: near misses, the farthest first
        sites: where a fused op took over
        generated: name -> what stands in fused ops' places: the traced nodes, or the source of the opaque call
        compiled: Inductor's output code for the graph (and its backward, if compiled with it), where somebody listened
        seconds: time of each stage ("retrace", "canonicalise", "match", "rewrite", "verify", "lower")
        lowering: who compiled it, and in which mode
        notes: what else there is to know, in words
        outlined: layers that were compiled once, in words -> how many times they repeat
        parts: the drawings, where somebody listened
        dims: symbolic dimension -> where it comes from, and its size at the first call
    """

    name: str
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    normalized: bool = False
    reason: str | None = None
    entry: str = PRE_DISPATCH
    turned_away: str | None = None
    nodes: int = 0
    steps: list[Step] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    generated: dict[str, str] = field(default_factory=dict, repr=False)
    compiled: str = field(default="", repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    lowering: str = ""
    notes: list[str] = field(default_factory=list)
    outlined: dict[str, int] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list, repr=False)
    dims: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What happened while one or more graphs were compiled: strings and numbers only, so it outlives the graphs.

    `print(report)` shows a table; `save` writes it as text, JSON or a page; `from_json` reads it back.

    Attributes:
        graphs: one a graph that was compiled, in order
        kernel_sources: the kernels that it was saved with; None: they are read from the ops' own files when asked for
    """

    graphs: list[GraphReport] = field(default_factory=list)
    kernel_sources: list[Kernel] | None = field(default=None, compare=False, repr=False)

    @property
    def sites(self) -> list[Site]:
        """All sites of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def misses(self) -> list[NearMiss]:
        """All near misses of all graphs."""
        return [miss for graph in self.graphs for miss in graph.misses]

    @property
    def steps(self) -> list[Step]:
        """All applications of fusions and raising rules, undone ones included."""
        return [step for graph in self.graphs for step in graph.steps]

    def counts(self) -> dict[str, int]:
        """Fusion name -> number of sites."""
        return dict(Counter(site.fusion for site in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data with a schema version; numbers that JSON lacks (inf, nan) become strings."""
        from fxopt.view.save import to_dict

        return to_dict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report in the form that the suffix names: .html (a page), .json (data) or .txt (the table).

        The rewritten graphs alone are written as .graphml or .dot (needs networkx). Parent folders are made; the file
        appears whole or not at all. Returns the path. Raises ValueError for another suffix.
        """
        from fxopt.view.save import save

        return save(self, path)

    def kernels(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the sites' kernels into `folder`, each as a file that runs by itself and checks itself; their paths.

        One file for each opaque implementation and kind of arguments: source, shapes and strides, reference, check.
        Where a site was computed by something else, it is the kernel that the op has. Raises ValueError where an op of
        the report isn't registered here, and its kernel isn't in the file that the report was read from.
        """
        from fxopt.view.kernels import write_kernels

        return write_kernels(self, folder)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that `save` wrote as .json. Raises ValueError where it isn't one, or of another schema."""
        from fxopt.view.save import load

        return load(path)

    def _repr_html_(self) -> str:
        from fxopt.view.save import frame

        return frame(self)  # what a notebook shows

    def __repr__(self) -> str:
        from fxopt.view.text import summary

        return f"<Report: {summary(self)}>"

    def __str__(self) -> str:
        from fxopt.view.text import render

        return render(self)

    def __rich__(self) -> RenderableType:
        from fxopt.view.text import table

        return table(self)
