"""What the compiled forward keeps for the backward: never more than under plain Inductor, and less where scores go."""

from __future__ import annotations

import pytest
import torch

import saved_memory as saved

ALONE = saved.fusions(torch.float32)
QUICK = ("attention, grouped heads", "attention, mask filled in", "add, RMSNorm", "int8_matmul, learnt scale and bias")
#: SDPA keeps a row of the result and a number, a softmax the row of weights: so much less for 64 keys of width 32
LESS = ("attention, grouped heads", "attention, causal")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALONE])
def test_each_fusion_alone(name):
    inductor, ours, counts = saved.compare(*ALONE[name])
    assert sum(counts.values()) == 1
    assert ours <= inductor
    if name in LESS:
        assert ours < inductor / 2


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Llama, padded", "BERT", "BERT, padded", "ViT", "T5, padded"])
def test_models(name, attention):
    inductor, ours, counts = saved._model(dict(saved.models(attention))[name], torch.float32)
    assert counts["attention"] >= 2
    assert ours <= inductor


def test_the_count_sees_what_is_saved():
    """A program that must keep one tensor of its own: its bytes, no more."""
    x = torch.randn(8, 16, requires_grad=True)
    assert saved.saved_bytes(lambda x: (x @ x.mT).softmax(-1) @ x, (x,), saved.partitioned) >= 8 * 8 * 4
    assert saved.saved_bytes(lambda x: x * 2, (x,), saved.partitioned) == 0
