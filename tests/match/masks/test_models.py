"""The masks of transformers' models, as fxopt's normal form has them: read as what they are, right on other inputs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fxopt.match.masks import describe
from lifting import Capture
from mask_models import (
    BASE,
    DECODER,
    NO_HEAD_DIM,
    SLIDING,
    SPEECH,
    TWO_LAYERS,
    build,
    decoder,
    encoder_decoder,
    ids,
    packed,
    padding,
    speech,
    text,
    unpadded,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

PADDED = "keys padded (attention_mask)"
CAUSAL = f"causal, {PADDED}"
BIAS = "every key is live, a bias over (h, j-i)"
WINDOW = f"causal, window 4, {PADDED}"


# kind, configuration, inputs, the words of its masks (up to what empty rows give)
MODELS = {
    "llama": ("llama", DECODER, decoder, [CAUSAL]),
    "llama, no padding": ("llama", DECODER, unpadded, ["causal"]),
    "llama, packed": ("llama", DECODER, packed, ["causal, segments by cumsum"]),
    "mistral": ("mistral", {**DECODER, "sliding_window": 4}, decoder, [WINDOW]),
    "mistral, packed": ("mistral", {**DECODER, "sliding_window": 4}, packed, ["causal, window 4, segments by cumsum"]),
    "gemma2": ("gemma2", {**TWO_LAYERS, "query_pre_attn_scalar": 8, **SLIDING}, decoder, [WINDOW, CAUSAL]),
    "gemma3": ("gemma3_text", {**TWO_LAYERS, "query_pre_attn_scalar": 8, **SLIDING}, decoder, [WINDOW, CAUSAL]),
    "qwen2": ("qwen2", {**NO_HEAD_DIM, "use_sliding_window": False}, decoder, [CAUSAL]),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}, decoder, [CAUSAL]),
    "phi3": ("phi3", {**NO_HEAD_DIM, "sliding_window": 4}, decoder, [WINDOW]),
    "bert": ("bert", BASE, text, [PADDED]),
    "t5": (
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 64,
         "decoder_start_token_id": 0},
        encoder_decoder,
        [BIAS, PADDED, BIAS, "causal", "every key is live", PADDED],
    ),
    "whisper": ("whisper", SPEECH, speech, ["causal"]),
    "llama4": (
        "llama4_text",
        {**TWO_LAYERS, "attention_chunk_size": 4, "intermediate_size_mlp": 48, "num_local_experts": 2,
         "layer_types": ["chunked_attention", "full_attention"]},
        decoder,
        [f"causal, chunks of 4, {PADDED}", CAUSAL],
    ),
    "gpt_oss": (
        "gpt_oss", {**TWO_LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, decoder,
        [WINDOW, CAUSAL],
    ),
}  # fmt: skip
FAST = {("llama, no padding", False), ("llama, packed", True), ("gemma2", True), ("t5", False), ("llama4", False)}
CASES = [(name, dynamic) for name in MODELS for dynamic in (False, True)]


def words(program):
    return describe(program).partition(", empty rows")[0].partition(", rows may")[0]


@pytest.mark.parametrize(
    "name, dynamic", [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow) for c in CASES]
)
@torch.no_grad()
def test_masks_of_models(name, dynamic):
    kind, config, inputs, expected = MODELS[name]
    torch._dynamo.reset()
    capture = Capture()
    model = build(kind, **config)
    compiled = torch.compile(model, backend=capture, dynamic=dynamic)
    compiled(**inputs())
    assert [words(p) for p in capture.programs] == expected
    compiled(**inputs(left=2))
    if dynamic:
        compiled(**inputs(length=11, left=5))
    graphs = len(capture.graphs)
    assert sum(graph.runs for graph in capture.graphs) == (3 if dynamic else 2)
    assert graphs == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "dynamic, padded", [(False, False)] + [pytest.param(*c, marks=pytest.mark.slow) for c in [(0, 1), (1, 0), (1, 1)]]
)
def test_prefill_and_decoding_with_a_static_cache(dynamic, padded):
    """The cache's length is a tensor, and the first layer advances it before the last one reads the mask."""
    from transformers import StaticCache

    torch._dynamo.reset()
    model = build("llama", "sdpa", **TWO_LAYERS)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=ids(2, 3), past_key_values=cache)  # makes its tensors
    capture = Capture()
    compiled = torch.compile(model, backend=capture, dynamic=bool(dynamic))
    for length in (2, 2, 1, 1):
        more = {"attention_mask": padding(2, 16, 2)} if padded else {}
        compiled(input_ids=ids(2, length), past_key_values=cache, **more)
    assert len(capture.sites) in (4, 6)
    found = {words(p) for p in capture.programs}
    padded_too = f", {PADDED}" if padded else ""
    assert found == {f"causal from add_1[0] on{padded_too}", f"keys up to add_1[0]{padded_too}"}


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_dynamic_cache_offsets_the_rows(dynamic):
    from transformers import DynamicCache

    torch._dynamo.reset()
    model = build("llama", "sdpa", **DECODER)

    def cached(length):
        cache = DynamicCache(config=model.config)
        model(input_ids=ids(2, length), past_key_values=cache)
        return cache

    capture = Capture()
    compiled = torch.compile(model, backend=capture, dynamic=dynamic)
    for length in (4, 4, 6) if dynamic else (4,):
        compiled(input_ids=ids(2, 3), past_key_values=cached(length), attention_mask=padding(2, length + 3, 2))
    expected = "causal from s" if dynamic else "causal, +4"
    assert all(words(p).startswith(expected) and words(p).endswith(PADDED) for p in capture.programs)
    assert capture.sites
