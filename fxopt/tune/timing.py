"""Timing candidates against each other: cold weights, no launches counted, rounds interleaved, medians.

Each candidate is called on several sets of arguments in turn, together larger than the caches, as a model calls a layer
after all the others. On a GPU the calls of a round are one CUDA graph, so that the host takes no part; on the CPU the
clock is `time.perf_counter`. The rounds of the candidates alternate: what drifts (clocks, other processes) drifts for
all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[..., Any]

ROUNDS = 7
#: seconds that a round should last, so that the clock's resolution does not matter
ROUND = 2e-3
#: bytes that must lie between two uses of one weight on the CPU
CPU_CACHES = 64 << 20
#: sets of arguments, at most: those of small ops fit into the cache in a model too
MOST_SETS = 64
#: faster by less than this is not faster
MARGIN = 0.03


@dataclass(frozen=True)
class Timing:
    """The median of a call in seconds, and the rounds' interquartile range relative to it."""

    seconds: float
    spread: float = 0.0

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Timing:
        """From the seconds of a call in each round."""
        middle = statistics.median(rounds)
        low, _, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else (middle, middle, middle)
        return cls(middle, (high - low) / middle if middle else 0.0)

    def beats(self, other: Timing) -> bool:
        """Whether it is faster by more than the margin and the noise of both."""
        return self.seconds * (1 + max(MARGIN, self.spread + other.spread)) < other.seconds


def argument_sets(size: int, device: torch.device) -> int:
    """How many sets of arguments of `size` bytes it takes to find none in the cache on its next use."""
    cache = CPU_CACHES
    if device.type == "cuda":
        cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, -(-cache // max(size, 1))))


def time_all(calls: Sequence[Call], sets: Sequence[tuple[Any, ...]], device: torch.device) -> list[Timing]:
    """Each of `calls` timed on all of `sets`; what one of them raises reaches the caller."""
    round_of = _graph_round if device.type == "cuda" else _cpu_round
    rounds = [round_of(call, sets) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for found, run in zip(times, rounds, strict=True):
            found.append(run())
    return [Timing.of(found) for found in times]


def _cpu_round(call: Call, sets: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        for args in sets:
            call(*args)
        return time.perf_counter() - start

    once()  # whatever is done on a first call only
    repeats = max(1, round(ROUND / max(once(), 1e-9)))
    return lambda: sum(once() for _ in range(repeats)) / (repeats * len(sets))


def _graph_round(call: Call, sets: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in sets:
            call(*args)  # compiles, and warms up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in sets:
            call(*args)

    def once(repeats: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    once(1)
    repeats = max(1, round(ROUND / max(once(1), 1e-9)))
    return lambda: once(repeats) / (repeats * len(sets))
