"""The second entry: what AOTAutograd made of a graph is rewritten, and everything that it promised is kept."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fxopt


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def qkv(*sizes):
    return [torch.randn(2, 3, n, 8) for n in sizes or (5, 5, 5)]


def compiled(program, *inputs, dynamic=None, grad=False, **options):
    """(result, report) of one run by fxopt; what the program writes, it writes to copies."""
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.set_grad_enabled(grad):
        out = torch.compile(program, backend="fxopt", dynamic=dynamic, options=options or None)(*inputs)
    return out, rec


@pytest.fixture
def second(monkeypatch, without_inductor):
    """Every graph is turned away by the first entry."""
    monkeypatch.setattr("fxopt.backend.refusal", lambda module, inputs: "the test says so")


def same(actual, expected):
    torch.testing.assert_close(actual, expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(a, Tensor):
            assert a.stride() == b.stride()


@pytest.mark.usefixtures("second")
class TestForced:
    def test_the_report_says_where_and_why(self):
        _, rec = compiled(attend, *qkv())
        (graph,) = rec.graphs
        assert (graph.normalized, graph.entry) == (True, "after AOTAutograd")
        assert graph.turned_away == "the test says so"
        assert graph.reason is None
        assert rec.counts() == {"attention": 1}
        assert "after AOTAutograd (turned away by the first entry: the test says so)" in " ".join(str(rec).split())
        assert "_softmax" in graph.before
        assert "fxopt.attention" in graph.after

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_attention(self, dynamic):
        inputs = qkv(5, 7, 7)
        out, rec = compiled(attend, *inputs, dynamic=dynamic)
        assert rec.counts() == {"attention": 1}
        same(out, attend(*inputs))

    def test_symbolic_sizes_stay_symbolic(self):
        run = torch.compile(lambda *x: attend(*x), backend="fxopt", dynamic=True)
        with fxopt.record() as rec, torch.no_grad():
            for n in (5, 7, 11):
                inputs = qkv(n, n + 1, n + 1)
                same(run(*inputs), attend(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_a_graph_with_a_backward_passes_through_with_the_reason(self):
        inputs = [x.requires_grad_() for x in qkv()]
        out, rec = compiled(attend, *inputs, grad=True)
        out.sum().backward()
        assert not rec.graphs[0].normalized
        assert rec.graphs[0].reason == "the test says so"
        same(out, attend(*inputs))

    def test_written_inputs(self):
        def step(cache, k, q):
            cache[:, :, 2:4] = k
            return attend(q, cache, cache), cache.mul_(1)

        def inputs():
            torch.manual_seed(1)
            return torch.randn(2, 3, 6, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)

        ours, theirs = inputs(), inputs()
        out, rec = compiled(step, *ours)
        same(out, step(*theirs))
        same(ours[0], theirs[0])
        assert out[1] is ours[0]
        assert rec.counts() == {"attention": 1}

    def test_outputs_that_are_views(self):
        def program(q, k, v):
            out = attend(q, k, v)
            return out, out.transpose(1, 2), q[:, 1:], out.view(-1)

        inputs = qkv()
        out, rec = compiled(program, *inputs)
        same(out, program(*inputs))
        assert out[2].untyped_storage().data_ptr() == inputs[0].untyped_storage().data_ptr()
        assert out[0].untyped_storage().data_ptr() == out[1].untyped_storage().data_ptr()
        assert rec.counts() == {"attention": 1}

    def test_norms_and_products_below_their_composites(self):
        def program(x, w, b, m):
            h = F.layer_norm(x + x.sin(), (8,), w, b, 1e-5)
            return F.rms_norm(h, (8,), w) @ m, F.linear(h, m.mT, m[0])

        inputs = torch.randn(2, 5, 8), torch.randn(8), torch.randn(8), torch.randn(8, 8)
        out, rec = compiled(program, *inputs)
        assert rec.counts() == {"layer_norm": 1, "rms_norm": 1}
        same(out, program(*inputs))

    def test_nothing_to_fuse(self):
        out, rec = compiled(lambda x: F.linear(x.sin(), x[0]).softmax(-1), x := torch.randn(2, 3, 3))
        same(out, F.linear(x.sin(), x[0]).softmax(-1))
        assert rec.graphs[0].normalized
        assert rec.counts() == {}
        assert not any(step.applied for step in rec.steps)

    def test_a_failure_leaves_the_graph_and_warns_once(self, monkeypatch, caplog):
        def fail(*_):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr("fxopt.backend._place", fail)
        with caplog.at_level(logging.WARNING, "fxopt"):
            out, rec = compiled(attend, *(inputs := qkv()))
        same(out, attend(*inputs))
        assert [r.message for r in caplog.records if "broken on purpose" in r.message] == [
            "fxopt leaves AOTAutograd's graph as it was: RuntimeError: broken on purpose"
        ]
        assert rec.counts() == {}

    def test_branches_are_rewritten_too(self):
        def program(x, q, k, v):
            return torch.cond(x.sum() > 0, attend, lambda q, k, v: attend(k, q, v), (q, k, v))

        for sign in (1, -1):
            inputs = torch.full((2,), float(sign)), *qkv()
            out, rec = compiled(program, *inputs)
            torch.testing.assert_close(out, program(*inputs))
        assert rec.counts() == {"attention": 2}

    def test_data_dependent_sizes(self):
        def program(x, q, k, v):
            picked = x[x > 0]
            return picked.softmax(0), attend(q, k, v)

        inputs = torch.randn(7), *qkv()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            out, rec = compiled(program, *inputs)
        same(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_custom_ops_that_write(self):
        @torch.library.custom_op("fxopt_test::fill", mutates_args={"x"})
        def fill(x: Tensor, by: float) -> None:
            x.fill_(by)

        def program(q, k, v):
            out = attend(q, k, v)
            mark = torch.empty(3)
            fill(mark, 2.0)
            return out, mark

        out, rec = compiled(program, *(inputs := qkv()))
        same(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_random_numbers(self):
        def program(q, k, v):
            return torch.rand(3), F.dropout(attend(q, k, v), 0.5)

        inputs = qkv()
        run = torch.compile(program, backend="fxopt")
        with torch.no_grad():
            run(*inputs)
            torch.manual_seed(3)
            drawn, dropped = run(*inputs)
        torch.manual_seed(3)
        same(drawn, torch.rand(3))
        kept = dropped != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(dropped[kept], 2 * attend(*inputs)[kept])


@pytest.mark.usefixtures("without_inductor")
class TestWrapped:
    """Programs as they come, without force: right, and fused by whichever entry takes them."""

    @pytest.mark.parametrize("grad", [False, True])
    def test_autograd_function(self, grad, doubled):
        def program(q, k, v):
            return attend(doubled(q), k, v)

        out, rec = compiled(program, *(inputs := qkv()), grad=grad)
        same(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_checkpoint(self):
        def program(q, k, v):
            return checkpoint(attend, q, k, v, use_reentrant=False)

        out, rec = compiled(program, *(inputs := qkv()))
        same(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_vmap(self):
        program = torch.vmap(attend)
        out, rec = compiled(program, *(inputs := qkv()))
        torch.testing.assert_close(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_gradients_inside(self):
        def program(q, k, v):
            return torch.func.grad(lambda q: attend(q, k, v).sum())(q), attend(q, k, v)

        out, rec = compiled(program, *(inputs := qkv()))
        torch.testing.assert_close(out, program(*inputs))
        assert rec.counts() == {"attention": 1}

    def test_autocast(self):
        def program(q, k, v):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return attend(q, k, v)

        out, rec = compiled(program, *(inputs := qkv()))
        expected = program(*inputs)
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        assert rec.counts() == {"attention": 1}
