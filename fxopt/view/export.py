"""Graphs for other tools: GraphML (Gephi, yEd, Cytoscape) and DOT (Graphviz), through networkx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxopt.view.drawing import Drawing

if TYPE_CHECKING:
    import networkx

    from fxopt.view.report import Report


def to_networkx(report: Report, side: str = "after") -> networkx.MultiDiGraph:
    """The graphs of a report in one: nodes have op, value, module, source and fusion, edges run with the data.

    `side` is "before" or "after" the rewrites. Node names are "graph/part/name", since graphs may share names; the
    attribute `fusion` names what made a node, or will replace it. Raises ValueError for another side, and where
    nothing was drawn (a report of cached code); ImportError without networkx.
    """
    try:
        import networkx
    except ImportError as error:
        raise ImportError("exporting graphs needs networkx: pip install networkx") from error

    if side not in ("before", "after"):
        raise ValueError(f"side is 'before' or 'after', not {side!r}")
    made = networkx.MultiDiGraph()
    for i, graph in enumerate(report.graphs):
        for j, part in enumerate(graph.parts):
            steps = [step for step in graph.steps[slice(*part.steps)] if step.applied]
            names = {n: s.fusion for s in steps for n in (s.replaced if side == "before" else s.made)}
            _add(made, f"{i}/{j}", part.before if side == "before" else part.after, names)
    if not made:
        raise ValueError("the report has no graphs to export: record the compilation with fxopt.record()")
    return made


def _add(made: networkx.MultiDiGraph, prefix: str, drawing: Drawing, fusions: dict[str, str]) -> None:
    for node in drawing:
        fields = {"op": node.op, "value": node.value, "module": node.module, "source": node.source}
        made.add_node(f"{prefix}/{node.name}", **fields, fusion=fusions.get(node.name, ""))
    for node in drawing:
        for source in node.inputs:
            made.add_edge(f"{prefix}/{drawing.names[source]}", f"{prefix}/{node.name}")


def graphml(report: Report) -> str:
    """The rewritten graphs as GraphML."""
    graph = to_networkx(report)
    import networkx

    return "\n".join(networkx.generate_graphml(graph)) + "\n"


def dot(report: Report) -> str:
    """The rewritten graphs as DOT; fused ops are filled."""
    graph = to_networkx(report)
    lines = ["digraph fxopt {", '  node [shape=box, style=rounded, fontname="monospace"];']
    for name, fields in graph.nodes(data=True):
        fill = ', style="rounded,filled", fillcolor="#e8f6ee"' if fields["fusion"] else ""
        label = f'"{_escaped(fields["op"])}\\n{_escaped(fields["value"])}"'
        lines.append(f"  {_quoted(name)} [label={label}, tooltip={_quoted(fields['source'])}{fill}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in graph.edges()]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(words: str) -> str:
    return f'"{_escaped(words)}"'


def _escaped(words: str) -> str:
    return " ".join(words.replace("\\", "\\\\").replace('"', '\\"').split())
