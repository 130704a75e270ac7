"""The recorder: every graph compiled while a recorder is open is added to its report.

    with fxopt.record() as rec:
        torch.compile(model, backend="fxopt")(x)
    print(rec)

Open recorders are a plain list behind a lock and not a context variable: a graph may be compiled in another thread than
the one that opened the recorder (autograd compiles backward graphs in its own), and that graph belongs to the report.
Recorders nest; each receives everything that is compiled while it is open.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import GraphModule

from fxopt.view import trace
from fxopt.view.drawing import Sketch, sketch
from fxopt.view.report import GraphReport, Part, Report

log = logging.getLogger(__name__)

_lock = threading.Lock()
_open: list[Report] = []


@contextmanager
def record() -> Iterator[Report]:
    """Collect a report of every graph that the fxopt backend compiles, in any thread, until the block ends.

    A model that was compiled before the block adds nothing: it is not compiled again. The report stays usable
    afterwards; it holds strings and numbers only, no graphs and no tensors.
    """
    report = Report()
    with _lock:
        _open.append(report)
    try:
        yield report
    finally:
        with _lock:
            _open[:] = [r for r in _open if r is not report]  # by identity: two empty reports are equal


def recording() -> bool:
    """Whether anybody listens (a recorder, or torch's structured trace), so that costly strings are worth making."""
    return bool(_open) or trace.tracing()


@contextmanager
def drawn(module: GraphModule, report: GraphReport) -> Iterator[None]:
    """Draw `module` before and after the block rewrites it, into `report`; nothing is drawn where nobody listens."""
    before, first = _sketch(module) if recording() else None, len(report.steps)
    yield
    after = _sketch(module) if before is not None else None
    if before is None or after is None:
        return
    steps = range(first, len(report.steps))
    savings = {i: saving for i in steps if (saving := before.saving(after, report.steps[i])) is not None}
    report.parts.append(Part(before.drawing, after.drawing, (first, len(report.steps)), savings))
    report.dims |= before.dims


def _sketch(module: GraphModule) -> Sketch | None:
    try:
        return sketch(module)
    except Exception:  # a drawing that can't be made must not cost the user the compilation
        log.warning("a graph could not be drawn", exc_info=True)
        return None


def publish(graph: GraphReport) -> None:
    """Hand a finished graph's report to every open recorder and to torch's structured trace. Never raises."""
    with _lock:
        for report in _open:
            report.graphs.append(graph)
    if graph.reason is not None:
        log.info("%s passed through: %s", graph.name, graph.reason)
    else:
        log.info("%s: %d sites, %d near misses", graph.name, len(graph.sites), len(graph.misses))
    try:
        trace.artifacts(graph)
    except Exception:  # a report that can't be told must not cost the user the compilation
        log.warning("%s could not be written to torch's trace", graph.name, exc_info=True)


def forget() -> None:
    """Close every open recorder; what they have collected stays with them."""
    with _lock:
        _open.clear()
