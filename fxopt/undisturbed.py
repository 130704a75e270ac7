"""A long compilation without what the interpreter adds to it: new memory for frames, and full garbage collections.

*Frames.* CPython (from 3.11 on) keeps the frames of Python code in chunks of 16 KiB, and gives a chunk back as soon as
the first frame in it returns. A loop whose calls lie across the end of a chunk maps and unmaps memory at every call,
which the kernel clears each time. Where the end lies depends on the frames below, so some models are hit and others are
not: a retrace of 2400 nodes took 56,000 page faults and 1.1 s instead of 0.7. A frame that asks for much room gets a
large chunk, and those above it share what is left.

*Garbage.* A collection of everything looks at all objects of the process: modules, model, what Dynamo traced. They are
frozen in the meantime, so that only what the compilation itself made is looked at; its garbage is still collected.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

#: what one frame asks for, in pointers: a little over half a MiB, for which it gets a chunk of one
_ROOM = 66_000


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called with room for its frames and with the objects that there were set aside from collections."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _frozen():
            return function(*args, **kwargs)

    roomy = cast(FunctionType, call)
    roomy.__code__ = roomy.__code__.replace(co_stacksize=_ROOM)
    return functools.wraps(function)(call)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    if gc.get_freeze_count():  # by somebody else, or by a call further out: only they may thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
