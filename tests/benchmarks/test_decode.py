"""The measurements of a decode step run, at tiny sizes on a CPU, and their arithmetic is right."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import decode_ops
import decode_timeline
import fxopt
from decode_timeline import Kernel, analyse
from fxopt.lower import implementations
from fxopt.ops import Target
from fxopt.passes.shared_input_linear import FuseSharedInputLinear
from fxopt.passes.small_linear import FuseSmallLinear
from fxopt.tune import choose, key, session, store


def test_a_timeline_adds_up():
    kernels = [
        Kernel("ampere_gemm", 0, 10), Kernel("triton_red_fused_norm", 12, 14), Kernel("flash_fwd", 13, 16),
        Kernel("ampere_gemm", 20, 32), Kernel("Memcpy DtoD", 32, 33),
    ]  # fmt: skip
    found = analyse(kernels, 2, {"matmul": 15.0, "attention": 1.0})
    assert (found.span, found.busy, found.gaps, found.kernels, found.a_layer, found.limit) == (33, 27, 6, 5, 2.5, 16)
    assert found.losses == [
        ("matmul kernels beyond their bytes", 7.0), ("gaps between kernels", 6.0), ("other kernels", 2.0),
        ("attention kernels beyond their bytes", 1.0), ("copy kernels", 1.0),
    ]  # fmt: skip
    assert found.longest[0] == ("ampere_gemm", 2, 22)


def test_a_step_without_kernels_is_an_error():
    with pytest.raises(ValueError, match="no kernels"):
        analyse([], 2, {})


@pytest.mark.parametrize("name, kind", [
    ("_small_linear_kernel", "matmul"), ("nvjet_tst_64x8", "matmul"), ("triton_per_fused_mm_0", "matmul"),
    ("_flash_decode", "attention"), ("triton_poi_fused_mul_silu", "other"), ("Memset (Device)", "copy"),
])  # fmt: skip
def test_kinds_of_kernels(name, kind):
    assert Kernel(name, 0, 1).kind == kind


def test_what_computes_something_else_is_not_timed(tmp_path, triton_device, monkeypatch):
    op = decode_ops.gated_activation
    kernel = next(i for i in op.implementations if i.name == "triton")
    wrong = dataclasses.replace(kernel, run=lambda *args: op.reference(*args) + 0.1)
    monkeypatch.setattr(op, "implementations", [wrong])
    arguments = ["--out", str(tmp_path), "--device", triton_device, "--tiny", "--dtype", "float32"]
    (row,) = decode_ops.main([*arguments, "--cases", "gated_mlp", "--modes", "eager"])["rows"]
    assert set(row["times"]) == {"eager"}
    assert "against float64" in row["left_out"]["fxopt"]


def test_the_cases_are_those_that_a_compiled_llama_asks_the_tuner_for(without_inductor, monkeypatch):
    """Otherwise a table made of them would be of no use: the arguments have to agree in kind, strides and order."""
    transformers = pytest.importorskip("transformers")
    asked = set()

    def kinds(op, args):
        words = [key._kind(a) for a in key.concrete(tuple(args))]
        return op.name, *(words[:-1] if "linear" in op.name else words)  # but for the limit that is set by hand here

    def asking(op, target, fakes):
        asked.add(kinds(op, fakes))
        return choose(op, target, fakes)

    monkeypatch.setattr(implementations, "choose", asking)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=200, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    fusions = [kind(most_rows=64, devices=("cpu",)) for kind in (FuseSmallLinear, FuseSharedInputLinear)]
    try:
        for fusion in fusions:
            fxopt.register(fusion)
        for batch in (1, 3):
            torch._dynamo.reset()
            with torch.no_grad():
                bind = decode_timeline.decode(model, batch, 16, 5, torch.device("cpu"))
                bind(torch.compile(model, backend="fxopt", dynamic=False))()
    finally:
        for fusion in fusions:
            fxopt.unregister(fusion.name)
    known = {kinds(case.op, case.make()) for case in decode_ops.cases("cpu", torch.bfloat16, tiny=True)}
    assert len({name for name, *_ in asked}) == 6
    assert {entry for entry in asked if entry[0] != "attention"} <= known


def test_a_table_of_the_cases_turns_the_kernels_on(without_inductor, triton_device, monkeypatch):
    """As it will be on a GPU, in the interpreter: the fusions with their defaults, their kernels known to pay."""
    transformers = pytest.importorskip("transformers")
    if triton_device != "cpu":
        pytest.skip("on a GPU tests/tune/test_gpu.py does that, with a measurement")
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    monkeypatch.setattr(key, "signature", lambda parts: f"{parts['op']}: {parts['arguments']}")
    torch._dynamo.reset()  # which forgets what was measured
    for op in (decode_ops.small_linear, decode_ops.linear_triple, decode_ops.gated_linear):
        able = [dataclasses.replace(i, when=None) if i.name == "triton" else i for i in op.implementations]
        monkeypatch.setattr(op, "implementations", able)
    for case in decode_ops.cases("cpu", torch.bfloat16, tiny=True):
        if "linear" in case.op.name:
            parts = key.describe(case.op, Target(torch.device("cpu")), key.concrete(case.make()), {})
            store.save(key.signature(parts), store.Entry(parts, "triton"))
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=200, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().bfloat16().to(triton_device)
    fusions = [kind(devices=("cpu", "cuda")) for kind in (FuseSharedInputLinear, FuseSmallLinear)]
    try:
        for fusion in fusions:
            fxopt.register(fusion)
        with fxopt.record() as rec, torch.no_grad():
            bind = decode_timeline.decode(model, 1, 16, 5, torch.device(triton_device))
            eager = bind(model)().clone()
            compiled = bind(torch.compile(model, backend="fxopt", dynamic=False))()
    finally:
        for fusion in fusions:
            fxopt.unregister(fusion.name)
        store.clear()
    torch.testing.assert_close(compiled, eager, rtol=0.05, atol=0.02)
    layers = [(site.op, site.implementation) for site in rec.sites if "linear" in site.op]
    layer = [(op, "triton") for op in ("linear_triple", "small_linear", "gated_linear", "small_linear")]
    assert layers == [*layer, *layer, ("small_linear", "triton")]
    assert not [site for site in rec.sites if "norm" in site.op]


def test_a_report_becomes_a_table(tmp_path, monkeypatch):
    """And the table is what is chosen by on that device, whatever the versions."""
    best = "fxopt tuned BLOCK_N=4 BLOCK_K=512 SPLIT=1 SWAP=0 STAGES=3 num_warps=2"
    times = {n: {"us": t, "spread": 0.0} for n, t in (("fxopt", 12.0), (best, 9.0), ("inductor", 15.0))}
    rows = [
        {"case": "o", "shapes": "1x4096 -> 4096, + residual", "times": times},
        {"case": "rotary", "shapes": "1x32+8x1x128", "times": {"fxopt": {"us": 1.0, "spread": 0.0}}},
    ]  # fmt: skip
    report = {"device": "H9", "architecture": "sm_90", "torch": "1", "triton": "1", "dtype": "bfloat16", "rows": rows}
    (tmp_path / "report.json").write_text(json.dumps(report))
    decode_ops.main(["--out", str(tmp_path), "--table", str(tmp_path / "report.json")])
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    monkeypatch.setattr(store, "TABLES", tmp_path)
    monkeypatch.setattr(key, "device_name", lambda device: "H9 sm_90")
    store.clear()
    target = Target(torch.device("cuda"), cuda_graphs=True)
    try:
        with FakeTensorMode(), session("auto", target):
            x, w = (torch.empty(*shape, 4096, device="cuda", dtype=torch.bfloat16) for shape in ((1, 1), (4096,)))
            chosen = choose(decode_ops.small_linear, target, decode_ops.small_linear.bind(x, w, None, x.clone()))
            other = choose(decode_ops.small_linear, target, decode_ops.small_linear.bind(x, w, None, None))
    finally:
        store.clear()
    assert (chosen.config["BLOCK_N"], chosen.implementation.name) == (4, "triton")
    assert other.config is None


@pytest.mark.slow
def test_the_parts_of_a_step(tmp_path, triton_device, monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    report = decode_ops.main([
        "--out", str(tmp_path), "--device", triton_device, "--tiny", "--dtype", "float32", "--cases",
        "rms_norm", "o", "rotary", "gated_mlp", "--modes", "eager", "inductor", "--seconds", "600",
    ])  # fmt: skip
    assert {row["case"] for row in report["rows"]} == {"rms_norm", "o", "rotary", "gated_mlp"}
    for row in report["rows"]:
        assert not row["left_out"], row
        assert {"eager", "inductor", "fxopt"} <= set(row["best"])
        assert row["limit"] > 0
    assert json.loads((tmp_path / "decode_ops.json").read_text())["rows"] == report["rows"]
    assert (tmp_path / "decode_ops.md").read_text().count("\n| ") == len(report["rows"]) + 1


@pytest.mark.slow
def test_every_mode_compiles(tmp_path, triton_device):
    arguments = ["--out", str(tmp_path), "--device", triton_device, "--tiny", "--dtype", "float32"]
    (row,) = decode_ops.main([*arguments, "--cases", "gated_mlp"])["rows"]
    assert set(row["best"]) == {*decode_ops.MODES, "fxopt"}


def test_out_of_time_is_said(tmp_path, triton_device):
    arguments = ["--out", str(tmp_path), "--device", triton_device, "--tiny", "--dtype", "float32"]
    report = decode_ops.main([*arguments, "--cases", "rotary", "--seconds", "0"])
    assert all(set(row["left_out"].values()) == {"TimeoutError: out of time"} for row in report["rows"])
    assert "out of time" in (tmp_path / "decode_ops.md").read_text()


@pytest.mark.slow
def test_the_timeline_of_a_step(tmp_path):
    pytest.importorskip("transformers")
    report = decode_timeline.main([
        "--out", str(tmp_path), "--device", "cpu", "--tiny", "--layers", "2", "--cache", "16", "--used", "5",
        "--warmup", "1", "--repeats", "3", "--modes", "eager", "fxopt",
    ])  # fmt: skip
    for row in report["rows"]:
        assert "error" not in row, row
        assert row["timeline"]["kernels"] > 4
        assert row["timeline"]["span"] >= row["timeline"]["busy"] > 0
    text = (tmp_path / "decode_timeline.md").read_text()
    assert text.count("the largest losses") == 2
    assert "gaps between kernels" in text


def test_a_mode_that_fails_leaves_the_others(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(decode_timeline.MODES, "fxopt", ("no such backend", {}))
    report = decode_timeline.main([
        "--out", str(tmp_path), "--device", "cpu", "--tiny", "--layers", "2", "--cache", "16", "--used", "5",
        "--warmup", "1", "--repeats", "1", "--modes", "fxopt", "eager",
    ])  # fmt: skip
    assert "no such backend" in report["rows"][0]["error"]
    assert report["rows"][1]["timeline"]["kernels"] > 4
