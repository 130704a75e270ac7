"""What a rewrite depends on besides the graph, as one text: the compilation caches keep compiled code under it."""

from __future__ import annotations

import functools
import hashlib
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxopt.rewrite.fusion import Fusion
from fxopt.sources import digest

_ROOT = Path(__file__).parents[1]

#: what tells this process's unsaved sources (typed into a console) from any other's
_PROCESS = uuid.uuid4().hex


def pass_identity(fusions: Iterable[Fusion], settings: Any) -> str:
    """A hash of fxopt's own sources, the fusions with their options and sources, and `settings` (by their repr)."""
    parts = [_own_sources(), *(f"{fusion!r} {_sources(type(fusion).__module__)}" for fusion in fusions), repr(settings)]
    return f"fxopt {hashlib.sha256(' '.join(parts).encode()).hexdigest()}"


@functools.cache
def _own_sources() -> str:
    linked = [f for folder in ("passes", "kernels") for f in (_ROOT / folder).rglob("*.py")]  # links, in a checkout
    return digest(sorted({*_ROOT.rglob("*.py"), *linked}))


def _sources(module: str) -> str:
    """A hash of all that is loaded of the package that `module` is in."""
    package = module.split(".")[0]
    if package == __name__.split(".")[0]:
        return ""  # hashed as a whole
    loaded = [m for name, m in list(sys.modules.items()) if name == package or name.startswith(package + ".")]
    files = {Path(found) for m in loaded if (found := getattr(m, "__file__", None)) and Path(found).is_file()}
    return digest(sorted(files)) if files and module != "__main__" else _PROCESS
