"""The cache directory: a place that may be missing, full, read-only or hostile, and never breaks a compilation.

What is cached steers what code runs, so the directory must be the user's own: it is created with mode 0700 and refused
if someone else owns it or can write to it. A refusal or an I/O error is one warning; after it, caches live in memory.

    FXOPT_CACHE_DIR   the directory to use in place of the platform's user cache ("" turns the disk cache off)
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import warnings
from pathlib import Path

import platformdirs

VARIABLE = "FXOPT_CACHE_DIR"

_warned: set[str] = set()
_checked: dict[str, Path | None] = {}


def cachedir(*parts: str) -> Path | None:
    """The cache directory, or the folder `parts` in it, created if need be; None where there can be none.

    The answer is kept for the life of the process, by configured path.
    """
    configured = os.environ.get(VARIABLE)
    if configured == "":
        return None
    root = configured or str(platformdirs.user_cache_path("fxopt"))
    key = os.path.join(root, *parts)
    if key not in _checked:
        _checked[key] = _prepared(Path(root), parts)
    return _checked[key]


def read(path: Path) -> bytes | None:
    """The file's contents, or None if it can't be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write(path: Path, data: bytes) -> bool:
    """Write a file of the cache in one step: a reader sees the old contents or the new, never a part. False: failed."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been cleared since
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        _warn(str(path.parent), f"fxopt can't write to its cache {path.parent} ({error.strerror or error})")
        return False
    return True


def _prepared(root: Path, parts: tuple[str, ...]) -> Path | None:
    at = root
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        objection = _objection(root)
        for part in parts:
            if objection is not None:
                break
            at = at / part
            at.mkdir(mode=0o700, exist_ok=True)
            objection = _objection(at)
    except OSError as error:
        objection = error.strerror or str(error)
    if objection is None:
        return at
    _warn(
        str(root),
        f"fxopt doesn't use the cache directory {at}: {objection}; results are kept in memory only. "
        f"Set {VARIABLE} to a directory of your own",
    )
    return None


def _objection(path: Path) -> str | None:
    """Why the directory can't be trusted, or None."""
    if not hasattr(os, "getuid"):  # Windows: the user profile's access list decides
        return None
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _warn(about: str, message: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
