"""For the tests of attention: what fuses, with nothing known from earlier runs."""

from __future__ import annotations

import pytest

from attending import Fuser
from fxopt import cachedir
from fxopt.rewrite import verdicts


@pytest.fixture
def fuser(tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path))  # verdicts are taken here, not looked up
    verdicts.clear()
    return Fuser()
