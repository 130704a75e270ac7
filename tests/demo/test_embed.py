"""Sentence embeddings."""

import pytest
import torch

from fxopt.demo.embed import embed
from fxopt.demo.models import find, load

SENTENCES = ["the sea is calm tonight", "waves break", "a compiler turns code into machine code"]


@pytest.fixture(scope="module")
def bert(saved_bert):
    return load(find(str(saved_bert)), torch.float32, torch.device("cpu"))


def test_mean_pooled_and_of_length_one(bert):
    made = embed(bert, SENTENCES, "eager")
    ids = bert.tokenizer(SENTENCES[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = bert.model(ids).last_hidden_state[0].mean(0)  # alone: nothing is padded
    torch.testing.assert_close(made.vectors[1], mean / mean.norm())


def test_fxopt_gives_the_same_vectors(bert):
    eager, made = (embed(bert, SENTENCES, name) for name in ("eager", "fxopt"))
    torch.testing.assert_close(made.vectors, eager.vectors, atol=1e-5, rtol=0)
    assert (made.graphs, made.breaks) == (1, 0)
    assert made.report.counts() == {"attention": 2, "layer_norm": 5, "l2_norm": 1}
    assert eager.report.graphs == []
