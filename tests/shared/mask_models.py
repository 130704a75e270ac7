"""Models whose masks are read, and inputs that give them padded, packed and unpadded ones."""

from __future__ import annotations

import torch

BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DECODER = {**BASE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
NO_HEAD_DIM = {k: v for k, v in DECODER.items() if k != "head_dim"}
TWO_LAYERS = {**DECODER, "num_hidden_layers": 2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SPEECH = {"vocab_size": 64, "num_mel_bins": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
          "max_source_positions": 30, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


def build(kind, implementation="eager", **config):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **config), attn_implementation=implementation).eval()


def ids(rows=2, length=7, step=5):
    return torch.arange(rows * length).reshape(rows, length) * step % 60 + 3


def padding(rows=2, length=7, left=3):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :left] = 0
    return mask


def text(length=7, left=3, **more):
    return {"input_ids": ids(length=length), "attention_mask": padding(length=length, left=left), **more}


def decoder(length=7, left=3):
    return text(length, left, use_cache=False)


def unpadded(length=7, left=3):
    return {"input_ids": ids(length=length), "use_cache": False}


def encoder_decoder(length=7, left=3):
    return {**text(length, left), "decoder_input_ids": ids(length=length + 1, step=3), "use_cache": False}


def speech(length=7, left=3):
    return {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": ids(length=length), "use_cache": False}


def packed(length=7, left=3):
    positions = torch.cat([torch.arange(left), torch.arange(length - left)])[None]
    return {"input_ids": ids(1, length), "position_ids": positions, "use_cache": False}
