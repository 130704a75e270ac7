"""The tuner in a compilation: it decides what stands in the graph, the report says so, and results stay right."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.ops import fused_op
from fxopt.tune import store


@fused_op("test_tuned_cap(Tensor x, float cap) -> Tensor")
def capped(x, cap):
    return cap * torch.tanh(x / cap)


@capped.fake
def _(x, cap):
    return torch.empty_like(x)


USED = []


@capped.implementation("slow", opaque=True, configs=lambda x, *_: [{"BLOCK": 8}])
def _(x, cap, *, config=None):
    USED.append(config)
    time.sleep(2e-4)
    return cap * torch.tanh(x / cap)


capped.implementation("decomposed")(capped.reference)


@dataclass(frozen=True)
class FuseTestCap(fxopt.PatternFusion):
    """cap * tanh(x / cap) -> test_tuned_cap(x, cap)"""

    def pattern(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def rewrite(self, match):
        return match.call(capped, match["x"], match["cap"])


@pytest.fixture(autouse=True)
def _registered():
    fxopt.register(FuseTestCap())
    torch._dynamo.reset()
    yield
    fxopt.unregister("test_cap")


def logits(x):
    return 30.0 * torch.tanh((x + 1) / 30.0)


def sites(tune, x, program=logits):
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="fxopt", options={"tune": tune, "fusions": ["test_cap"]})
    with fxopt.record() as rec, torch.no_grad():
        torch.testing.assert_close(compiled(x), program(x))
    (site,) = rec.sites
    return site


def test_a_slow_kernel_is_found_out_once(monkeypatch):
    x = torch.randn(4, 16)
    assert sites("auto", x).implementation == "slow"  # its own rules know no better
    site = sites("full", x)
    assert site.implementation == "decomposed"
    assert (site.passed_over[0][0], site.passed_over[0][1][:26]) == ("slow", "measured: decomposed takes")
    monkeypatch.setattr("fxopt.tune.choice.measure", lambda *_: pytest.fail("measured twice"))
    assert sites("full", x).implementation == sites("auto", x).implementation == "decomposed"
    assert sites("auto", torch.randn(100, 700)).implementation == "slow"


def test_a_configuration_reaches_the_kernel():
    kernel = capped.implementations[0]
    x = torch.randn(4, 16)
    sites("full", x)
    ((signature, entry),) = ((s, e) for s, e in store._memory.items() if e)
    won = store.Entry(entry.key, "slow", {"BLOCK": 8}, note="told so")
    store.save(signature, won)
    USED.clear()
    with fxopt.record() as rec, torch.no_grad():
        torch._dynamo.reset()
        torch.compile(logits, backend="fxopt", options={"fusions": ["test_cap"]})(x)
    assert rec.sites[0].implementation == kernel.name
    assert USED == [{"BLOCK": 8}]
    (code,) = (code for graph in rec.graphs for code in graph.generated.values())
    assert code.startswith("# measured: told so")


@pytest.mark.slow
def test_under_the_second_entry_too():
    def program(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x.mT
        return logits(y.float())

    x = torch.randn(16, 16)
    site = sites("full", x, program)
    assert site.implementation == "decomposed"
    assert site.passed_over[0][1].startswith("measured")
    assert sites("auto", x, program).implementation == "decomposed"


def test_symbolic_sizes_are_measured_at_their_first_example_and_stay_symbolic():
    compiled = torch.compile(
        logits, backend="fxopt", dynamic=True, options={"tune": "full", "fusions": ["test_cap"]}, fullgraph=True
    )
    with fxopt.record() as rec, torch.no_grad():
        for rows in (4, 9, 33):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), logits(x))
    assert [site.implementation for site in rec.sites] == ["decomposed"]


def test_bundled_ops_are_measured_on_the_cpu():
    """A norm op by op and compiled: whatever is chosen was compared, and is right."""

    def norm(x, w):
        return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    compiled = torch.compile(norm, backend="fxopt", options={"tune": "full"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, w), norm(x, w), rtol=2e-2, atol=2e-2)
