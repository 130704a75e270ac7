"""The tests that the pytest plugin collects: one for each fusion and check."""

from __future__ import annotations


def test_conformance(fusion_name: str, what: str) -> None:
    """The fusion does what is asked of every fusion, on its own examples."""
    from fxopt.rewrite.plugins import fusions
    from fxopt.testing import check, without_inductor

    with without_inductor():
        check(fusions()[fusion_name], what)
