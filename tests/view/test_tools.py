"""The tools that people already use see what fxopt does: TORCH_LOGS, TORCH_TRACE, the profiler."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import profile

from fxopt.ops import fused_op

PROGRAM = """
import torch, fxopt
from fxopt.testing import without_inductor
with without_inductor(), torch.no_grad():
    x = torch.randn(4, 8)
    torch.compile(torch.nn.LayerNorm(8), backend="fxopt")(x)
    torch.compile(lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6), backend="fxopt")(x)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """(standard error, names of the artifacts) of a process with both variables set."""
    folder = tmp_path_factory.mktemp("trace")
    env = os.environ | {"TORCH_LOGS": "+fxopt.match", "TORCH_TRACE": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            _, brace, rest = line.partition("{")
            if brace and '"artifact"' in rest:
                names.append(json.loads(brace + rest)["artifact"]["name"])
    return done.stderr, names


def test_torch_logs_show_matches_and_near_misses(told):
    text, _ = told
    assert "layer_norm at layer_norm: 1 nodes" in text
    assert "rms_norm at " in text
    assert "not matched: " in text
    assert "[0/0]" in text  # the compile id, as on torch's own messages


def test_torch_trace_has_an_artifact_for_each_stage(told):
    _, names = told
    assert {"fxopt_before", "fxopt_after", "fxopt_explain"} <= set(names)
    assert any(name.startswith("fxopt_generated_layer_norm") for name in names)


@pytest.mark.parametrize("name", ["fxopt", "fxopt.match", "fxopt.rewrite", "fxopt.view", "fxopt.backend"])
def test_loggers_are_named_after_modules(name):
    """torch refuses a name in TORCH_LOGS that can't be imported."""
    __import__(name)
    assert logging.getLogger(name).name == name


@fused_op("test_ranged(Tensor x) -> Tensor")
def ranged(x):
    return x.sin()


@ranged.fake
def _(x):
    return torch.empty_like(x)


@ranged.implementation("sine", opaque=True)
def _(x):
    return torch.sin(x)


def test_an_opaque_op_is_a_range_in_the_profile(without_inductor):
    """What is inlined has no call of its own: Inductor puts it into a kernel with its neighbours (next test)."""
    run = torch.compile(lambda x: ranged.implementations[0].overload(x) + 1, backend="aot_eager")
    x = torch.randn(4)
    run(x)
    with profile() as prof:
        run(x)
    assert "fxopt::test_ranged" in {event.name for event in prof.events()}


@pytest.mark.slow
def test_an_inlined_op_names_the_kernel_it_is_in():
    def norm(x):
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).relu()

    named = {"cpp.descriptive_names": "torch", "cpp.enable_kernel_profile": True}
    run = torch.compile(norm, backend="fxopt", options={"inductor": named})
    x = torch.randn(64, 64)
    with torch.no_grad():
        run(x)
        with profile() as prof:
            torch.testing.assert_close(run(x), norm(x))
    assert any("fused_relu_rms_norm" in event.name for event in prof.events())


@pytest.mark.parametrize("tune", ["off", "auto"])
def test_nodes_that_are_made_keep_module_line_and_origin(tune, monkeypatch):
    graphs = []
    monkeypatch.setattr("fxopt.backend.compile_graph", lambda module, *_: graphs.append(module.graph) or module.forward)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8, eps=1e-6))
    with torch.no_grad():
        torch.compile(model, backend="fxopt", options={"tune": tune})(torch.randn(4, 8))
    (graph,) = graphs
    made = [node for node in graph.nodes if "fxopt" in node.meta and node.op == "call_function"]
    assert made
    for node in made:
        assert [path for path, _ in node.meta["nn_module_stack"].values()][-1].endswith(".1")
        assert "rms_norm" in node.meta["stack_trace"]
        assert {source.pass_name for source in node.meta["from_node"]} == {"fxopt.rms_norm"}
        assert node.meta["from_node"][0].name == "rms_norm"
