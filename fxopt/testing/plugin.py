"""The pytest plugin: `pytest --fxopt-fusion NAME` runs the conformance tests of an installed fusion ("all": of each).

pytest loads it in every run where fxopt is installed, so nothing is imported before it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("fxopt").addoption(
        "--fxopt-fusion",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance tests of this installed fusion instead of the project's own tests; 'all': of each",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the suite instead of what would be collected, where the option is given."""
    if config.getoption("fxopt_fusion"):
        config.args[:] = [str(Path(__file__).with_name("suite.py"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the suite by the fusions that were named, and by the checks."""
    if metafunc.module.__name__.rpartition(".")[2] != "suite" or "fusion_name" not in metafunc.fixturenames:
        return
    import pytest

    from fxopt.rewrite.plugins import fusions
    from fxopt.testing.conformance import CHECKS

    named = metafunc.config.getoption("fxopt_fusion")
    known = list(fusions())
    unknown = [name for name in named if name not in (*known, "all")]
    if unknown:
        raise pytest.UsageError(f"no fusion {unknown[0]!r} is installed; there are {', '.join(known)}")
    chosen = known if "all" in named else named
    metafunc.parametrize("fusion_name, what", [(name, what) for name in chosen for what in CHECKS])
