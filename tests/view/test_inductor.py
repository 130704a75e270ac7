"""What Inductor made of a graph, and which of its kernels hold a fused op's nodes."""

from __future__ import annotations

import json

import pytest
import torch

import fxopt
from fxopt.lower.compile import missing_compiler
from fxopt.view import save
from fxopt.view.inductor import holding, kernels, output_code
from fxopt.view.report import GraphReport, Report
from fxopt.view.sheets import LONGEST, Sheets

#: as Inductor writes for a GPU, cut to what is read of it
CODE = """
# Topologically Sorted Source Nodes: [pow_1, mean], Original ATen: [aten.pow, aten.mean]
# Source node to ATen node mapping:
#   pow_1 => pow_1
triton_red_fused_mean_pow_0 = async_compile.triton('triton_red_fused_mean_pow_0', '''
import triton

@triton.jit
def triton_red_fused_mean_pow_0(in_ptr0): ...
''', device_str='cuda')


triton_poi_fused_silu_1 = async_compile.triton('triton_poi_fused_silu_1', r'''
def triton_poi_fused_silu_1(in_ptr0): ...
''', device_str='cuda')

def call(args):
    with torch.cuda._DeviceGuard(0):
        # Topologically Sorted Source Nodes: [pow_1, mean], Original ATen: [aten.pow, aten.mean]
        stream0 = get_raw_stream(0)
        triton_red_fused_mean_pow_0.run(arg0_1, buf0, 8, 32, stream=stream0)
        # Topologically Sorted Source Nodes: [linear], Original ATen: [aten.mm]
        extern_kernels.mm(buf0, arg1_1, out=buf1)
        # Topologically Sorted Source Nodes: [silu, mul_1], Original ATen: [aten.silu, aten.mul]
        triton_poi_fused_silu_1.run(buf1, stream=stream0)
        # Topologically Sorted Source Nodes: [pow_2, mean_1], Original ATen: [aten.pow, aten.mean]
        triton_red_fused_mean_pow_0.run(buf1, buf0, 8, 32, stream=stream0)
        triton_unknown.run(buf1)
"""


def test_kernels_and_the_nodes_that_they_compute():
    norm, silu = kernels(CODE)
    assert norm.nodes == {"pow_1", "mean", "pow_2", "mean_1"}
    assert norm.source.startswith("import triton\n")
    assert silu.nodes == {"silu", "mul_1"}
    assert holding(("mean_1", "rsqrt"), [norm, silu]) == [norm]
    assert holding(("linear",), [norm, silu]) == []
    assert kernels("") == []


def test_sites_name_the_kernels_that_they_became_part_of(make):
    def site(i, placed):
        return make.site(i, node=f"n{i}", placed=placed, implementation="decomposed", code="code")

    sites = [
        site(0, ("pow_1", "mean")),
        site(1, ("pow_9",)),
        make.site(2, node="n2", placed=("add",), implementation="sdpa", code="other"),
    ]
    sheets = Sheets(Report([GraphReport("g", sites=sites, compiled=CODE)]))
    first, second, third = sheets.of_sites[0]
    (kernel,) = [sheet for sheet in sheets.all() if sheet.title == "triton_red_fused_mean_pow_0"]
    assert first[0] == (kernel.id, "Inductor's kernel, in which its nodes and their neighbours are")
    assert second == first  # its layer is compiled once, with the names of another
    assert third == [(third[0][0], "the whole, in which its nodes are somewhere")]


def test_long_output_code_is_left_to_the_json(make):
    sites = [make.site(node="n", placed=("add",), implementation="decomposed")]
    report = Report([GraphReport("g", sites=sites, compiled="x" * (LONGEST + 1))])
    assert len(save.page(report)) < LONGEST
    assert len(json.dumps(report.to_dict())) > LONGEST


def test_what_inductor_writes_is_in_the_report():
    if missing_compiler([torch.ones(1)]) is not None:
        pytest.skip("needs a C++ compiler")
    norm = torch.nn.RMSNorm(32, eps=1e-6)
    with torch.no_grad():
        told = [fxopt.view(torch.nn.Sequential(norm, torch.nn.Tanh()), torch.randn(4, 32)) for _ in range(2)]
    for rec in told:  # the second comes from Inductor's cache
        (graph,) = rec.graphs
        assert "def call(" in graph.compiled
        assert "tanh" in graph.compiled
        assert "Inductor&#39;s output code" in save.page(rec)
    assert Report([graph]).to_dict()["graphs"][0]["compiled"] == graph.compiled


@pytest.mark.gpu
def test_on_a_gpu_a_norm_names_its_kernel():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    norm = torch.nn.RMSNorm(4096, eps=1e-6, device="cuda")
    with torch.no_grad():
        rec = fxopt.view(torch.nn.Sequential(norm, torch.nn.Tanh()), torch.randn(64, 4096, device="cuda"))
    (site,) = rec.sites
    if not site.opaque:
        assert "@triton.jit" in holding(site.placed, kernels(rec.graphs[0].compiled))[0].source


def test_nothing_is_collected_unless_wanted():
    from torch._inductor.graph import GraphLowering

    with output_code(False) as written:
        assert GraphLowering.save_output_code is None
    with output_code() as written:
        GraphLowering.save_output_code("code")
    assert written == ["code"]
    assert GraphLowering.save_output_code is None
