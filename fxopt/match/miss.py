"""Why something did not match: a reason in words and the node at fault, never a bare False."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxopt.graph.query import source_line


@dataclass(frozen=True)
class Miss:
    """A refusal: the predicate that failed, in words, and the node at fault.

    `progress` is how far the match got (nodes matched so far); the report shows the farthest first.
    """

    reason: str
    node: Node | None = None
    progress: int = 0


@dataclass(frozen=True)
class NearMiss:
    """A match that nearly succeeded, kept for the report (strings only: it outlives the graph)."""

    fusion: str
    anchor: str  # name of the node where the search began
    reason: str
    node: str | None  # name of the node at fault
    source: str | None  # the user's source line of that node
    progress: int

    @classmethod
    def of(cls, fusion: str, anchor: Node, miss: Miss) -> NearMiss:
        """The report's form of `miss`."""
        at = miss.node if miss.node is not None else anchor
        return cls(fusion, anchor.name, miss.reason, at.name, source_line(at), miss.progress)
