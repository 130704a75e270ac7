"""What was measured: in memory, in the user's cache directory, and in tables that ship with the package.

One small file a measurement, written in one step, named after its signature and repeating it: a file that is truncated,
corrupted, for another signature or of another shape is as good as none. Whoever writes last wins, and both were right.
The tables (`fxopt/tune/tables/*.json`) hold the same entries, measured on the device that they name, and serve other
versions of the software too (`key.portable`); `write_table` writes one. The user's own measurements come first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fxopt import cachedir
from fxopt.tune import key

TABLES = Path(__file__).parent / "tables"

#: the form of what is written; another one is not read
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One measurement: what was chosen for `key`, and what everything took.

    key            the parts of the signature, readable
    implementation the one to use; `config` how to launch it (empty: as it thinks best)
    microseconds   candidate -> median of a call
    rejected       candidate -> why it was not timed
    note           how the choice came about, in words
    """

    key: Mapping[str, str]
    implementation: str
    config: Mapping[str, int] = field(default_factory=dict)
    microseconds: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def parse(cls, data: Any) -> Entry:
        """An entry from what JSON holds. Raises ValueError, KeyError or TypeError where that isn't one."""
        times = {str(k): float(v) for k, v in data["microseconds"].items()}
        if not all(math.isfinite(t) and t >= 0 for t in times.values()):
            raise ValueError("a time is not a number")
        if any(type(v) is not int for v in data["config"].values()):
            raise ValueError("a configuration holds whole numbers")
        texts = [{str(k): str(v) for k, v in data[name].items()} for name in ("key", "rejected")]
        config = {str(k): v for k, v in data["config"].items()}
        return cls(texts[0], str(data["implementation"]), config, times, texts[1], str(data["note"]))


#: by signature; None where it is known that there is nothing
_memory: dict[str, Entry | None] = {}


def load(signature: str, portable: str = "") -> Entry | None:
    """What is known under that signature, or in a table under the `portable` one."""
    if signature not in _memory:
        _memory[signature] = _read(signature) or _tables().get(portable)
    return _memory[signature]


def save(signature: str, entry: Entry) -> None:
    """Keep a measurement, on disk too where that can be."""
    _memory[signature] = entry
    folder = cachedir.cachedir("tune")
    if folder is not None:
        cachedir.write(folder / f"{signature}.json", _text(signature, entry).encode())


def clear() -> None:
    """Forget what this process knows; the disk keeps what it has."""
    _memory.clear()
    _tables.cache_clear()


def fingerprint() -> str:
    """A hash that changes with everything that `load` may answer: compiled code depends on it."""
    on_disk = {}
    folder = cachedir.cachedir("tune")
    for file in folder.glob("*.json") if folder is not None else ():
        with contextlib.suppress(OSError):  # removed meanwhile
            on_disk[file.stem] = f"{file.stem} {file.stat().st_mtime_ns}"
    tables = _tables()
    shipped = {id(entry) for entry in tables.values()}
    unwritten = [repr((s, e)) for s, e in _memory.items() if e and s not in on_disk and id(e) not in shipped]
    named = [f"{name} {e.implementation} {sorted(e.config.items())}" for name, e in tables.items()]
    found = [*on_disk.values(), *unwritten, *named]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def write_table(path: Path, entries: Iterable[Entry]) -> None:
    """Write `entries` as a table."""
    text = ",\n".join(_text(key.signature(entry.key), entry) for entry in entries)
    path.write_text(f'{{"format": {FORMAT}, "entries": [\n{text}\n]}}\n')


def _text(signature: str, entry: Entry) -> str:
    return json.dumps({"format": FORMAT, "signature": signature} | asdict(entry))


def _read(signature: str) -> Entry | None:
    folder = cachedir.cachedir("tune")
    data = cachedir.read(folder / f"{signature}.json") if folder is not None else None
    if data is None:
        return None
    try:
        return dict(_entries([json.loads(data)])).get(signature)
    except (ValueError, RecursionError):  # not JSON, or not text
        return None


@functools.cache
def _tables() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in sorted(TABLES.glob("*.json")):
        try:
            entries = _entries(json.loads(file.read_bytes())["entries"])
            found |= {key.portable(entry.key): entry for _, entry in entries}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _entries(data: Iterable[Any]) -> Iterable[tuple[str, Entry]]:
    for item in data:
        try:
            if item["format"] == FORMAT:
                yield str(item["signature"]), Entry.parse(item)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
