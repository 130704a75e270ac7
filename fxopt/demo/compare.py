"""How one backend's results compare with another's, and what fxopt did on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.rewrite.plugins import fusions
from fxopt.view.report import Report


@dataclass(frozen=True)
class Tally:
    """Sites of one fusion: `found` by its matcher, and `fused` (found less those undone by the checks)."""

    fusion: str
    found: int
    fused: int


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token in which two generations differ, or None if they are the same."""
    if list(ours) == list(theirs):
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def tally(report: Report) -> list[Tally]:
    """Found and fused sites by fusion (raising rules, which only prepare, are left out), most sites first."""
    raising = {name for name, fusion in fusions().items() if fusion.stage == "raise"}
    fused = report.counts()
    undone = Counter(step.fusion for step in report.steps if not step.applied and step.fusion not in raising)
    names = dict.fromkeys([*fused, *undone])
    rows = [Tally(name, fused.get(name, 0) + undone[name], fused.get(name, 0)) for name in names]
    return sorted(rows, key=lambda row: (-row.found, row.fusion))


def tally_text(report: Report) -> str:
    """The tally in words: "rms_norm 61/61, attention 30/30"; graphs that passed through untouched are named."""
    parts = [f"{row.fusion} {row.fused}/{row.found}" for row in tally(report)]
    untouched = sum(not graph.normalized for graph in report.graphs)
    if untouched:
        parts.append(f"{untouched} of {len(report.graphs)} graphs untouched")
    return ", ".join(parts) or "nothing fused"


def worst_cosine(ours: Tensor, theirs: Tensor) -> float:
    """The smallest cosine similarity between rows of two [sentences, hidden] tensors."""
    return float(torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape."""
    return float((ours.double() - theirs.double()).abs().max())
