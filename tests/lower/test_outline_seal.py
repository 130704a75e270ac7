"""Bodies as opaque ops while AOTAutograd traces: entered once, and opened again for Inductor."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.lower import outline_seal
from fxopt.lower.outline import outline
from fxopt.lower.outline_memory import check_bodies

W = [torch.randn(8, 8, generator=torch.Generator().manual_seed(i)) * 0.3 for i in range(12)]


def program(x, *weights):
    for w in weights:
        n = x * torch.rsqrt(x.pow(2.0).mean(-1, keepdim=True) + 1e-6)
        x = x + (torch.nn.functional.silu(n @ w).t().contiguous() @ n).relu_() @ w * 0.1
    return x


def outlined(*inputs):
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        traced = make_fx(lambda *given: (program(*given),), pre_dispatch=True, _allow_non_fake_inputs=True)(
            *map(mode.from_tensor, inputs)
        )
    # in-place ops stay outside of bodies
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.relu_.default):
        node.target = torch.ops.aten.relu.default
    found = outline(traced)
    assert found.bodies
    return found.module


def through_aot(module, *inputs):
    """What Inductor would be given, run op by op; the graph too."""
    seen = []

    def compiler(graph, _):
        outline_seal.unseal(graph)
        check_bodies(graph)
        seen.append(graph)
        return make_boxed_func(graph)

    def backend(_, given):
        with outline_seal.sealed(module):
            return aot_autograd(fw_compiler=compiler, decompositions={})(module, given)

    with torch.no_grad():
        return torch.compile(program, backend=backend, dynamic=False)(*inputs), seen[0]


@pytest.fixture
def entered(monkeypatch):
    """How often a body was run on fake tensors."""
    runs = []
    run = outline_seal._run
    monkeypatch.setattr(outline_seal, "_run", lambda *given: runs.append(given[0]) or run(*given))
    return runs


def test_a_body_is_entered_once(entered):
    inputs = (torch.rand(8, 8), *W)
    got, graph = through_aot(outlined(*inputs), *inputs)
    torch.testing.assert_close(got, program(*inputs))
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    assert len(calls) >= 10
    assert len({call.args[1] for call in calls}) == len(entered) == 1
    body = getattr(graph, calls[0].args[0].target)
    assert all(n.meta["val"] is not None for n in body.graph.nodes if n.op != "output")


def test_nothing_is_kept():
    inputs = (torch.rand(8, 8), *W)
    through_aot(outlined(*inputs), *inputs)
    assert not outline_seal._bodies


def test_nothing_is_kept_after_a_failure():
    module = outlined(torch.rand(8, 8), *W)

    def failing():
        with outline_seal.sealed(module):
            assert outline_seal._bodies
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not outline_seal._bodies


def test_a_sealed_graph_runs():
    x = torch.rand(8, 8)
    module = outlined(x, *W)
    with outline_seal.sealed(module), torch.no_grad():
        assert module.graph.find_nodes(op="call_function", target=torch.ops.fxopt_lower.body.default)
        torch.testing.assert_close(module(x, *W), (program(x, *W),))


def test_a_name_tells_bodies_apart():
    names = set()
    for _ in range(2):
        with outline_seal.sealed(outlined(torch.rand(8, 8), *W)):
            names |= set(outline_seal._bodies)
    (name,) = names
    other = outlined(torch.rand(8, 8), *W)
    body = next(m for m in other.children())
    for node in body.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        node.args = tuple(0.2 if a == 0.1 else a for a in node.args)
    body.recompile()
    with outline_seal.sealed(other):
        assert name not in outline_seal._bodies
