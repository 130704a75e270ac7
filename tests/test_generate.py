"""transformers' own generate(), which compiles the decode step by itself when it is given a static cache."""

from __future__ import annotations

import pytest
import torch

import fxopt

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_generate_with_a_static_cache(device):
    from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval().to(device)
    ids = torch.randint(3, 128, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    config = CompileConfig(backend="fxopt", mode="reduce-overhead" if device == "cuda" else "default")
    config._compile_all_devices = True  # transformers compiles nothing on a CPU unless told to
    arguments = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

    expected = model.generate(ids, **arguments)
    torch._dynamo.reset()
    with fxopt.record() as rec:
        ours = model.generate(ids, **arguments, cache_implementation="static", compile_config=config)
    assert ours.tolist() == expected.tolist()
    assert rec.counts() == {"attention": 2, "rms_norm": 5, "gated_mlp": 2, "rotary": 2}
