"""The bundled fusions pass the conformance kit that is made for everybody's."""

from __future__ import annotations

import pytest

from fxopt.rewrite.plugins import registered
from fxopt.testing import check

BUNDLED = [r.fusion for r in registered() if r.distribution == "fxopt"]

#: those that the fusions' own tests don't make with the same inputs already
WHAT = ("described", "examples", "bfloat16", "dynamic", "embedded", "verified")


@pytest.mark.slow
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("fusion", BUNDLED, ids=lambda f: f.name)
def test_conformance(fusion, what, without_inductor):
    check(fusion, what)
