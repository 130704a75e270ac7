"""Greedy generation: against transformers' own, and without compiling again at each step."""

import pytest
import torch

from fxopt.demo.generate import decode_text, encode, generate
from fxopt.demo.models import DemoError, find, load

PROMPTS = ("the sea is calm", "a compiler turns code into machine code tonight")
TOKENS = 12


@pytest.fixture(scope="module")
def llama(saved_llama):
    return load(find(str(saved_llama)), torch.float32, torch.device("cpu"))


def test_tokens_are_those_of_transformers(llama):
    ids = [encode(llama, prompt) for prompt in PROMPTS]
    made = generate(llama, ids, TOKENS, "eager")
    for prompt, answer in zip(ids, made.answers, strict=True):
        theirs = llama.model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        ended = answer.tokens.index(2) if 2 in answer.tokens else TOKENS  # transformers suppresses the end token
        assert answer.tokens[:ended] == tuple(theirs[0, prompt.shape[-1] :].tolist())[:ended]


def test_one_graph_for_all_prompts_and_one_for_all_steps(llama):
    ids = [encode(llama, prompt) for prompt in PROMPTS]
    assert ids[0].shape != ids[1].shape
    eager = generate(llama, ids, TOKENS, "eager")
    made = generate(llama, ids, TOKENS, "aot_eager")
    assert (made.graphs, made.breaks) == (2, 0)
    assert [a.tokens for a in made.answers] == [a.tokens for a in eager.answers]
    assert eager.compiling == 0 < made.compiling


def test_a_cache_left_by_one_prompt_does_not_reach_the_next(llama):
    ids = [encode(llama, prompt) for prompt in PROMPTS]
    both = generate(llama, ids, TOKENS, "eager")
    alone = generate(llama, ids[1:], TOKENS, "eager")
    assert both.answers[1].tokens == alone.answers[0].tokens


def test_fxopt_makes_the_same_tokens_and_says_what_it_fused(llama):
    ids = [encode(llama, prompt) for prompt in PROMPTS]
    eager = generate(llama, ids, TOKENS, "eager")
    made = generate(llama, ids, TOKENS, "fxopt")
    assert [a.tokens for a in made.answers] == [a.tokens for a in eager.answers]
    assert (made.graphs, made.breaks) == (2, 0)
    for report in (made.prefill, made.decode):
        assert report.counts() == {"attention": 2, "rms_norm": 5, "gated_mlp": 2, "rotary": 2}


def test_one_token(llama):
    made = generate(llama, [encode(llama, PROMPTS[0])], 1, "eager")
    assert len(made.answers[0].tokens) == 1


def test_more_positions_than_the_model_has(llama):
    with pytest.raises(DemoError, match="the model has 64: lower --tokens"):
        generate(llama, [encode(llama, PROMPTS[0])], 100, "eager")


def test_an_empty_prompt(llama):
    with pytest.raises(DemoError, match="no tokens"):
        encode(llama, "")


def test_text_ends_at_the_end_token(llama):
    assert decode_text(llama, (3, 4, 2, 5)) == "the sea"
