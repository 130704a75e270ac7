"""Whole models in training: the same loss and the same gradients as eager mode, with fusions inside."""

from __future__ import annotations

import pytest
import torch

import fxopt

IDS = torch.randint(3, 64, (2, 12))
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(attention):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=64, attn_implementation=attention)
    return LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def bert(attention):
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES, vocab_size=64, attn_implementation=attention)), {
        "input_ids": IDS,
        "labels": IDS,
        "attention_mask": (IDS > 10).long(),
    }


def t5(attention):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS}


def vit(attention):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5, attn_implementation=attention)
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "labels": torch.tensor([1, 4]),
    }


pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make, mode, sites",
    [
        (llama, "train", {"attention": 2, "rms_norm": 5, "gated_mlp": 2, "rotary": 2}),
        (bert, "eval", {"attention": 2, "layer_norm": 6}),
        (bert, "train", {"layer_norm": 6}),  # its dropout is active within attention
        (vit, "eval", {"attention": 2, "layer_norm": 5}),
    ],
    ids=["llama", "bert", "bert with dropout", "vit"],
)
def test_loss_and_gradients(make, mode, sites, attention):
    torch.manual_seed(0)
    model, inputs = make(attention)
    model.train(mode == "train")
    results = []
    for compiled in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)  # dropout draws the same numbers
        with fxopt.record() as rec:
            loss = (torch.compile(model, backend="fxopt") if compiled else model)(**inputs).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert rec.counts() == sites
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_t5_loss_and_gradients():
    test_loss_and_gradients(t5, "eval", {"attention": 6, "rms_norm": 12}, "eager")
