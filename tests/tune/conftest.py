"""A store of its own for each test, and timings that are told instead of taken."""

from __future__ import annotations

import os

import pytest

from fxopt import cachedir
from fxopt.tune import measure, store, timing


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache directory, empty."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    objection = cachedir._objection(os.path.realpath(folder), os.path.realpath(folder))
    if objection is not None:
        pytest.skip(f"set TMPDIR to a directory of your own: {objection}")
    monkeypatch.setenv(cachedir.VARIABLE, str(folder))
    monkeypatch.setattr(cachedir, "_checked", {})
    monkeypatch.setattr(store, "TABLES", tmp_path / "tables")
    store.clear()
    yield folder
    store.clear()


@pytest.fixture
def seconds(monkeypatch):
    """seconds[candidate] = time of a call, and `seconds.asked`: which were timed, in order. Others take 1 s."""

    class Told(dict):
        asked: list[str]

    told = Told()
    told.asked = []
    sound = measure._sound

    def remembering(*args):
        calls, rejected = sound(*args)
        told.last = [candidate.name for candidate in calls]
        return calls, rejected

    def time_all(calls, sets, device):
        if len(calls) == 1 and len(told.last) > 1:  # what an opaque call is charged for
            return [timing.Timing(told.get("copy", 0.0) if sets[0][0][0].numel() > 1 else 0.0)]
        told.asked += told.last
        return [
            timing.Timing(*t) if isinstance(t := told.get(name, 1.0), tuple) else timing.Timing(t) for name in told.last
        ]

    monkeypatch.setattr(measure, "_sound", remembering)
    monkeypatch.setattr(timing, "time_all", time_all)
    return told
