"""FuseDequantMatmul: every example is found or refused, and what is found computes what eager mode does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.canonical import canonicalise
from fxopt.kernels import _int4
from fxopt.ops import find_op
from fxopt.passes import _dequant_proof
from fxopt.passes._dequant_chain import integer_range
from fxopt.passes.dequant_matmul import FuseDequantMatmul
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.verify import Verifier

EXAMPLES = list(FuseDequantMatmul().examples())


def fuse(program, inputs, mode="fake"):
    """(rewritten graph, what the driver did)."""
    with torch.no_grad():
        traced = make_fx(program, pre_dispatch=True, tracing_mode=mode)(*inputs)
    canonicalise(traced)
    outcome = run_fusions(traced, [FuseDequantMatmul()], Verifier("numeric"))
    traced.recompile()
    return traced, outcome


def fused_nodes(graph):
    return [n for n in graph.nodes if find_op(n.target) is not None]


def exact(program, inputs):
    """The program in float64: dtypes in casts are the program's own, so its inputs are widened and they with them."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        traced = make_fx(program, pre_dispatch=True)(*inputs)
    for node in traced.graph.nodes:
        node.args = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in node.args)
        node.kwargs = {
            k: torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a
            for k, a in node.kwargs.items()
        }
    traced.recompile()
    return traced(*wide)


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 0)])
def test_an_empty_weight_is_refused(shape):
    inputs = (torch.randn(3, shape[1]), torch.zeros(shape, dtype=torch.int8), torch.randn(shape[0]))
    _, outcome = fuse(lambda x, w, s: F.linear(x, w.to(torch.float32) * s[:, None]), inputs)
    assert not outcome.fused
    assert "the quantised weight is empty" in outcome.misses[0].reason


def test_its_name_is_the_entry_point():
    assert FuseDequantMatmul().name == "dequant_matmul"


@pytest.mark.parametrize("example", [pytest.param(e, id=e.name) for e in EXAMPLES])
def test_example(example, assert_as_good_as):
    torch.manual_seed(0)
    inputs = example.inputs()
    module, outcome = fuse(example.program, inputs)
    assert len(fused_nodes(module.graph)) == outcome.fused == example.sites
    if example.refused:
        assert any(example.refused in miss.reason for miss in outcome.misses), outcome.misses
    for step in outcome.steps:
        assert step.verdict.status != "failed", step.verdict
    results, plain, wide = module(*inputs), example.program(*inputs), exact(example.program, inputs)
    if isinstance(results, torch.Tensor):
        results, plain, wide = [results], [plain], [wide]
    for r, p, w in zip(results, plain, wide, strict=True):
        assert_as_good_as(r, p, w)


@pytest.mark.parametrize("layout", ["low/2", "high/2", "low/32", "high/64", "low/row", "high/row"])
def test_each_layout_is_told_from_the_others(layout):
    n, k, g = 6, 256, 64
    where = _int4.Layout.parse(layout, torch.uint8, k)

    def program(x, w, s):
        blocks = w.reshape(n, -1, 1, where.run)
        planes = [blocks >> 4, blocks & 15] if where.high_first else [blocks & 15, blocks >> 4]
        q = torch.cat(planes, 2).reshape(n, k // g, g).float() - 8
        return F.linear(x, (q * s[:, :, None]).reshape(n, k))

    inputs = (torch.randn(2, k), torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, k // g))
    module, _ = fuse(program, inputs)
    (node,) = fused_nodes(module.graph)
    assert layout in node.args
    torch.testing.assert_close(module(*inputs), program(*inputs))


def test_rows_may_be_dynamic():
    example = next(e for e in EXAMPLES if e.name == "GPTQ")
    inputs = example.inputs()
    with torch.no_grad():
        compiled = torch.compile(example.program, backend=_backend, dynamic=True, fullgraph=True)
        for m in (2, 5, 9):
            x = torch.randn(m, 3, inputs[0].shape[-1])
            torch.testing.assert_close(compiled(x, *inputs[1:]), example.program(x, *inputs[1:]), rtol=1e-4, atol=1e-4)


def _backend(module, example_inputs):
    from fxopt.graph.retrace import retrace

    normal = retrace(module, example_inputs)
    canonicalise(normal)
    found = run_fusions(normal, [FuseDequantMatmul()], Verifier("meta")).fused
    assert found == 0 or found == 1
    normal.recompile()
    return normal


@pytest.mark.parametrize(("device", "rows", "fused"), [("cpu", 64, True), ("cuda", 32, True), ("cuda", 33, False)])
def test_on_a_gpu_many_rows_are_left_alone(device, rows, fused):
    inputs = torch.randn(rows, 64), torch.ones(48, 64, dtype=torch.int8), torch.ones(48)
    with torch.no_grad():
        module = make_fx(
            lambda x, w, s: F.linear(x, w.to(x.dtype) * s[:, None]), tracing_mode="fake", pre_dispatch=True
        )(*inputs)
    with FakeTensorMode():
        for node in module.graph.nodes:
            if "val" in node.meta:
                here = node.meta["val"]
                node.meta["val"] = torch.empty(here.shape, dtype=here.dtype, device=device)
    canonicalise(module)
    outcome = run_fusions(module, [FuseDequantMatmul()], Verifier("off"))
    assert outcome.fused == fused
    assert fused or "pays up to 32 rows; there are 33" in outcome.misses[0].reason


def test_layers_that_are_alike_are_proven_once(monkeypatch):
    proofs = []
    monkeypatch.setattr(_dequant_proof, "_PROVEN", {})
    run = _dequant_proof._Proof.run
    monkeypatch.setattr(_dequant_proof._Proof, "run", lambda self: proofs.append(self) or run(self))
    n = k = 128

    def program(x, *weights):
        for w, s in zip(weights[::2], weights[1::2], strict=True):
            q = torch.stack([w & 15, w >> 4], -1).reshape(n, -1, 32).to(x.dtype)
            x = F.linear(x, ((q - 8) * s[:, :, None]).reshape(n, k))
        return x

    weights = [t for _ in range(6) for t in (torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.rand(n, 4))]
    module, outcome = fuse(program, (torch.randn(1, k), *weights))
    assert outcome.fused == 6
    assert len(proofs) == 1
    assert not [node for node in module.graph.nodes if node.target is torch.ops.aten.stack.default]


def test_a_large_weight_is_proven_on_a_few_rows():
    n, k = 65536, 8192

    def program(x, w, s):
        q = torch.stack([w & 15, w >> 4], -1).reshape(n, k // 128, 128).to(x.dtype)
        return F.linear(x, ((q - 8) * s[:, :, None]).reshape(n, k))

    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        inputs = (torch.empty(1, k), torch.empty(n, k // 2, dtype=torch.uint8), torch.empty(n, k // 128))
        traced = make_fx(program, pre_dispatch=True)(*inputs)
    assert run_fusions(traced, [FuseDequantMatmul()], Verifier("meta")).fused == 1


def test_a_write_between_keeps_the_original():
    def program(x, w, s):
        dense = w.float() * s[:, None]
        s.mul_(2)
        return F.linear(x, dense)

    inputs = (torch.randn(2, 32), torch.randint(-128, 128, (8, 32), dtype=torch.int8), torch.rand(8))
    expected = program(inputs[0], inputs[1], inputs[2].clone())
    module, outcome = fuse(program, inputs)
    assert outcome.fused == 0
    torch.testing.assert_close(module(*inputs), expected)


def test_weights_are_inputs():
    """The fused graph reads the weights at each call: new values are seen."""
    example = next(e for e in EXAMPLES if e.name == "int4, halves of a row, offset 7.5")
    inputs = example.inputs()
    module, _ = fuse(example.program, inputs)
    for tensor in inputs[1:]:
        tensor.copy_(tensor.flip(0))
        torch.testing.assert_close(module(*inputs), example.program(*inputs))


def test_ordinary_matmuls_are_no_near_misses():
    for program in (lambda x, w: F.linear(x, w), lambda x, w: x @ w.to(torch.float32).t()):
        _, outcome = fuse(program, (torch.randn(3, 8), torch.randn(8, 8)))
        assert not outcome.misses
        assert not outcome.steps


def test_integer_ranges():
    def program(a):
        return (a & 15) + 1, (a & 15).to(torch.int8) - 100, (a % 7).reshape(-1), a + 1, (a.to(torch.int8) & 127) + 1

    traced = make_fx(program, tracing_mode="fake")(torch.zeros(2, 2, dtype=torch.uint8))
    found = [integer_range(node) for node in next(n for n in traced.graph.nodes if n.op == "output").args[0]]
    assert found == [(1, 16), (-100, -85), (0, 6), (0, 255), (-128, 127)]


def test_examples_are_fresh_inputs():
    first, second = EXAMPLES[0].inputs(), EXAMPLES[0].inputs()
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert dataclasses.is_dataclass(FuseDequantMatmul())
