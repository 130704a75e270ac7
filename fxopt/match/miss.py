"""Why something did not match: a reason in words and the node at fault, never a bare False."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxopt.graph.query import source_line

#: with no larger share of what the fusion looks for a miss is no near miss, only another program: it is not reported
NEAR = 0.5


@dataclass(frozen=True)
class Miss:
    """A refusal: the predicate that failed, in words, and the node at fault.

    Attributes:
        reason: the predicate that failed, in words
        node: the node at fault; None: the one where the search began
        progress: how far the match got (nodes matched so far)
        hint: what the user can do to have it fused, in words ("call model.eval()"); None where nothing short of another
            model would
        share: how much of what the fusion looks for is there, 0 to 1: up to `NEAR` the miss is not reported, and the
            report shows the nearest first. 1 where all of it is and a condition failed; of a pattern it is counted
    """

    reason: str
    node: Node | None = None
    progress: int = 0
    hint: str | None = None
    share: float = 1.0


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
        share: how much of what the fusion looks for is there, 0 to 1
    """

    fusion: str
    anchor: str
    reason: str
    node: str | None
    source: str | None
    progress: int
    hint: str | None = None
    share: float = 1.0

    @classmethod
    def of(cls, fusion: str, anchor: Node, miss: Miss) -> NearMiss:
        """The report's form of `miss`."""
        at = miss.node if miss.node is not None else anchor
        line = source_line(at) or source_line(anchor)
        return cls(fusion, anchor.name, miss.reason, at.name, line, miss.progress, miss.hint, miss.share)
