"""fxopt: a torch.compile backend that finds attention, norms and quantised matmuls, fuses them, checks and tells.

    torch.compile(model, backend="fxopt")

The names below load on first use, so that importing fxopt costs nothing until something is asked of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.match.match import Match as Match
    from fxopt.match.miss import Miss as Miss
    from fxopt.match.miss import NearMiss as NearMiss
    from fxopt.match.pattern import OneOf as OneOf
    from fxopt.match.pattern import Opt as Opt
    from fxopt.match.pattern import cast as cast
    from fxopt.match.pattern import upcast as upcast
    from fxopt.ops import Target as Target
    from fxopt.ops import fused_op as fused_op
    from fxopt.options import OptionError as OptionError
    from fxopt.options import Options as Options
    from fxopt.rewrite.fusion import Example as Example
    from fxopt.rewrite.fusion import Fusion as Fusion
    from fxopt.rewrite.fusion import Precision as Precision
    from fxopt.rewrite.fusion import Step as Step
    from fxopt.rewrite.fusion import Verdict as Verdict
    from fxopt.rewrite.pattern_fusion import PatternFusion as PatternFusion
    from fxopt.rewrite.plugins import fusions as fusions
    from fxopt.rewrite.plugins import register as register
    from fxopt.rewrite.plugins import unregister as unregister
    from fxopt.rewrite.rule import rule as rule
    from fxopt.view.bisection import Bisection as Bisection
    from fxopt.view.bisection import bisect as bisect
    from fxopt.view.explain import Explanation as Explanation
    from fxopt.view.explain import explain as explain
    from fxopt.view.record import record as record
    from fxopt.view.report import Report as Report
    from fxopt.view.report import Site as Site
    from fxopt.view.show import view as view

__version__ = "0.1.0"

_HOMES = {
    "Match": "fxopt.match.match",
    "Miss": "fxopt.match.miss",
    "NearMiss": "fxopt.match.miss",
    "OneOf": "fxopt.match.pattern",
    "Opt": "fxopt.match.pattern",
    "cast": "fxopt.match.pattern",
    "upcast": "fxopt.match.pattern",
    "Target": "fxopt.ops",
    "fused_op": "fxopt.ops",
    "OptionError": "fxopt.options",
    "Options": "fxopt.options",
    "Example": "fxopt.rewrite.fusion",
    "Fusion": "fxopt.rewrite.fusion",
    "Precision": "fxopt.rewrite.fusion",
    "Step": "fxopt.rewrite.fusion",
    "Verdict": "fxopt.rewrite.fusion",
    "PatternFusion": "fxopt.rewrite.pattern_fusion",
    "fusions": "fxopt.rewrite.plugins",
    "register": "fxopt.rewrite.plugins",
    "unregister": "fxopt.rewrite.plugins",
    "rule": "fxopt.rewrite.rule",
    "Bisection": "fxopt.view.bisection",
    "bisect": "fxopt.view.bisection",
    "Explanation": "fxopt.view.explain",
    "explain": "fxopt.view.explain",
    "record": "fxopt.view.record",
    "Report": "fxopt.view.report",
    "Site": "fxopt.view.report",
    "view": "fxopt",  # the package itself, which can be called
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxopt' has no attribute {name!r}")
    if name == "view":
        return importlib.import_module("fxopt.view")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
