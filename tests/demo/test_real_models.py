"""The main job: real models with real weights give eager mode's results, and all their sites fuse."""

import pytest
import torch

from fxopt.cli.demo import PROMPTS, SENTENCES
from fxopt.demo.compare import first_difference, largest_error
from fxopt.demo.embed import embed
from fxopt.demo.generate import encode, generate
from fxopt.demo.models import DemoError, find, load

pytestmark = pytest.mark.slow
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaded(name):
    try:
        source = find(name)
    except DemoError as error:
        pytest.skip(str(error))
    return load(source, torch.float32, DEVICE)


def test_smollm2_generates_eager_modes_tokens():
    model = loaded("smollm2")
    prompts = [encode(model, prompt) for prompt in PROMPTS]
    eager = generate(model, prompts, 64, "eager")
    made = generate(model, prompts, 64, "fxopt")
    pairs = zip(made.answers, eager.answers, strict=True)
    assert [first_difference(ours.tokens, theirs.tokens) for ours, theirs in pairs] == [None, None, None]
    assert (made.graphs, made.breaks) == (2, 0)
    for report in (made.prefill, made.decode):
        assert report.counts() == {"attention": 30, "rms_norm": 61, "gated_mlp": 30, "rotary": 30}


def test_minilm_embeds_as_eager_mode_does():
    model = loaded("minilm")
    eager, made = (embed(model, list(SENTENCES), name) for name in ("eager", "fxopt"))
    assert largest_error(made.vectors, eager.vectors) < 1e-5
    assert made.report.counts() == {"attention": 6, "layer_norm": 13, "l2_norm": 1}
