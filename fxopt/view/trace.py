"""Artifacts for torch's structured trace (TORCH_TRACE): tlparse shows each as a file of its own under the compile id."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from torch._logging import trace_structured

from fxopt.view.report import GraphReport

_trace_log = logging.getLogger("torch.__trace")


def tracing() -> bool:
    """Whether torch's structured trace is on."""
    # Without TORCH_TRACE torch leaves a handler with no folder there; it removes itself at the first message.
    return any(getattr(handler, "root_dir", "") is not None for handler in _trace_log.handlers)


def artifacts(graph: GraphReport) -> None:
    """Write the graph's report as artifacts "fxopt_before", "fxopt_after" and one for each generated source."""
    if not tracing():
        return
    _artifact("fxopt_before", lambda: graph.before)
    _artifact("fxopt_after", lambda: graph.after)
    for name, source in graph.generated.items():
        _artifact("fxopt_generated_" + re.sub(r"\W+", "_", name), lambda source=source: source)  # type: ignore[misc]


def _artifact(name: str, text: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
