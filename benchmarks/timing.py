"""Timing on a GPU: CUDA events, medians, and the physical limits that the figures are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from fxopt.tune.timing import time_all


def milliseconds(run: Callable[[], Any], *, warmup: int = 5, repeats: int = 7, calls: int = 10) -> float:
    """Median time of one call, in rows of `calls` with no wait between: host time shows only where it is the limit."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)


def graph_milliseconds(runs: list[Callable[[], Any]]) -> float:
    """Median time of one of `runs` inside a CUDA graph that holds them all (give each its own buffers: cold caches)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return milliseconds(graph.replay) / len(runs)


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes per second of a large elementwise kernel, read and write counted.

    Not of `copy_`: in a CUDA graph that is a node for the copy engine, which is a third slower (H200: 2.76 TB/s).
    """
    source = torch.zeros(size // 4, device=device)
    pairs = [(torch.empty_like(source), source) for _ in range(2)]
    (taken,) = time_all([lambda to, given: torch.neg(given, out=to)], pairs, device)
    return 2 * size / taken.seconds


def matmul_rate() -> float:
    """FLOP per second of an 8192-cubed bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (milliseconds(lambda: a @ b) * 1e-3)
