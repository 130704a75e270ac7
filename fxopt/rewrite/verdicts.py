"""Verdicts by signature, so that a rewrite seen before is not checked again: in memory, and on disk across processes.

One small file a verdict, written in one step, named after the signature and repeating it: a file that is truncated,
corrupted or for another signature is as good as none. Only "equal" goes to disk. What failed or couldn't be checked is
checked again by the next process, for the reason may be gone.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from fxopt import cachedir
from fxopt.rewrite.fusion import Verdict

_memory: dict[str, Verdict] = {}


def lookup(signature: str, *, disk: bool = True) -> Verdict | None:
    """The verdict on an equal rewrite, or None."""
    known = _memory.get(signature)
    if known is None and disk:
        known = _load(signature)
        if known is not None:
            _memory[signature] = known
    return known


def store(signature: str, verdict: Verdict, *, disk: bool = True) -> None:
    """Keep a verdict, on disk too if it is "equal"."""
    _memory[signature] = verdict
    if not disk or verdict.status != "equal":
        return
    folder = cachedir.cachedir("verdicts")
    if folder is not None:
        text = json.dumps({"signature": signature} | asdict(verdict))
        cachedir.write(folder / f"{signature}.json", text.encode())


def clear() -> None:
    """Forget what this process knows; the disk keeps what it has."""
    _memory.clear()


def _load(signature: str) -> Verdict | None:
    folder = cachedir.cachedir("verdicts")
    data = cachedir.read(folder / f"{signature}.json") if folder is not None else None
    if data is None:
        return None
    try:
        found = json.loads(data)
        if found["signature"] != signature or found["status"] != "equal":
            return None
        error = found["error"]
        if error is not None and not math.isfinite(float(error)):
            return None
        return Verdict("equal", str(found["detail"]), None if error is None else float(error))
    except (ValueError, KeyError, TypeError):  # not JSON, not text, or not ours
        return None
