"""Small random models, saved as transformers saves them."""

from __future__ import annotations

import re

import pytest
import torch

WORDS = re.findall(r"\w+", "the sea is calm tonight a compiler turns code into machine and waves break on beach")


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory):
    """A directory with a random 2-layer Llama and a tokenizer of words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def saved_bert(tmp_path_factory):
    """A directory with a random 2-layer BERT and a tokenizer of words."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return _save(BertModel(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def saved_t5(tmp_path_factory):
    """A directory with a random encoder-decoder and a tokenizer of words."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return _save(T5ForConditionalGeneration(config), tmp_path_factory.mktemp("t5"))


def _save(model, directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory
