"""Testing fusions: the conformance kit, as a function for a test file and as a pytest plugin.

    from fxopt.testing import conformance

    test_my_fusion = conformance(MyFusion())

or, for what is installed, `pytest --fxopt-fusion my_fusion`. The tests are made from the fusion's own `examples()`.
"""

from __future__ import annotations

from fxopt.testing.conformance import CHECKS, check, conformance
from fxopt.testing.running import without_inductor

__all__ = ["CHECKS", "check", "conformance", "without_inductor"]
