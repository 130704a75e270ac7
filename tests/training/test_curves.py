"""Fifty optimiser steps of Llama, BERT, ViT and T5: the loss curve is eager mode's, within what rounding makes of it.

Rounding errors of one step change the weights of the next, so two float32 curves drift apart whatever computes them.
How far is measured, not guessed: the same run in float64 is the truth, and eager mode's own distance from it is what
float32 costs this model. fxopt may be four times as far away (sums in another order are another draw from the same
distribution, and the largest of fifty is taken), or as far as two units in the last place of the loss. AdamW's eps
keeps it from dividing rounding errors by themselves where a gradient is zero (the bias of the keys).
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import fxopt

STEPS = 50
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def text(**more):
    ids = torch.randint(3, 64, (4, 12))
    return {"input_ids": ids, "labels": ids} | more


def padding():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 8:] = mask[2, 5:] = 0
    return {"attention_mask": mask}


def llama(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes, num_key_value_heads=2, vocab_size=64)), text()


class Wide(TorchFunctionMode):
    """What asks for float32 gets float64: models compute norms and softmaxes in float32 whatever they are given."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return func(*args, **kwargs)


def bert():
    from transformers import BertConfig, BertForMaskedLM

    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **dropout, vocab_size=64, attn_implementation="eager")
    return BertForMaskedLM(config), text(**padding())


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5, attn_implementation="eager")
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(4, 3, 32, 32),
        "labels": torch.tensor([1, 4, 0, 2]),
    }


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)), text(**padding())


def curve(model, inputs, run):
    """The losses of STEPS steps over three batches in turn."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6)
    dtype = next(model.parameters()).dtype
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    losses = []
    for step in range(STEPS):
        loss = run(**{name: t.roll(step % 3, 0)[:3] for name, t in inputs.items()}).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def compare(make, sites):
    model, inputs = make()
    model.train()
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    torch._dynamo.reset()
    with fxopt.record() as rec:
        mine = curve(ours, inputs, torch.compile(ours, backend="fxopt"))
    eager = curve(model, inputs, model)
    with Wide():
        truth = curve(exact, inputs, exact)
    assert truth[-10:].mean() < 0.8 * truth[:10].mean(), "nothing was learnt: the curve says little"
    for graph in rec.graphs:
        assert {f: sum(s.fusion == f for s in graph.sites) for f in sites} == sites
    own = (eager - truth).abs().max()
    unit = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (mine - truth).abs().max() <= 4 * own + 2 * unit, f"eager is {own:.2e} away"


def test_llama_without_inductor(without_inductor):
    compare(functools.partial(llama, num_hidden_layers=1), {"attention": 1, "rms_norm": 3, "gated_mlp": 1, "rotary": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, sites",
    [
        (llama, {"attention": 2, "rms_norm": 5, "gated_mlp": 2, "rotary": 2}),
        (bert, {"attention": 2, "layer_norm": 6}),
        (vit, {"attention": 2, "layer_norm": 5}),
        (t5, {"attention": 6, "rms_norm": 12}),
    ],
    ids=["llama", "bert", "vit", "t5"],
)
def test_with_inductor(make, sites):
    compare(make, sites)
