"""The bundled fusions pass the conformance kit that is made for everybody's."""

from __future__ import annotations

import pytest

from fxopt.rewrite.plugins import registered
from fxopt.testing import CHECKS, check

BUNDLED = [r.fusion for r in registered() if r.distribution == "fxopt"]


@pytest.mark.slow
@pytest.mark.parametrize("what", CHECKS)
@pytest.mark.parametrize("fusion", BUNDLED, ids=lambda f: f.name)
def test_conformance(fusion, what, without_inductor):
    check(fusion, what)
