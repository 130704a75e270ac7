"""What differs between the versions of torch that fxopt runs on (2.11 to 2.13), in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class NewGuardError(RuntimeError):
    """Something specialised a symbolic size that must stay symbolic."""


@contextlib.contextmanager
def no_new_guards(shape_env: Any) -> Iterator[None]:
    """Raise where the body would specialise a symbolic size. `shape_env` may be None: then there is none.

    torch 2.12 refuses the guard itself. Before, it can only be noticed afterwards: it stays (one recompilation more, at
    worst), but what was concluded from it must not be used.
    """
    if shape_env is None:
        yield
    elif hasattr(shape_env, "error_on_new_guards"):
        with shape_env.error_on_new_guards():
            yield
    else:
        before = len(shape_env.guards)
        yield
        if len(shape_env.guards) != before:
            raise NewGuardError(f"a symbolic size was specialised: {shape_env.guards[before].expr}")
