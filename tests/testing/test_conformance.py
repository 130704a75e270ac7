"""The conformance kit: a good fusion passes it, and each kind of bad one fails the check that is about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import Example, Match, Miss, PatternFusion, Precision, fused_op, rule
from fxopt.testing import CHECKS, check, conformance, without_inductor


@fused_op("test_kit_mish(Tensor x) -> Tensor")
def mish(x):
    return x * torch.tanh(F.softplus(x))


@mish.fake
def _(x):
    return torch.empty_like(x)


mish.implementation("decomposed")(mish.reference)


@dataclass(frozen=True)
class FuseMish(PatternFusion):
    """x * tanh(softplus(x)) -> test_kit_mish(x)"""

    def pattern(self, x):
        return x * torch.tanh(F.softplus(x))

    def rewrite(self, match):
        return match.call(mish, match["x"])

    def examples(self) -> Iterable[Example]:
        yield Example(lambda x: x * F.softplus(x).tanh(), lambda: (torch.randn(3, 4),))
        yield Example(lambda x: torch.tanh(F.softplus(x)) * x, lambda: (torch.randn(3, 4),), name="turned round")
        yield Example(lambda x: x * torch.tanh(F.softplus(x + 1)), lambda: (torch.randn(5),), refused="elsewhere")


pytest_plugins = ["pytester"]

test_a_good_fusion = conformance(FuseMish())
test_a_rule = conformance(rule("silu", lambda x: x * torch.sigmoid(x), lambda x: F.silu(x)))


def bad(**methods):
    return dataclass(frozen=True)(type("Bad", (FuseMish,), {"__doc__": FuseMish.__doc__, **methods}))()


def examples(*found):
    return {"examples": lambda self: iter(found)}


X = lambda: (torch.randn(3, 4),)  # noqa: E731

NONE = Example(lambda x: x.sin(), X, refused="something else")
TWO = Example(lambda x: x * F.softplus(x).tanh(), X, sites=2)


@pytest.mark.parametrize(
    "fusion, what, words",
    [
        (bad(__doc__=""), "described", "no docstring"),
        (bad(**examples()), "described", "none that must be found"),
        (bad(**examples(TWO)), "examples", "example 0: 1 sites, not 2"),
        (bad(**examples(NONE)), "examples", "not refused so"),
        (bad(rewrite=lambda self, m: m.call(torch.ops.aten.tanh.default, m["x"])), "examples", "undone: other values"),
        (bad(check=lambda self, m: Miss("not today")), "embedded", "not today"),
        (bad(find=lambda self, n, s: None), "embedded", "twice: 0 sites"),
    ],
    ids=["no docstring", "no examples", "too few", "no reason", "wrong numbers", "refuses", "finds nothing"],
)
def test_a_bad_one_fails(fusion, what, words, without_inductor):
    with pytest.raises(AssertionError, match=words):
        check(fusion, what)


def test_wrong_numbers_that_the_verifier_was_told_to_trust(without_inductor, monkeypatch):
    monkeypatch.setattr("fxopt.rewrite.verify.Verifier.verify", lambda *_: fxopt.Verdict("unchecked"))
    wrong = bad(rewrite=lambda self, m: m.call(torch.ops.aten.tanh.default, m["x"]))
    for what in ("float32", "bfloat16", "training", "embedded", "dynamic", "verified"):
        with pytest.raises(AssertionError):
            check(wrong, what)


def test_an_approximate_fusion_need_not_be_close(without_inductor):
    fusion = bad(precision=Precision.APPROXIMATE)
    for what in CHECKS:
        check(fusion, what)


def test_what_is_skipped_says_why(pytester):
    pytester.makepyfile(
        "from fxopt.testing import conformance\n"
        "from fxopt import rule\n"
        "import torch\n"
        "skip = dict.fromkeys(['examples', 'float32', 'bfloat16', 'float16', 'dynamic', 'training', 'embedded', "
        "'verified'], 'too slow')\n"
        "test = conformance(rule('exp-log', lambda x: x.exp().log(), lambda x: x), skip=skip)\n"
    )
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=8)
    with pytest.raises(ValueError, match=r"no check: \['flot32'\]"):
        conformance(FuseMish(), skip={"flot32": "typo"})


def test_the_kit_leaves_nothing_behind():
    import fxopt.backend

    before = fxopt.backend.compile_graph, dict(fxopt.fusions())
    with without_inductor():
        check(FuseMish(), "examples")
    assert (fxopt.backend.compile_graph, dict(fxopt.fusions())) == before


def test_match_is_public():
    assert fxopt.Match is Match
