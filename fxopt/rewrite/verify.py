"""Does a replacement compute what it replaces? (under construction: metadata first)"""

from __future__ import annotations

from torch.fx import Node

from fxopt.match.match import Match
from fxopt.rewrite.fusion import Fusion, Verdict
from fxopt.rewrite.meta_check import alias_difference, check_meta, stride_difference

__all__ = ["Verifier", "check_meta", "stride_difference"]


class Verifier:
    """Verifies rewrites at one level: "off", "meta", "numeric" or "strict"."""

    def __init__(self, level: str = "numeric", seed: int = 0) -> None:
        self.level = level
        self.seed = seed

    def verify(self, fusion: Fusion, match: Match, replacements: tuple[Node, ...]) -> Verdict:
        """What is known of replacing `match.outputs` by `replacements`; neither is changed."""
        if self.level == "off":
            return Verdict("unchecked", "verification is off")
        for old, new in zip(match.outputs, replacements, strict=True):
            found = check_meta(old, new)
            if found is not None:
                return Verdict("failed", f"{new.name} for {old.name}: {found}")
        found = alias_difference(match.outputs, replacements, match.nodes, match.made)
        if found is not None:
            return Verdict("failed", found)
        return Verdict("meta")
