"""Repetition in a sequence of labels: runs in which label i equals label i + p.

A deep network's graph, in execution order, is nearly periodic: every layer adds the same labels. The periods worth
trying are the distances between equal *words* (a few labels in a row: single labels, such as that of an addition, come
several times a layer), the commonest first. For each, one pass finds the maximal runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: labels in a word, and how many of the commonest distances are tried
WORD, PERIODS = 6, 12


@dataclass(frozen=True)
class Run:
    """The labels from `start` to `stop` (exclusive) have the period `period`."""

    start: int
    stop: int
    period: int

    @property
    def repeats(self) -> int:
        """How many whole periods fit."""
        return (self.stop - self.start) // self.period

    @property
    def saved(self) -> int:
        """How many nodes need no compiling of their own if each period is compiled once."""
        return (self.repeats - 1) * self.period


def periodic_runs(labels: Sequence[int], *, at_least: int, shortest: int) -> list[Run]:
    """Disjoint runs of `at_least` or more periods of `shortest` or more labels, in order; those that save most win."""
    periods = [p for p in _distances(labels) if p >= shortest]
    runs: list[Run] = []
    pending = [(0, len(labels))]
    while pending:
        start, stop = pending.pop()
        found = [run for p in periods for run in _runs(labels, p, start, stop) if run.repeats >= at_least]
        if not found:
            continue
        best = max(found, key=lambda run: (run.saved, -run.period))
        runs.append(best)
        pending += [(start, best.start), (best.stop, stop)]
    return sorted(runs, key=lambda run: run.start)


def _distances(labels: Sequence[int]) -> list[int]:
    last: dict[tuple[int, ...], int] = {}
    counts: Counter[int] = Counter()
    for i in range(len(labels) - WORD + 1):
        word = tuple(labels[i : i + WORD])
        if word in last:
            counts[i - last[word]] += 1
        last[word] = i
    return [distance for distance, _ in counts.most_common(PERIODS)]


def _runs(labels: Sequence[int], period: int, start: int, stop: int) -> list[Run]:
    runs: list[Run] = []
    begin = start
    for i in range(start, stop - period + 1):
        if i == stop - period or labels[i] != labels[i + period]:
            if i - begin >= period:  # at least two periods
                runs.append(Run(begin, i + period, period))
            begin = i + 1
    return runs
