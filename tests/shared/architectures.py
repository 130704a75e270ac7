"""Forty-three architectures, built tiny from transformers' own configurations, and the sites that each of them has.

`sites` is read off the architecture: layers times sites a layer, as the comments say. `missing` are those of them that
stay as they are, with words of the near miss that says why; what must be found is the difference. A key
"where: fusion" is about one way to run the model only: "eager" or "sdpa" attention, "train" or "eval".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = Callable[[], dict[str, torch.Tensor]]

DROPOUT = "dropout"  # what it drops of the weights must be drawn as eager mode draws it


@dataclass(frozen=True)
class Architecture:
    """One model type, tiny. `attention` are the implementations that transformers has for it."""

    family: str
    config: Mapping[str, Any]
    inputs: Inputs
    sites: Mapping[str, int]
    missing: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    attention: tuple[str, ...] = ("eager", "sdpa")
    passed: Mapping[str, str] = field(default_factory=dict)  # mode -> words of the reason to leave its graph untouched

    def absent(self, attention: str, mode: str) -> dict[str, tuple[int, str]]:
        """Fusion -> sites that are not found when the model is run so, and words of the reason."""
        if mode in self.passed:
            return {fusion: (count, self.passed[mode]) for fusion, count in self.sites.items()}
        split = {key: key.rpartition(": ") for key in self.missing}
        return {
            fusion: self.missing[key] for key, (where, _, fusion) in split.items() if where in ("", attention, mode)
        }

    def expected(self, attention: str, mode: str) -> dict[str, int]:
        """Fusion -> sites that must be found when the model is run so."""
        absent = self.absent(attention, mode)
        left = {fusion: count - absent.get(fusion, (0, ""))[0] for fusion, count in self.sites.items()}
        return {fusion: count for fusion, count in left.items() if count}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(rows: int = 2, length: int = 7, step: int = 5) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * step % 60 + 3


def text(**more: Any) -> Inputs:
    """Two rows of tokens, the second with padding on the left: its first rows have no live key under a causal mask."""

    def make() -> dict[str, Any]:
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, :3] = 0
        return {"input_ids": _ids(), "attention_mask": mask, **more}

    return make


def both(**more: Any) -> Inputs:
    return lambda: {**text(**more)(), "decoder_input_ids": _ids(2, 5, 3)}


def image(size: int = 16) -> Inputs:
    return lambda: {"pixel_values": _random(2, 3, size, size)}


def waveform() -> dict[str, torch.Tensor]:
    return {"input_values": _random(2, 400)}


def spectrogram(*shape: int, name: str = "input_features", **more: Any) -> Inputs:
    return lambda: {name: _random(*shape), **more}


DECODE = text(use_cache=False)
BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DECODER = {**BASE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
NO_HEAD_DIM = {k: v for k, v in DECODER.items() if k != "head_dim"}
MOE = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {k: BASE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")} | {
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TWO_STACKS = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CLIP_TEXT = {**BASE, "max_position_embeddings": 16, "projection_dim": 16}
CLIP_VISION = {**VISION, "projection_dim": 16}
#: a gated MLP a layer, and q and k rotated together
GATED_ROTARY = {"gated_mlp": 2, "rotary": 2}

ARCHITECTURES: dict[str, Architecture] = {
    # Decoders: an attention a layer; norms before attention and MLP, and a last one.
    "llama": Architecture("decoder", DECODER, DECODE, {"attention": 2, "rms_norm": 2 * 2 + 1, **GATED_ROTARY}),
    # + norms of q and k
    "qwen3": Architecture("decoder", DECODER, DECODE, {"attention": 2, "rms_norm": 2 * 4 + 1, **GATED_ROTARY}),
    "gemma2": Architecture(
        "decoder", {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4}, DECODE,
        {"attention": 2, "rms_norm": 2 * 4 + 1, **GATED_ROTARY},  # norms after attention and MLP too
        attention=("eager",),
    ),
    "gemma3_text": Architecture(
        "decoder",
        {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention"]},
        DECODE,
        {"attention": 2, "rms_norm": 2 * 6 + 1, **GATED_ROTARY},  # before and after both, and of q and k
    ),
    "phi3": Architecture("decoder", NO_HEAD_DIM, DECODE, {"attention": 2, "rms_norm": 2 * 2 + 1, **GATED_ROTARY}),
    "olmo2": Architecture("decoder", NO_HEAD_DIM, DECODE, {"attention": 2, "rms_norm": 2 * 4 + 1, **GATED_ROTARY}),
    # parallel block
    "cohere": Architecture("decoder", NO_HEAD_DIM, DECODE, {"attention": 2, "layer_norm": 2 * 1 + 1, **GATED_ROTARY}),
    "starcoder2": Architecture("decoder", NO_HEAD_DIM, DECODE, {"attention": 2, "layer_norm": 2 * 2 + 1, "rotary": 2}),
    "gpt2": Architecture(
        "decoder", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, DECODE,
        {"attention": 2, "layer_norm": 2 * 2 + 1}, {"train: attention": (2, DROPOUT)},
    ),
    "gpt_neox": Architecture("decoder", BASE, DECODE, {"attention": 2, "layer_norm": 2 * 2 + 1, "rotary": 2}),
    "bloom": Architecture(
        "decoder", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, DECODE,
        {"attention": 2, "layer_norm": 1 + 2 * 2 + 1}, attention=("eager",),  # a norm of the embeddings; ALiBi
    ),
    "opt": Architecture(
        "decoder", {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, DECODE,
        {"attention": 2, "layer_norm": 2 * 2 + 1},
    ),
    # Mixtures of experts
    "mixtral": Architecture(
        "moe", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, DECODE,
        {"attention": 2, "rms_norm": 2 * 2 + 1, **GATED_ROTARY},
    ),
    "qwen3_moe": Architecture(
        "moe", {**MOE, "num_experts": 4}, DECODE, {"attention": 2, "rms_norm": 2 * 4 + 1, **GATED_ROTARY},
    ),
    "gpt_oss": Architecture(
        "moe", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, DECODE,
        {"attention": 2, "rms_norm": 2 * 2 + 1, **GATED_ROTARY},
        attention=("eager",),
    ),
    "deepseek_v3": Architecture(
        "moe",
        {**BASE, "num_key_value_heads": 4, "max_position_embeddings": 64, "q_lora_rank": 16, "kv_lora_rank": 16,
         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1,
         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        # + norms of the low-rank q and kv
        DECODE, {"attention": 2, "rms_norm": 2 * 4 + 1, "gated_mlp": 3, "rotary": 4},
    ),
    # Encoders: norms after attention and MLP, and one of the embeddings.
    "bert": Architecture(
        "encoder", BASE, text(), {"attention": 2, "layer_norm": 1 + 2 * 2}, {"train: attention": (2, DROPOUT)},
    ),
    "distilbert": Architecture(
        "encoder", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, text(),
        {"attention": 2, "layer_norm": 1 + 2 * 2}, {"train: attention": (2, DROPOUT)},
    ),
    "albert": Architecture(
        "encoder", {**BASE, "embedding_size": 16, "inner_group_num": 1}, text(),
        {"attention": 2, "layer_norm": 1 + 2 * 2},
    ),
    "deberta-v2": Architecture(
        "encoder",
        {**BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64}, text(),
        {"attention": 2, "layer_norm": 1 + 2 * 2}, {"train: attention": (2, DROPOUT)}, attention=("eager",),
    ),
    "modernbert": Architecture(
        "encoder",
        {**BASE, "max_position_embeddings": 64, "local_attention": 4, "global_attn_every_n_layers": 2,
         "cls_token_id": 1, "sep_token_id": 2},
        text(),
        # before both, but not before the first attention
        {"attention": 2, "layer_norm": 1 + (2 * 2 - 1) + 1, **GATED_ROTARY},
    ),
    "esm": Architecture(
        "encoder",
        {**BASE, "position_embedding_type": "rotary", "emb_layer_norm_before": True, "mask_token_id": 3}, text(),
        {"attention": 2, "layer_norm": 1 + 2 * 2 + 1, "rotary": 2}, {"train: attention": (2, DROPOUT)},
    ),
    # Encoder-decoders: attention in each encoder layer, two in each decoder layer; a norm before (or after) each part.
    "t5": Architecture(
        "encoder-decoder", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        both(use_cache=False), {"attention": 2 + 4, "rms_norm": (2 * 2 + 1) + (2 * 3 + 1)},
        {"train: attention": (6, DROPOUT)}, attention=("eager",),
    ),
    "bart": Architecture(
        "encoder-decoder", TWO_STACKS, both(use_cache=False),
        {"attention": 2 + 4, "layer_norm": (1 + 2 * 2) + (1 + 2 * 3)},
    ),
    "mbart": Architecture(
        "encoder-decoder", TWO_STACKS, both(use_cache=False),
        {"attention": 2 + 4, "layer_norm": (1 + 2 * 2 + 1) + (1 + 2 * 3 + 1)},
    ),
    # Vision
    "vit": Architecture("vision", VISION, image(), {"attention": 2, "layer_norm": 2 * 2 + 1}),
    "dinov2": Architecture("vision", {**VISION, "mlp_ratio": 2}, image(), {"attention": 2, "layer_norm": 2 * 2 + 1}),
    "beit": Architecture(
        "vision", {**VISION, "use_relative_position_bias": True}, image(),
        {"attention": 2, "layer_norm": 2 * 2 + 1},  # the last one is the pooler's
    ),
    "swin": Architecture(
        "vision",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        image(), {"attention": 3, "layer_norm": 1 + 3 * 2 + 1 + 1},  # of the patches, 2 a block, of the merging, last
        attention=("eager",),
    ),
    "segformer": Architecture(
        "vision", {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
                   "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
        image(), {"attention": 2, "layer_norm": 2 * (1 + 2 + 1) + 1},  # a stage: patches, 2 a block, last; a reduction
        attention=("eager",),
    ),
    "convnext": Architecture(
        "vision", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 2, "image_size": 16},
        image(), {"layer_norm": 1 + 2 * 1 + 1 + 1},  # of the patches, one a block, before the downsampling, last
        attention=("eager",),
    ),
    # Audio
    "whisper": Architecture(
        "audio",
        {**{k: v for k, v in TWO_STACKS.items() if k != "max_position_embeddings"}, "num_mel_bins": 8,
         "max_source_positions": 10, "max_target_positions": 16},
        spectrogram(2, 8, 20, decoder_input_ids=_ids(2, 5, 3), use_cache=False),
        {"attention": 2 + 4, "layer_norm": (2 * 2 + 1) + (2 * 3 + 1)},
    ),
    "wav2vec2": Architecture(
        "audio",
        {**BASE, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "mask_time_prob": 0.0},
        # of the features, before the first layer, 2 a layer
        waveform, {"attention": 2, "layer_norm": 1 + 1 + 2 * 2, "group_norm": 1},
        {"train: attention": (2, DROPOUT)},
    ),
    "audio-spectrogram-transformer": Architecture(
        "audio", {**VISION, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        spectrogram(2, 24, 16, name="input_values"), {"attention": 2, "layer_norm": 2 * 2 + 1},
    ),
    # Multimodal
    "clip": Architecture(
        "multimodal", {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16},
        lambda: {**text()(), **image()()},
        # the image's has a norm before its layers
        {"attention": 2 + 2, "layer_norm": (2 * 2 + 1) + (1 + 2 * 2 + 1), "l2_norm": 2},
    ),
    "siglip": Architecture(
        "multimodal", {"text_config": {**CLIP_TEXT, "projection_size": 32}, "vision_config": VISION},
        lambda: {"input_ids": _ids(), **image()()},
        # + pooling by attention, and its norm
        {"attention": 2 + 2 + 1, "layer_norm": (2 * 2 + 1) + (2 * 2 + 1) + 1, "l2_norm": 2},
    ),
    "llava": Architecture(
        "multimodal",
        {"text_config": {**DECODER, "model_type": "llama"}, "image_token_index": 60, "vision_feature_layer": -1,
         "vision_config": {**CLIP_VISION, "model_type": "clip_vision_model"}},
        lambda: {
            "input_ids": torch.tensor([[1, 60, 60, 60, 60, 5, 6], [1, 60, 60, 60, 60, 9, 8]]),
            "use_cache": False, **image()(),
        },
        # the image's last norm is not used
        {"attention": 2 + 2, "rms_norm": 2 * 2 + 1, "layer_norm": 1 + 2 * 2, **GATED_ROTARY},
    ),
    # State-space models and hybrids
    "mamba": Architecture(
        "state space", {**BASE, "state_size": 8, "expand": 2, "time_step_rank": 4}, DECODE,
        {"rms_norm": 2 + 1, "gated_mlp": 2},
        attention=("eager",),  # its associative scan is a vmap
    ),
    "mamba2": Architecture(
        "state space",
        {**BASE, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 4},
        DECODE, {"rms_norm": 2 * 2 + 1, "gated_mlp": 2}, attention=("eager",),  # and the gated one within each layer
    ),
    "rwkv": Architecture(
        "state space",
        {**{k: BASE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")},
         "attention_hidden_size": 32, "context_length": 16},
        lambda: {"input_ids": _ids(), "use_cache": False},
        {"layer_norm": 1 + 2 * 2 + 1, "gated_mlp": 4}, attention=("eager",),  # of the embeddings, 2 a layer, last
    ),
    "bamba": Architecture(
        "hybrid",
        {**NO_HEAD_DIM, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
         "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 4},
        # + the gated one within the Mamba layer
        DECODE, {"attention": 1, "rms_norm": 2 * 2 + 1 + 1, "gated_mlp": 3, "rotary": 1},
    ),
    "recurrent_gemma": Architecture(
        "hybrid",
        {**DECODER, "lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
        DECODE, {"attention": 1, "rms_norm": 2 * 2 + 1, "gated_mlp": 4, "rotary": 1},
        {"train: gated_mlp": (1, "autograd_function_apply lies between")},  # the gated recurrence
    ),
    "lfm2": Architecture(
        "hybrid", {**NO_HEAD_DIM, "layer_types": ["conv", "full_attention"]}, DECODE,
        # + norms of q and k where there is attention
        {"attention": 1, "rms_norm": 2 * 2 + 2 + 1, "gated_mlp": 2, "rotary": 1},
    ),
}  # fmt: skip
