"""What beats what, and that a clock can tell a fast function from a slow one."""

from __future__ import annotations

import time

import pytest
import torch

from fxopt.tune import timing
from fxopt.tune.timing import Timing

CPU = torch.device("cpu")


@pytest.mark.parametrize("fast, slow, won", [
    (Timing(1.0), Timing(2.0), True),
    (Timing(1.0), Timing(1.02), False),  # within the margin
    (Timing(1.0, 0.2), Timing(1.3, 0.2), False),  # within the noise
    (Timing(1.0, 0.1), Timing(1.3, 0.1), True),
    (Timing(2.0), Timing(1.0), False),
])  # fmt: skip
def test_faster_is_faster_by_more_than_the_noise(fast, slow, won):
    assert fast.beats(slow) is won


def test_one_slow_round_of_seven_is_no_matter():
    calm, disturbed = Timing.of([1.0] * 7), Timing.of([1.0] * 6 + [50.0])
    assert disturbed == calm
    assert Timing.of([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]).spread >= 0.5


def test_the_clock_tells_slow_from_fast():
    fast, slow = timing.time_all([lambda x: None, lambda x: time.sleep(1e-3)], [(1,), (2,)], CPU)
    assert slow.seconds >= 1e-3
    assert fast.beats(slow)


def test_every_set_is_used_in_turn():
    seen = []
    timing.time_all([seen.append], [(1,), (2,), (3,)], CPU)
    assert set(seen) == {1, 2, 3}
    assert seen[:6] == [1, 2, 3, 1, 2, 3]


def test_large_arguments_need_fewer_sets():
    assert timing.argument_sets(1 << 30, CPU) == 2
    assert timing.argument_sets(1, CPU) == timing.MOST_SETS
    assert timing.argument_sets(8 << 20, CPU) == timing.CPU_CACHES // (8 << 20)


@pytest.mark.gpu
def test_on_a_gpu_weights_come_from_memory():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    weights = [(torch.randn(4096, 4096, device="cuda"),) for _ in range(timing.argument_sets(64 << 20, device))]
    whole, half = timing.time_all([lambda w: w.sum(), lambda w: w[:2048].sum()], weights, device)
    assert half.beats(whole)
    assert 64e6 / whole.seconds < 8e12
