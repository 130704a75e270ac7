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
from collections.abc import Callable, Iterable
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
            self._began = None  # it may have been raised inside of `_set`
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
                    self._began = time.monotonic()  # again, if the call catches even that


class Ledger:
    """A graph as it was, and what its owner did to it since: the rest was done by somebody else.

    The comparison takes the whole graph, so one ledger serves for all applications of one fusion in a sweep.
    """

    def __init__(self, graph: Graph) -> None:
        """The graph as it is now."""
        self.graph = graph
        # By identity: a change makes new arguments.
        self._before = {node: (node.target, node.args, node.kwargs) for node in graph.nodes}
        self._own: set[Node] = set()
        self._harm: str | None = None

    def allow(self, nodes: Iterable[Node]) -> None:
        """What happens to `nodes` from now on is done by the owner."""
        for node in nodes:
            if node not in self._own:
                self._harm = self._harm or self._changed(node)
                self._own.add(node)

    def damage(self) -> str | None:
        """What was done by somebody else, as words that begin with a verb; None if nothing."""
        others = (self._changed(node) for node in self._before if node not in self._own)
        new = (n for n in self.graph.nodes if n not in self._before and n not in self._own)
        strange = (f"inserted {node.name} by itself" for node in new)
        return self._harm or next(filter(None, others), None) or next(strange, None)

    def _changed(self, node: Node) -> str | None:
        if node not in self._before:
            return None
        target, args, kwargs = self._before[node]
        if node._erased:
            return f"erased {node.name}"
        same = node.target is target and node.args is args and node.kwargs is kwargs
        return None if same else f"changed {node.name}"
