"""What was told of a graph when it was compiled, for the day when its compiled code comes from a cache.

Where the rewrite is part of what is cached, a warm start never runs it. The report of the run that did is kept beside
the caches, under a key that names everything the rewrite depended on; where it is gone, the new report says so.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from fxopt import cachedir
from fxopt.view.report import GraphReport, Report
from fxopt.view.save import from_dict, to_dict

#: what a report says of the rewrite itself, whoever compiled the graph
_TOLD = ("steps", "misses", "sites", "generated")


def keep(report: GraphReport, key: str) -> None:
    """Keep what `report` says of the rewrite; nothing happens where the cache can't be written."""
    folder = cachedir.cachedir("reports")
    # What is long is told only to those who recorded it.
    short = replace(report, before="", after="", compiled="", parts=[])
    if folder is not None:
        cachedir.write(folder / f"{_name(key)}.json", json.dumps(to_dict(Report([short], []))).encode())


def recall(report: GraphReport, key: str) -> bool:
    """Fill in `report` with what was kept under `key`; False where nothing was, or nothing that can be read."""
    folder = cachedir.cachedir("reports")
    data = cachedir.read(folder / f"{_name(key)}.json") if folder is not None else None
    if data is None:
        return False
    try:
        (known,) = from_dict(json.loads(data)).graphs
    except Exception:  # not JSON, not text, or not ours: whatever it holds, it is only what would have been told
        return False
    for field in _TOLD:
        setattr(report, field, getattr(known, field))
    return True


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
