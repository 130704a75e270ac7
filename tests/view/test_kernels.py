"""Kernels as files that run by themselves: each checks itself, and says so where an edit made it wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import fxopt
from fxopt.lower.arguments import written
from fxopt.ops import _OPS, fused_op
from fxopt.rewrite.plugins import fusions
from fxopt.view.kernels import kernel, kernel_of, kernel_sources, script, write_kernels
from fxopt.view.report import GraphReport, Kernel, Report
from fxopt.view.standalone import Collector, Unwritable

LIMIT = 3


def clamped(x):
    return x.clamp(max=LIMIT)


def doubled(x):
    return clamped(x) * 2


def run(path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, env=environment)
    return done.returncode, done.stdout + done.stderr[-2000:]


@pytest.fixture
def norm(triton_device, tmp_path, without_inductor):
    """The file of an RMSNorm's kernel in a small model."""
    with torch.no_grad():
        rec = fxopt.view(torch.nn.RMSNorm(48, eps=1e-6), torch.randn(3, 5, 48))
    (path,) = rec.kernels(tmp_path / "kernels")
    return path


def test_a_kernel_checks_itself(norm):
    assert norm.name == "rms_norm_0.py"
    text = norm.read_text()
    assert "@triton.jit" in text
    assert "tensor((3, 5, 48), (240, 48, 1), torch.float32)" in text
    assert "1 site of a model" in text
    assert "import fxopt" not in text
    assert "from fxopt" not in text  # torch and Triton are enough
    status, said = run(norm)
    assert status == 0, said
    assert "verdict: equal" in said


def test_a_kernel_that_was_broken_says_so(norm):
    text = norm.read_text()
    broken = text.replace("tl.rsqrt(", "tl.sqrt(")
    assert broken != text
    norm.write_text(broken)
    status, said = run(norm)
    assert status == 1
    assert "verdict: DIFFERS" in said


@pytest.mark.slow
def test_every_kernel_of_a_model(triton_device, tmp_path, without_inductor):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="eager",
    )
    model = transformers.LlamaModel(config).eval().to(torch.bfloat16)
    with torch.no_grad():
        rec = fxopt.view(model, torch.randint(0, 64, (1, 8)), use_cache=False)
    paths = rec.kernels(tmp_path)
    assert {path.name.rpartition("_")[0] for path in paths} >= {"attention", "rms_norm", "rotary_pair"}
    for path in paths:
        status, said = run(path)
        assert status == 0, f"{path.name}: {said}"


def test_every_bundled_kernel_is_written_from_its_source(triton_device):
    fusions()  # their modules define the ops
    opaque = {(op.name, i.name): (op, i) for op in _OPS.values() for i in op.implementations if i.opaque}
    bundled = [pair for pair in opaque.values() if pair[0].reference.__module__.startswith("fxopt.kernels.")]
    assert len(bundled) > 10
    for op, implementation in bundled:
        found = Collector(op.reference.__module__)
        found.add(op.reference, "reference")
        found.add(implementation.run, "launch")  # raises Unwritable
        text = found.text()
        compile(text, op.name, "exec")
        assert "@triton.jit" in text, op.name


def test_a_report_read_back_writes_the_same(norm, tmp_path, without_inductor):
    with torch.no_grad():
        rec = fxopt.view(torch.nn.RMSNorm(48, eps=1e-6), torch.randn(3, 5, 48))
    (path,) = Report.from_json(rec.save(tmp_path / "r.json")).kernels(tmp_path / "again")
    assert path.read_text().split('"""', 2)[2] == norm.read_text().split('"""', 2)[2]


def test_sites_of_one_kind_share_a_file(make, tmp_path):
    sites = [make.site(i, op="rms_norm", arguments=("tensor((2, 8), (8, 1), torch.float32)",)) for i in range(3)]
    sites.append(make.site(3, op="rms_norm", arguments=("tensor((4, 8), (8, 1), torch.float32)",)))
    paths = write_kernels(Report([GraphReport("g", sites=sites)]), tmp_path)
    assert [path.name for path in paths] == ["rms_norm_0.py", "rms_norm_1.py"]
    assert "3 sites of a model" in paths[0].read_text()


def test_an_unknown_op_is_an_error(make, tmp_path):
    report = Report([GraphReport("g", sites=[make.site(op="no_such_op")])])
    with pytest.raises(ValueError, match="no_such_op of the report is not registered"):
        write_kernels(report, tmp_path)


def test_a_kernel_is_one_however_many_sites_it_serves(make):
    fusions()
    sites = [
        make.site(i, op="rms_norm", implementation=used) for i, used in enumerate(["aten", "triton", "decomposed"])
    ]
    kernels = kernel_sources(Report([GraphReport("g", sites=[*sites, make.site(op="no_such_op")])]))
    assert [(found.op, found.implementation) for found in kernels] == [("rms_norm", "triton")]
    assert "@triton.jit" in kernels[0].source
    assert all(kernel_of(site, kernels) is kernels[0] for site in sites)
    assert kernel_of(make.site(op="no_such_op"), kernels) is None


def test_kernels_of_a_saved_report_need_no_op(make, tmp_path):
    sites = [make.site(op="gone", arguments=("None",))]
    saved = Report([GraphReport("g", sites=sites)], [Kernel("gone", "triton", "def launch(x): ...")])
    (path,) = Report.from_json(saved.save(tmp_path / "r.json")).kernels(tmp_path)
    assert "def launch(x): ..." in path.read_text()


def test_needs_come_first_and_are_written_once():
    found = Collector(__name__)
    found.add(doubled, "launch")
    found.add(clamped, "reference")
    names = [line for line in found.text().splitlines() if line.startswith(("def ", "LIMIT"))]
    assert names == ["LIMIT = 3", "def clamped(x):", "def launch(x):", "def reference(x):"]
    scope = {}
    exec(found.text(), scope)
    assert scope["launch"](torch.tensor([5.0])).item() == 6


def test_what_has_no_source_is_imported_instead(make):
    op = fused_op("view_test_sourceless(Tensor x) -> Tensor")(doubled)
    op.implementation("aten", opaque=True)(F.relu_)
    with pytest.raises(Unwritable):
        Collector(__name__).add(len, "launch")
    text = script(kernel(op, op.implementations[0]), (), [make.site()])
    compile(text, "kernel.py", "exec")


def test_hostile_strings_stay_in_the_docstring(make):
    op = fused_op("view_test_hostile(Tensor x) -> Tensor")(doubled)
    op.implementation("aten", opaque=True)(clamped)
    text = script(kernel(op, op.implementations[0]), ("None",), [make.site(module='"""\nraise SystemExit(7)\n"""\\')])
    compile(text, "kernel.py", "exec")
    assert "\nraise SystemExit(7)" not in text.partition("from __future__")[2]


def test_arguments_as_expressions():
    values = (torch.empty(2, 3, dtype=torch.bfloat16).T, None, 1e-6, torch.float16, True, [1, 2], float("-inf"))
    assert written(values) == (
        "tensor((3, 2), (1, 3), torch.bfloat16)",
        "None",
        "1e-06",
        "torch.float16",
        "True",
        "[1, 2]",
        'float("-inf")',
    )
