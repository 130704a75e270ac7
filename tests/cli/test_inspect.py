"""`fxopt inspect`, `explain` and `diff`: every way to name a model, and what is written."""

import dataclasses
import json

import pytest
import torch

from fxopt import NearMiss, Report, Site, Verdict
from fxopt.cli import run
from fxopt.view.report import GraphReport

BUILDERS = """
import torch

def norm():
    return torch.nn.LayerNorm(8), torch.randn(4, 8)

def scaled():
    return (lambda x, scale: torch.nn.functional.layer_norm(x, (8,)) * scale), {"x": torch.randn(4, 8), "scale": 2.0}

class Zoo:
    two = staticmethod(lambda: (torch.add, (torch.ones(2), torch.ones(2))))

def alone():
    return torch.nn.ReLU()

def broken():
    raise OSError("no\\nluck")

def unfit():
    return torch.nn.Linear(3, 3), torch.randn(4, 8)

number = 3
"""


@pytest.fixture
def report():
    """One site, one near miss of another fusion."""
    site = Site("attention", "attention", "sdpa", None, "layers.0", Verdict("equal"))
    miss = NearMiss("rms_norm", "mean", "the mean is not over the last dimension", "mean", None, 3)
    return Report([GraphReport("graph 0", normalized=True, nodes=9, sites=[site], misses=[miss])])


@pytest.fixture
def builders(tmp_path, without_inductor):
    path = tmp_path / "fxopt_builders.py"
    path.write_text(BUILDERS)
    return path


def test_inspect_writes_what_is_asked_for(builders, tmp_path, capsys):
    names = {"--html": "r.html", "--json": "sub/r.json", "--graph": "r.dot"}
    options = [part for option, name in names.items() for part in (option, str(tmp_path / name))]
    assert run(["inspect", f"{builders}:norm", *options]) == 0
    shown = capsys.readouterr().out
    assert "1 site fused (layer_norm 1)" in shown
    assert [line for line in shown.splitlines() if line.startswith("written: ")] == [
        f"written: {tmp_path / name}" for name in names.values()
    ]
    report = Report.from_json(tmp_path / "sub" / "r.json")
    assert report.counts() == {"layer_norm": 1}
    assert "layer_norm" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("name, words", [("norm", "layer_norm"), ("scaled", "layer_norm"), ("Zoo.two", "nothing to")])
def test_models_from_a_function(builders, name, words, capsys):
    assert run(["explain", f"{builders}:{name}"]) == 0
    assert words in capsys.readouterr().out


def test_a_function_of_an_importable_module(builders, monkeypatch, capsys):
    monkeypatch.chdir(builders.parent)
    monkeypatch.syspath_prepend(str(builders.parent))
    assert run(["explain", "fxopt_builders:norm", "--fusion", "layer_norm"]) == 0
    assert "layer_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, words",
    [
        ("alone", "returned a ReLU: return (model, inputs)"),
        ("broken", "raised OSError: no luck"),
        ("number", "is a int: name a function"),
        ("unfit", "can't be run"),
        ("Zoo.three", "can't find"),
    ],
)
def test_functions_that_are_wrong(builders, name, words, capsys):
    assert run(["explain", f"{builders}:{name}"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_a_random_model_of_a_configuration(without_inductor, capsys):
    assert run(["explain", "bert", "--random", "--layers", "1"]) == 0
    assert "fused: layer_norm" in capsys.readouterr().out


def test_a_random_model_of_a_saved_configuration(without_inductor, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 9}))
    assert run(["inspect", str(tmp_path), "--random", "--json", str(tmp_path / "r.json")]) == 0
    assert Report.from_json(tmp_path / "r.json").counts()["rms_norm"] == 5  # two layers of two, and the last


def test_explain_reads_a_report(report, tmp_path, capsys):
    path = report.save(tmp_path / "r.json")
    assert run(["explain", str(path), "--fusion", "rms_norm"]) == 0
    shown = capsys.readouterr().out
    assert "the mean is not over the last dimension" in shown
    assert "sdpa" not in shown


def test_diff(report, tmp_path, capsys):
    a = report.save(tmp_path / "a.json")
    report.graphs[0].sites.append(dataclasses.replace(report.sites[0], module="layers.5"))
    b = report.save(tmp_path / "b.json")
    assert run(["diff", str(a), str(a)]) == 0
    assert "no difference" in capsys.readouterr().out
    assert run(["diff", str(a), str(b)]) == 1
    assert "+ attention in layers.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["inspect", "bert"], "add --random"),
        (["inspect", "bertt", "--random"], "did you mean bert"),
        (["inspect", "bert", "--html", "r.json"], "must end in .html"),
        (["inspect", "a.b:c", "--random"], "makes its own model"),
        (["explain", "no_such_module:f"], "No module named"),
        (["explain", "no/such.py:f"], "no file"),
        (["diff", "no.json", "no.json"], "can't read the report"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def test_a_report_that_cant_be_written(builders, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run(["inspect", f"{builders}:norm", "--html", str(tmp_path / "file" / "r.html")]) == 2
    assert "can't write" in capsys.readouterr().err


def test_torch_is_left_as_it_was(builders):
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    run(["explain", f"{builders}:norm"])
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_inspect_writes_kernels_that_check_themselves(builders, tmp_path, capsys):
    assert run(["inspect", f"{builders}:norm", "--kernels", str(tmp_path / "kernels")]) == 0
    assert f"written: {tmp_path}/kernels/layer_norm_0.py" in capsys.readouterr().out
    compile((tmp_path / "kernels/layer_norm_0.py").read_text(), "layer_norm_0.py", "exec")


def test_kernels_of_an_op_that_is_not_here(report, tmp_path, capsys):
    site = dataclasses.replace(report.graphs[0].sites[0], op="nowhere")
    report.graphs[0].sites = [site]
    path = report.save(tmp_path / "r.json")
    assert run(["inspect", str(path), "--kernels", str(tmp_path / "kernels")]) == 2
    assert "the op nowhere of the report is not registered here" in capsys.readouterr().err


def test_explaining_one_fusion_names_what_it_left(tmp_path, capsys, without_inductor):
    path = tmp_path / "router.py"
    path.write_text(
        "import torch\ndef made():\n    return (lambda x: (x @ x.mT).softmax(-1).topk(2)[1]), torch.randn(4, 4)\n"
    )
    assert run(["explain", f"{path}:made", "--fusion", "attention"]) == 0
    assert "softmax.int: nothing around it looks like attention" in capsys.readouterr().out
    assert run(["explain", f"{path}:made", "--fusion", "rms_norm"]) == 0
    assert "softmax" not in capsys.readouterr().out
