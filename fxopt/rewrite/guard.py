"""A fusion's own code, held to its contract: it answers in time, and it leaves the graph alone.

A fusion may raise, take for ever, or do to the graph what only the driver may. The first is an exception like any. The
second is ended by a watch that raises in the compiling thread, which reaches any Python code (not a call into native
code that never returns). The third is seen by comparing the graph before and after; the rewritten graph is then given
up, and the caller begins again without that fusion.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch.fx import Graph, Node

T = TypeVar("T")

#: how long one call of a fusion's `find`, `check` or `rewrite` may take; they take milliseconds
SECONDS = 60.0


class GraphBroken(Exception):
    """A fusion changed the graph by itself; `fusion` is its name, the message says what it did."""

    def __init__(self, fusion: str, what: str) -> None:
        """`what` begins with a verb: "erased mul_1"."""
        super().__init__(f"the fusion {fusion} {what}: only match.call() may change the graph")
        self.fusion = fusion


class _Overtime(BaseException):  # not an Exception: `except Exception: pass` inside of a loop would go on with it
    pass


class Watch:
    """Ends calls that take too long; a context, for the thread that enters it."""

    def __init__(self) -> None:
        """A watch that is not running yet."""
        self._lock = threading.Lock()
        self._began: float | None = None  # when the present call began
        self._over = threading.Event()
        self._thread = threading.get_ident()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, name="fxopt watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args). Raises TimeoutError where that takes longer than SECONDS, and what it raises."""
        try:
            self._set(time.monotonic())
            try:
                return function(*args)
            finally:
                self._set(None)
        except _Overtime:
            raise TimeoutError(f"gave no answer within {SECONDS:g} s") from None

    def _set(self, began: float | None) -> None:
        with self._lock:  # once this is left with None, nothing more is raised in the thread
            self._began = began

    def _look(self) -> None:
        while not self._over.wait(min(1.0, SECONDS / 4)):
            with self._lock:
                if self._began is not None and time.monotonic() - self._began > SECONDS:
                    thread = ctypes.c_ulong(self._thread)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Overtime))


Fingerprint = list[tuple[Node, Any, Any, Any]]


def fingerprint(graph: Graph) -> Fingerprint:
    """What the graph's nodes are: their targets and arguments, by identity (a change makes new ones)."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def damage(graph: Graph, before: Fingerprint, made: Collection[Node]) -> str | None:
    """What was done to the graph besides making the nodes `made`, as words that begin with a verb; None if nothing."""
    for node, target, args, kwargs in before:
        if node._erased:
            return f"erased {node.name}"
        if node.target is not target or node.args is not args or node.kwargs is not kwargs:
            return f"changed {node.name}"
    if len(graph.nodes) != len(before) + len(made):
        known = {node for node, *_ in before} | set(made)
        strange = [node.name for node in graph.nodes if node not in known]
        return f"inserted {', '.join(strange)} by itself" if strange else f"erased what it had made ({len(made)} nodes)"
    return None
