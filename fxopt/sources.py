"""Which version of some code is this? Answered by a hash of the files that it is written in.

What is remembered about code (a compiled graph, a verdict) is remembered under its version, so that nothing survives an
edit. Files are read where the code is defined, that is when it is imported: a later edit of the file changes nothing
in the running process, and must not be taken for what runs there.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: before any code that is versioned here was loaded, for that needs this module
_STARTED = time.time()


def defining_file(thing: Any) -> Path | None:
    """The file that a function, class or callable object is written in; None for one typed into a notebook or console.

    Decorators and partial applications are looked through.
    """
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    if inspect.isfunction(thing) or inspect.ismethod(thing):
        name = inspect.getsourcefile(thing)
    else:
        kind = thing if isinstance(thing, type) else type(thing)
        name = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Path(name).resolve() if name is not None and Path(name).is_file() else None


def digest(files: Iterable[Path | str]) -> str:
    """A hash of the files' contents, in their order. Raises OSError for one that can't be read."""
    found = hashlib.sha256()
    for file in files:
        data = Path(file).read_bytes()
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()[:12]


def edited_since_start(file: Path | str) -> bool:
    """Whether a file may have changed since it was loaded: what runs is then not what it says."""
    found = Path(file).stat()
    return max(found.st_mtime, found.st_ctime) >= _STARTED
