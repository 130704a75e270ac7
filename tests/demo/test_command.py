"""`fxopt demo` and `fxopt explain` on small models, from the command line to the saved report."""

import pytest

from fxopt import Report
from fxopt.cli import run


def test_generation(saved_llama, tmp_path, capsys):
    saved = tmp_path / "report.json"
    command = ["demo", "--model", str(saved_llama), "--tokens", "6", "--prompt", "the sea", "--prompt", "a compiler"]
    assert run([*command, "--backends", "eager,fxopt", "--output", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("fxopt demo: ")
    assert "all 2 equal" in shown
    assert "rms_norm 5/5" in shown
    assert Report.from_json(saved).counts() == {"attention": 4, "rms_norm": 10, "gated_mlp": 4, "rotary": 4}
    assert run(["explain", str(saved), "--fusion", "attention"]) == 0
    told = capsys.readouterr().out
    assert "fused: attention" in told
    assert "fused: rms_norm" not in told


def test_embeddings_without_fxopt_save_nothing(saved_bert, tmp_path, capsys):
    command = ["demo", "--model", str(saved_bert), "--prompt", "waves break", "--prompt", "the sea"]
    assert run([*command, "--backends", "eager,aot_eager", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1.0000000" in shown
    assert not list(tmp_path.iterdir())


def test_a_backend_that_fails_leaves_the_others_their_results(saved_llama, monkeypatch, tmp_path, capsys):
    import fxopt.demo.generate as module

    real = module.generate

    def generate(loaded, prompts, tokens, backend, *rest):
        if backend == "aot_eager":
            raise RuntimeError("out of luck")
        return real(loaded, prompts, tokens, backend, *rest)

    monkeypatch.setattr(module, "generate", generate)
    command = ["demo", "--model", str(saved_llama), "--tokens", "2", "--backends", "eager,aot_eager"]
    assert run([*command, "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "!! aot_eager failed: RuntimeError: out of luck" in shown
    assert "tokens/s" in shown


def test_a_prompt_without_words(saved_llama, capsys):
    assert run(["demo", "--model", str(saved_llama), "--prompt", "", "--backends", "eager"]) == 2
    assert "no tokens" in capsys.readouterr().err


@pytest.mark.parametrize("model, fused", [("saved_llama", "rms_norm"), ("saved_bert", "layer_norm")])
def test_explain(model, fused, request, capsys):
    assert run(["explain", str(request.getfixturevalue(model)), "--prompt", "the sea is calm"]) == 0
    assert f"fused: {fused}" in capsys.readouterr().out
