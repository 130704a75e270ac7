"""The cache directory: a place that may be missing, full, read-only or hostile, and never breaks a compilation.

What is cached steers what code runs, so the directory must be the user's own: it is created with mode 0700, and refused
if someone else owns it, can write to it, or can put another one in its place. What lies in it is data, never code, and
a file that isn't the user's own is not read. A refusal or an I/O error is one warning; after it, caches live in memory.

    FXOPT_CACHE_DIR   the directory to use in place of the platform's user cache ("" turns the disk cache off)
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import warnings
from pathlib import Path

import platformdirs

VARIABLE = "FXOPT_CACHE_DIR"

log = logging.getLogger(__name__)

#: no file of ours is near this long
LIMIT = 16 << 20

_warned: set[str] = set()
#: path as configured -> the directory that it led to, and which one that was (device, inode)
_checked: dict[str, tuple[Path, tuple[int, int]]] = {}


def cachedir(*parts: str) -> Path | None:
    """The cache directory, or the folder `parts` in it, created if need be; None where there can be none.

    To be asked again before each use: the directory can be cleared, or be given to others, at any time.
    """
    configured = os.environ.get(VARIABLE)
    if configured == "":
        return None
    root = os.path.expanduser(configured or platformdirs.user_cache_dir("fxopt"))
    if root.startswith("~"):
        _refuse(root, root, "there is no home directory")
        return None
    path = os.path.join(os.path.abspath(root), *parts)
    known = _checked.get(path)
    if known is not None and _is_still(*known):
        return known[0]
    try:
        _make(os.path.abspath(root))
        at = os.path.realpath(root)
        objection = _objection(os.path.abspath(root), at)
        for part in parts:
            if objection is not None:
                break
            at = os.path.join(at, part)
            _make(at)
            objection = _folder_objection(at)
        if objection is None:
            found = os.lstat(at)
            _checked[path] = Path(at), (found.st_dev, found.st_ino)
            return Path(at)
    except OSError as error:
        at, objection = path, error.strerror or str(error)
    _refuse(root, at, objection)
    return None


def read(path: Path) -> bytes | None:
    """The contents of a file of the cache; None if it can't be read or isn't a plain file of the user's own."""
    # Not blocking: opening a pipe would otherwise wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > LIMIT:
                return None
            if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or _is_shared(found)):
                return None  # left by others, when they could still write here
            return file.read(LIMIT)
    except OSError:
        return None


def write(path: Path, data: bytes) -> bool:
    """Write a file of the cache in one step: a reader sees the old contents or the new, never a part. False: failed."""
    temporary = None
    try:
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


def _make(path: str) -> None:
    """The directory and those above it that are missing, all closed to others whatever the umask says."""
    if os.path.isdir(path):
        return
    _make(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):  # made by another process in between, or it is a file: seen later
        os.mkdir(path, 0o700)


def _objection(path: str, at: str) -> str | None:
    """Why the directory `path`, which is `at` with links resolved, can't be trusted, or None.

    It must be the user's alone. In those above it others must not be able to rename what is the user's: with the sticky
    bit (as in /tmp) they can't. A link must have been set by someone who is trusted.
    """
    if not hasattr(os, "geteuid"):
        return _folder_objection(at)
    trusted = {0, os.geteuid(), os.lstat("/").st_uid}  # in a user namespace the system's files are not root's
    for link in (path, *map(str, Path(path).parents)):
        if os.path.islink(link) and (owner := os.lstat(link).st_uid) not in trusted:
            return f"the link {link} belongs to user {owner}"
    for above in map(str, Path(at).parents):
        found = os.lstat(above)
        if found.st_uid not in trusted:
            return f"{above} belongs to user {found.st_uid}, who could put another directory in its place"
        if _is_shared(found) and not (found.st_mode & stat.S_ISVTX or _is_private(found)):
            return (
                f"others can write to {above} (mode {stat.S_IMODE(found.st_mode):o}), so that they could put another "
                f"directory in its place; try chmod go-w {above}"
            )
    return _folder_objection(at)


def _folder_objection(at: str) -> str | None:
    """Why the directory `at` is not the user's alone, or None."""
    found = os.lstat(at)
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a directory"
    if not hasattr(os, "geteuid"):  # Windows: the user profile's access list decides
        return None
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if _is_shared(found):
        return f"others can write to it (mode {stat.S_IMODE(found.st_mode):o}); try chmod go-w {at}"
    return None


def _is_still(at: Path, identity: tuple[int, int]) -> bool:
    """Whether `at` is the directory that was found good before. Then nothing above it matters any more."""
    try:
        found = os.lstat(at)
        return (found.st_dev, found.st_ino) == identity and _folder_objection(str(at)) is None
    except OSError:
        return False


def _is_shared(found: os.stat_result) -> bool:
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_private(found: os.stat_result) -> bool:
    """Whether only a group can write to it that has the user as its one member, as many distributions set users up."""
    if found.st_mode & stat.S_IWOTH:
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    return user.pw_gid == found.st_gid and group.gr_name == user.pw_name and not set(group.gr_mem) - {user.pw_name}


def _refuse(root: str, path: str, objection: str) -> None:
    _warn(
        root,
        f"fxopt doesn't use the cache directory {path}: {objection}; results are kept in memory only. "
        f"Set {VARIABLE} to a directory of your own",
    )


def _warn(about: str, message: str) -> None:
    if about in _warned:
        return
    _warned.add(about)
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except RuntimeWarning:  # under -W error; a cache that can't be used must not cost the compilation
        log.warning(message)
