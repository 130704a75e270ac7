"""What a rewrite depends on besides the graph, as one text: the compilation caches keep compiled code under it."""

from __future__ import annotations

import functools
import hashlib
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxopt.ops import versions
from fxopt.rewrite.fusion import Fusion
from fxopt.sources import digest, edited_since_start

_ROOT = Path(__file__).parents[1]

#: what tells this process's unsaved sources (typed into a console) from any other's
_PROCESS = uuid.uuid4().hex


def pass_identity(fusions: Iterable[Fusion], settings: Any) -> str:
    """A hash of fxopt's own sources, the fusions with their options and sources, the ops, and `settings` by their repr.

    The ops are all that are defined, whoever's files they are written in: a fusion can make any of them.
    """
    parts = [_own_sources(), *versions(), repr(settings)]
    for fusion in fusions:
        kind = type(fusion)
        parts += [repr(fusion), kind.source_version or _PROCESS, _sources(kind.__module__)]
        if " at 0x" in repr(fusion):  # an option that only its address tells from others
            parts.append(_PROCESS)
    return f"fxopt {hashlib.sha256(' '.join(parts).encode()).hexdigest()}"


@functools.cache
def _own_sources() -> str:
    linked = [f for folder in ("passes", "kernels") for f in (_ROOT / folder).rglob("*.py")]  # links, in a checkout
    files = sorted({*_ROOT.rglob("*.py"), *linked})
    return digest(files) if not any(map(edited_since_start, files)) else _PROCESS


def _sources(module: str) -> str:
    """A hash of all that is loaded of the package that `module` is in."""
    package = module.split(".")[0]
    if package == __name__.split(".")[0]:
        return ""  # hashed as a whole
    loaded = [m for name, m in list(sys.modules.items()) if name == package or name.startswith(package + ".")]
    files = {Path(found) for m in loaded if (found := getattr(m, "__file__", None)) and Path(found).is_file()}
    if not files or module == "__main__" or any(map(edited_since_start, files)):
        return _PROCESS
    return digest(sorted(files))
