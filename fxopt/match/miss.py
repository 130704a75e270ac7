"""Why something did not match: a reason in words and the node at fault, never a bare False."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxopt.graph.query import source_line


@dataclass(frozen=True)
class Miss:
    """A refusal: the predicate that failed, in words, and the node at fault.

    Attributes:
        reason: the predicate that failed, in words
        node: the node at fault; None: the one where the search began
        progress: how far the match got (nodes matched so far); the report shows the farthest first
        hint: what the user can do to have it fused, in words ("call model.eval()"); None where nothing short of another
            model would
    """

    reason: str
    node: Node | None = None
    progress: int = 0
    hint: str | None = None


@dataclass(frozen=True)
class NearMiss:
    """A match that nearly succeeded, kept for the report (strings only: it outlives the graph).

    Attributes:
        fusion: the fusion's name
        anchor: name of the node where the search began
        reason: the predicate that failed, in words
        node: name of the node at fault
        source: the user's source line of that node, or None
        progress: nodes matched so far
        hint: what would make it fuse, or None
    """

    fusion: str
    anchor: str
    reason: str
    node: str | None
    source: str | None
    progress: int
    hint: str | None = None

    @classmethod
    def of(cls, fusion: str, anchor: Node, miss: Miss) -> NearMiss:
        """The report's form of `miss`."""
        at = miss.node if miss.node is not None else anchor
        return cls(
            fusion, anchor.name, miss.reason, at.name, source_line(at) or source_line(anchor), miss.progress, miss.hint
        )
