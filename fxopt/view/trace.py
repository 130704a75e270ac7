"""Artifacts for torch's structured trace (TORCH_TRACE): tlparse shows each as a file under the compile id."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch._logging._internal import trace_structured

from fxopt.view import text
from fxopt.view.report import GraphReport, Report

_trace_log = logging.getLogger("torch.__trace")


def tracing() -> bool:
    """Whether torch's structured trace is on."""
    # Handlers without a folder don't count: torch's own without TORCH_TRACE, until it removes itself at the first
    # message, and those with which pytest captures logs.
    return any(getattr(handler, "root_dir", None) is not None for handler in _trace_log.handlers)


def artifacts(graph: GraphReport) -> None:
    """Write the report of one graph: fxopt_before, fxopt_after, fxopt_explain and one for each generated source."""
    if not tracing():
        return
    _artifact("fxopt_before", lambda: graph.before)
    _artifact("fxopt_after", lambda: graph.after)
    _artifact("fxopt_explain", lambda: text.explanation(Report([graph])))
    for name, source in graph.generated.items():
        _artifact("fxopt_generated_" + re.sub(r"\W+", "_", name), lambda source=source: source)  # type: ignore[misc]


def _artifact(name: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
