"""Tests of the cache directory need a place for it that nobody else can replace, which is what they are about."""

from __future__ import annotations

import os

import pytest

from fxopt import cachedir


@pytest.fixture(autouse=True)
def _safe_place(tmp_path_factory):
    at = os.path.realpath(tmp_path_factory.getbasetemp())
    objection = cachedir._objection(at, at)
    if objection is not None:
        pytest.skip(f"set TMPDIR to a directory of your own: {objection}")
