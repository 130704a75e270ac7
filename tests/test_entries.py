"""Both entries find the same: a model rewritten before AOTAutograd, and the same model rewritten after it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import fxopt

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
    pytest.mark.usefixtures("without_inductor"),
]

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SMALL, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def text(**more):
    def inputs():
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, :3] = 0
        return {"input_ids": torch.arange(14).reshape(2, 7) * 5 % 64, "attention_mask": mask, **more}

    return inputs


def both():
    return {**text()(), "decoder_input_ids": torch.arange(10).reshape(2, 5) * 3 % 64}


def image():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def audio():
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.arange(10).reshape(2, 5) % 64}


CAUSAL = text(use_cache=False)
#: a gated MLP, and q and k rotated together
GATED_ROTARY = {"gated_mlp": 1, "rotary": 1}

#: model type -> (configuration, inputs, sites with attention spelled out)
MODELS = {
    "llama": (DECODER, CAUSAL, {"rms_norm": 3, "attention": 1, **GATED_ROTARY}),
    "qwen3": (DECODER, CAUSAL, {"rms_norm": 5, "attention": 1, **GATED_ROTARY}),
    "mistral": (DECODER, CAUSAL, {"rms_norm": 3, "attention": 1, **GATED_ROTARY}),
    "gemma2": ({**DECODER, "query_pre_attn_scalar": 8}, CAUSAL, {"rms_norm": 5, "attention": 1, **GATED_ROTARY}),
    "olmo2": (DECODER, CAUSAL, {"rms_norm": 5, "attention": 1, **GATED_ROTARY}),
    "phi": (ENCODER, CAUSAL, {"layer_norm": 2, "attention": 1, "rotary": 1}),
    "gpt_neox": (ENCODER, CAUSAL, {"layer_norm": 3, "attention": 1, "rotary": 1}),
    "gpt2": (GPT, CAUSAL, {"layer_norm": 3, "attention": 1}),
    "bloom": ({"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}, CAUSAL,
              {"layer_norm": 4, "attention": 1}),
    "opt": ({**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}, CAUSAL, {"layer_norm": 3, "attention": 1}),
    "bert": (ENCODER, text(), {"layer_norm": 3, "attention": 1}),
    "electra": ({**ENCODER, "embedding_size": 32}, text(), {"layer_norm": 3, "attention": 1}),
    "mpnet": (ENCODER, text(), {"layer_norm": 3, "attention": 1}),
    "deberta-v2": ({**ENCODER, "relative_attention": False}, text(), {"layer_norm": 3, "attention": 1}),
    "distilbert": ({"vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}, text(),
                   {"layer_norm": 3, "attention": 1}),
    "t5": ({"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}, both,
           {"rms_norm": 7, "attention": 3}),
    "bart": ({**BOTH, "max_position_embeddings": 64}, both, {"layer_norm": 7, "attention": 3}),
    "whisper": ({**BOTH, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}, audio,
                {"layer_norm": 7, "attention": 3}),
    "vit": (IMAGE, image, {"layer_norm": 3, "attention": 1}),
    "dinov2": (IMAGE, image, {"layer_norm": 3, "attention": 1}),
    "swin": ({"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4},
             image, {"layer_norm": 4, "attention": 1}),
}  # fmt: skip
#: one of each kind in every run; CI runs the others after it
QUICK = {("llama", "sdpa"), ("gpt2", "eager"), ("bert", "eager"), ("t5", "eager"), ("vit", "sdpa")}
CASES = [
    pytest.param(kind, attention, marks=() if (kind, attention) in QUICK else pytest.mark.slow)
    for kind in MODELS
    for attention in ("eager", "sdpa")
    if attention == "eager" or kind not in ("gemma2", "deberta-v2", "bloom", "mpnet")  # these spell attention out
]


def tiny(kind, attention, dtype=torch.float32):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind][0], attn_implementation=attention)
    return AutoModel.from_config(config).to(dtype).eval()


def run(model, inputs, **options):
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(model, backend="fxopt", options=options)(**inputs)[0]
    assert all(graph.normalized for graph in rec.graphs), [graph.reason for graph in rec.graphs]
    return out, rec


@pytest.mark.parametrize("kind, attention", CASES)
def test_both_entries_find_the_same(kind, attention, monkeypatch):
    _, make, sites = MODELS[kind]
    model, inputs = tiny(kind, attention), make()
    with torch.no_grad():
        expected = model(**inputs)[0]
    # That rewrites are right is checked here by the result itself; their own verification has its tests.
    first, before = run(model, inputs, verify="meta")
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "turned away by the test")
    second, after = run(model, inputs, verify="meta")
    assert {g.entry for g in before.graphs} == {"pre-dispatch"}
    assert {g.entry for g in after.graphs} == {"after AOTAutograd"}
    assert before.counts() == sites
    assert after.counts() == before.counts(), [m.reason for m in after.misses]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_verified_in_bfloat16(kind, monkeypatch):
    _, make, sites = MODELS[kind]
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "turned away by the test")
    model, inputs = tiny(kind, "sdpa", torch.bfloat16), make()
    out, rec = run(model, inputs)
    assert rec.counts() == sites
    assert {site.verdict.status for site in rec.sites} <= {"equal", "unchecked"}
    with torch.no_grad():
        eager, exact = model(**inputs)[0], model.double()(**inputs)[0]
    finite = exact.isfinite()
    own = (eager.double() - exact)[finite].abs().max()
    assert (out.double() - exact)[finite].abs().max() <= 2 * own


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_symbolic_sizes(kind, monkeypatch):
    _, make, sites = MODELS[kind]
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "turned away by the test")
    model, inputs = tiny(kind, "eager"), make()
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        out = torch.compile(model, backend="fxopt", dynamic=True)(**inputs)[0]
        torch.testing.assert_close(out, model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert rec.counts()["attention"] == sites["attention"]
