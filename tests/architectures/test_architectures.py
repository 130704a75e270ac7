"""Architectures of every kind: the sites that each has are found, and results and gradients are eager mode's.

Eager and SDPA attention, training and evaluation, float32 and bfloat16. Dropout draws the same numbers with and without
compilation, for both start from the same seed.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch.utils._pytree import tree_leaves

import architectures as table
import fxopt

ARCHITECTURES = table.ARCHITECTURES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

TOLERANCE = 1e-4  # of the output's largest element, in float32


def _runs():
    """(architecture, attention, mode, dtype) of every run."""
    for kind, model in ARCHITECTURES.items():
        yield kind, "eager", "train", "float32"
        yield kind, "eager", "eval", "bfloat16"
        if "sdpa" in model.attention:
            yield kind, "sdpa", "train", "float32"
            yield kind, "sdpa", "eval", "float32"
        else:
            yield kind, "eager", "eval", "float32"


RUNS = list(_runs())
FAST = {
    ("llama", "eager", "eval", "bfloat16"),
    ("mixtral", "eager", "train", "float32"),
    ("bert", "sdpa", "eval", "float32"),
    ("t5", "eager", "train", "float32"),
    ("vit", "sdpa", "train", "float32"),
    ("mamba2", "eager", "eval", "float32"),
}
#: with Inductor in full
INDUCTOR = [
    ("llama", "eager", "eval", "float32"),
    ("vit", "sdpa", "train", "float32"),
    ("lfm2", "eager", "eval", "float32"),
]


def _parameters(runs):
    return [pytest.param(*run, marks=[] if run in FAST else pytest.mark.slow, id="-".join(run)) for run in runs]


def build(kind, attention, dtype):
    """The model with weights large enough for errors to show: transformers' own make attention all but uniform."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind].config)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (parameter.shape[0] / parameter.numel()) ** 0.5, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def run(model, call, inputs):
    """The floating-point results of `call`, and in training the gradients of a random combination of them."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    torch.manual_seed(3)
    model.zero_grad()
    with torch.set_grad_enabled(model.training):
        results = [t for t in tree_leaves(call(**inputs).to_tuple()) if isinstance(t, torch.Tensor)]
    results = [t for t in results if t.is_floating_point()]
    if model.training:
        generator = torch.Generator().manual_seed(4)
        loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in results if t.requires_grad)
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in results], gradients


def error(results, references):
    """The largest difference, relative to the largest element of its tensor."""
    pairs = list(zip(results, references, strict=True))
    assert all(a.shape == b.shape and b.isfinite().all() for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def compare(kind, attention, mode, dtype):
    """Run the model both ways; what differs from the table or from eager mode is an assertion's failure."""
    expected = ARCHITECTURES[kind]
    model = build(kind, attention, getattr(torch, dtype)).train(mode == "train")
    inputs = expected.inputs()
    eager, eager_gradients = run(model, model, inputs)
    with fxopt.record() as rec:
        actual, gradients = run(model, torch.compile(model, backend="fxopt"), inputs)

    assert rec.counts() == expected.expected(attention, mode), rec
    passed = [graph.reason for graph in rec.graphs if graph.reason is not None]
    assert len(passed) == (mode in expected.passed)
    assert all(expected.passed[mode] in reason for reason in passed)
    if not passed:
        for fusion, (_, words) in expected.absent(attention, mode).items():
            assert any(words in miss.reason for miss in rec.misses if miss.fusion == fusion), rec

    if dtype == "bfloat16":
        exact, _ = run(full := copy.deepcopy(model).float(), full, inputs)
        assert error(actual, exact) <= 4 * error(eager, exact)
        return
    assert error(actual, eager) <= TOLERANCE
    assert gradients.keys() == eager_gradients.keys()
    largest = max((g.abs().max().item() for g in eager_gradients.values()), default=0.0)
    for name, gradient in eager_gradients.items():
        # That of a bias before a softmax is zero but for rounding, which is relative to the others.
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        assert (gradients[name] - gradient).abs().max().item() <= TOLERANCE * scale, name


@pytest.mark.parametrize("kind, attention, mode, dtype", _parameters(RUNS))
@pytest.mark.usefixtures("without_inductor")
def test_sites_results_and_gradients(kind, attention, mode, dtype):
    compare(kind, attention, mode, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind, attention, mode, dtype", INDUCTOR)
def test_with_inductor(kind, attention, mode, dtype):
    torch._dynamo.reset()
    compare(kind, attention, mode, dtype)


def test_the_table_covers_every_kind_of_model():
    assert len(ARCHITECTURES) >= 40
    assert {model.family for model in ARCHITECTURES.values()} == {
        "decoder", "encoder", "encoder-decoder", "vision", "audio", "multimodal", "moe", "state space", "hybrid",
    }  # fmt: skip
    assert set(RUNS) >= FAST


def test_at_most_one_run_in_a_hundred_passes_through():
    passed = [(kind, mode) for kind, _, mode, _ in RUNS if mode in ARCHITECTURES[kind].passed]
    assert len(passed) <= len(RUNS) / 100
