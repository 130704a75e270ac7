"""What the compilation that is going on wants of the tuner; fusions and lowering ask without being told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.ops import ANYWHERE, Target


@dataclass(frozen=True)
class Session:
    """`mode` is the option `tune`, `target` how the graph will run, `inductor` what Inductor is configured with."""

    mode: str = "off"
    target: Target = ANYWHERE
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def objection(self) -> str | None:
        """Why nothing may be timed here, or None."""
        if self.mode != "full":
            return f'tune="{self.mode}" times nothing'
        if torch.are_deterministic_algorithms_enabled():
            return "with deterministic algorithms no timing decides what is computed"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Ranks that chose differently would wait for each other with different graphs; a store serves them all.
            return "with several processes nothing is timed: fill the store from one process first"
        return None


_current: ContextVar[Session] = ContextVar("fxopt_tune_session")
_NONE = Session()


def current() -> Session:
    """The session of the compilation that is going on; one with mode "off" where there is none."""
    return _current.get(_NONE)


@contextlib.contextmanager
def session(mode: str, target: Target, inductor: Mapping[str, Any] | None = None) -> Iterator[Session]:
    """Everything inside belongs to a compilation with these settings."""
    token = _current.set(Session(mode, target, dict(inductor or {})))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
