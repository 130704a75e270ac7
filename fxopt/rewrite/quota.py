"""How many rewrites may be applied: every application is counted, so that a bad one is found by bisection.

Quotas are a plain list, as recorders are: a graph may be compiled in another thread than the one that set the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fxopt.rewrite.fusion import Step


@dataclass
class Quota:
    """At most `limit` applications of fusions (not of raising rules, which are undone where nothing follows)."""

    limit: int | None
    taken: list[Step] = field(default_factory=list)


_quotas: list[Quota] = []


@contextmanager
def at_most(limit: int | None) -> Iterator[Quota]:
    """Inside of the block at most `limit` rewrites are applied, in all graphs together; None: count only."""
    quota = Quota(limit)
    _quotas.append(quota)
    try:
        yield quota
    finally:
        _quotas[:] = [q for q in _quotas if q is not quota]


def exhausted() -> bool:
    """Whether no further rewrite may be applied."""
    return any(quota.limit is not None and len(quota.taken) >= quota.limit for quota in _quotas)


def take(step: Step) -> None:
    """Count one application."""
    for quota in _quotas:
        quota.taken.append(step)
