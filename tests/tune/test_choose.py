"""The tuner: what is a candidate, what is verified, what is timed, what is remembered, and what is said about it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxopt.ops import Target, fused_op
from fxopt.tune import choose, may_pay, measure, session, store

CPU = Target(torch.device("cpu"), compiled=False)
TRAINING = dataclasses.replace(CPU, training=True)


@fused_op("test_tuned(Tensor x, float by=2.0) -> Tensor")
def tuned(x, by=2.0):
    return x * by


@tuned.fake
def _(x, by=2.0):
    return torch.empty_like(x)


def _configs(x, *_):
    return [{"BLOCK": b} for b in (4, 8, 64) if b <= x.shape[-1]]


@tuned.implementation("kernel", opaque=True, pays=lambda *_: "is believed to be slow", configs=_configs)
def _(x, by, *, config=None):
    if config == {"BLOCK": 4}:
        return x * by + 1  # what a miscompiled kernel gives
    if config == {"BLOCK": 8} and x.shape[0] == 3:
        raise RuntimeError("out of shared memory")
    return x * by


@tuned.implementation("elsewhere", when=lambda *_: "needs another machine")
def _(x, by):
    raise AssertionError


tuned.implementation("decomposed")(tuned.reference)
X = torch.randn(2, 8)


def chosen(mode="full", x=X, target=CPU):
    with session(mode, target):
        return choose(tuned, target, (x, 2.0))


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_what_is_not_known_is_not_timed(seconds, mode):
    found = chosen(mode)
    assert (found.implementation.name, found.config, seconds.asked) == ("decomposed", None, [])
    assert ("kernel", "is believed to be slow") in found.passed_over


def test_a_faster_kernel_is_used_from_then_on(seconds):
    seconds["kernel BLOCK=8"] = 0.5
    found = chosen()
    assert (found.implementation.name, found.config) == ("kernel", {"BLOCK": 8})
    assert found.note == "kernel BLOCK=8 takes 50% of the time of decomposed"
    assert ("elsewhere", "needs another machine") in found.passed_over
    asked = len(seconds.asked)
    store.clear()
    assert chosen().config == chosen("auto").config == {"BLOCK": 8}
    assert len(seconds.asked) == asked


def test_off_reads_nothing(seconds):
    seconds["kernel"] = 0.1
    assert chosen().implementation.name == "kernel"
    off = dataclasses.replace(CPU, opaque=False)
    assert chosen("off", target=off).implementation.name == "decomposed"


def test_a_wrong_kernel_is_never_timed(seconds):
    seconds["kernel BLOCK=4"] = 1e-9
    assert chosen().implementation.name == "decomposed"
    assert "kernel BLOCK=4" not in seconds.asked
    (entry,) = (e for e in store._memory.values() if e)
    assert "error" in entry.rejected["kernel BLOCK=4"]


def test_a_kernel_that_does_not_launch_is_left_out(seconds):
    seconds["kernel"] = 0.5
    assert chosen(x=torch.randn(3, 8)).config is None
    (entry,) = (e for e in store._memory.values() if e)
    assert "out of shared memory" in entry.rejected["kernel BLOCK=8"]


def test_within_the_noise_the_guess_stays(seconds):
    seconds |= {"kernel": 0.99, "kernel BLOCK=8": (0.8, 0.3), "decomposed": 1.0}
    found = chosen()
    assert found.implementation.name == "decomposed"
    assert "nothing is faster" in found.note


def test_another_shape_of_the_bucket_may_not_know_the_configuration(seconds):
    seconds["kernel BLOCK=64"] = 0.1
    assert chosen(x=torch.randn(2, 64)).config == {"BLOCK": 64}
    assert chosen(x=torch.randn(2, 62)).config is None  # its own bucket
    seconds.clear()
    assert chosen("auto", x=torch.randn(2, 64)).config == {"BLOCK": 64}
    (signature,) = (s for s, e in store._memory.items() if e and e.config == {"BLOCK": 64})
    store.save(signature, dataclasses.replace(store.load(signature), config={"BLOCK": 5}))
    assert chosen("auto", x=torch.randn(2, 64)).implementation.name == "decomposed"


def test_training_is_not_timed(seconds):
    assert chosen(target=TRAINING).implementation.name == "decomposed"
    assert seconds.asked == []


def test_deterministic_algorithms_are_not_chosen_by_the_clock(seconds):
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen().implementation.name == "decomposed"
    finally:
        torch.use_deterministic_algorithms(False)
    assert seconds.asked == []


def test_one_of_several_processes_times_nothing(seconds, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert chosen().implementation.name == "decomposed"
    assert seconds.asked == []


def test_too_much_to_measure(seconds, monkeypatch):
    monkeypatch.setattr(measure, "LIMIT", {"cpu": 10})
    assert chosen().implementation.name == "decomposed"
    assert seconds.asked == []


def test_a_clock_that_fails_costs_nothing(monkeypatch, seconds):
    monkeypatch.setattr("fxopt.tune.timing.time_all", lambda *a: 1 / 0)
    assert chosen().implementation.name == "decomposed"
    assert not any(store._memory.values())


def test_an_opaque_call_is_charged_for_its_result(seconds, monkeypatch):
    compiled = dataclasses.replace(CPU, compiled=True)
    monkeypatch.setattr(measure, "_callable", lambda c, *_: c.implementation.configured(c.config))
    seconds |= {"kernel": 0.5, "copy": 0.6}
    assert chosen(target=compiled).implementation.name == "decomposed"
    store.clear()
    [file.unlink() for file in store.cachedir.cachedir("tune").iterdir()]
    seconds["copy"] = 0.3
    assert chosen(target=compiled).implementation.name == "kernel"


def test_the_random_state_and_the_inputs_stay(seconds):
    state, before = torch.get_rng_state(), X.clone()
    chosen()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(X, before)


def test_what_may_pay(seconds):
    assert not may_pay(tuned, X)  # nobody compiles
    with session("auto", CPU):
        assert not may_pay(tuned, X)
    with session("full", CPU):
        assert may_pay(tuned, X)
    with session("full", TRAINING):
        assert not may_pay(tuned, X)
    seconds["kernel"] = 0.5
    chosen()
    with session("auto", CPU):
        assert may_pay(tuned, X)
        assert not may_pay(tuned, torch.randn(5, 8))


def test_what_was_measured_not_to_pay(seconds):
    chosen()
    with session("full", CPU):
        assert not may_pay(tuned, X)


@fused_op("test_packed(Tensor x, Tensor q, ScalarType? round_to=None) -> Tensor")
def packed(x, q, round_to=None):
    return x[q.to(torch.int64)].to(round_to or x.dtype)


packed.fake(lambda x, q, round_to=None: x.new_empty(q.shape, dtype=round_to or x.dtype))
packed.implementation("other", pays=lambda *_: "no")(packed.reference)
packed.implementation("decomposed")(packed.reference)


@packed.draw
def _(x, q, round_to):
    return torch.randn(x.shape).to(x.dtype), torch.randint(0, x.shape[0], q.shape).to(q.dtype), round_to


def test_an_op_draws_its_own_arguments_and_dtypes_are_widened(seconds, monkeypatch):
    drawn = []
    monkeypatch.setattr(packed, "drawn", lambda *a, f=packed.drawn: drawn.append(f(*a)) or drawn[-1])
    seconds["other"] = 0.1
    with session("full", CPU):
        found = choose(packed, CPU, (torch.randn(4), torch.zeros(300, dtype=torch.int32), torch.bfloat16))
    assert found.implementation.name == "other"
    assert all(len(q.unique()) == 4 for _, q, _ in drawn)


@pytest.mark.parametrize("like", [
    torch.empty(3, 4).t(), torch.empty(1, 4).expand(3, 4), torch.empty(3, 8)[:, ::2], torch.empty(0, 4),
    torch.empty(2, 3, dtype=torch.int64), torch.empty(2, 3, dtype=torch.bool), torch.empty((), dtype=torch.complex64),
    torch.empty(2, 3, dtype=torch.float8_e4m3fn),
])  # fmt: skip
def test_drawn_like(like):
    meta = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    drawn = measure._random(meta, torch.device("cpu"))
    assert (drawn.shape, drawn.stride(), drawn.dtype) == (like.shape, like.stride(), like.dtype)


def test_configs_need_a_keyword():
    with pytest.raises(ValueError, match="takes no keyword config"):
        tuned.implementation("bad", configs=_configs)(lambda x, by: x)


def test_a_configuration_is_an_argument_of_the_call(assert_as_good_as):
    kernel = tuned.implementations[0]
    x = torch.randn(2, 8, requires_grad=True)
    torch.library.opcheck(kernel.overload, (x, 3.0), {"config": "BLOCK=8"})
    (kernel.overload(x, 3.0, config="BLOCK=4").sum()).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert torch.equal(kernel.overload(X, 3.0, config="BLOCK=4"), X * 3.0 + 1)
    assert torch.equal(tuned.run("kernel", X, 3.0, config={"BLOCK": 4}), X * 3.0 + 1)
