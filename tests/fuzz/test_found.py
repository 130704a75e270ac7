"""What random programs found, each made small: right results, and no warning on the way."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import fxopt
from fuzz_check import running


def run(program, *inputs, **options):
    """The record of one run of `program`, whose results, gradients and written inputs must be eager's."""
    torch._dynamo.reset()
    mine, theirs = running.copy_of(inputs), running.copy_of(inputs)
    with (
        running.rewritten_always(),
        running.lowered_by(aot_eager),
        running.listening() as messages,
        fxopt.record() as record,
    ):
        out = torch.compile(program, backend="fxopt", **options)(*mine)
        grads = running.gradients(out, mine)
    expected = program(*theirs)
    wanted = running.gradients(expected, theirs)
    torch.testing.assert_close((out, mine), (expected, theirs), equal_nan=True)
    assert [g is None for g in grads] == [g is None for g in wanted]
    torch.testing.assert_close(running.tensors(grads), running.tensors(wanted))
    got, wanted = running.tensors(out), running.tensors(expected)
    assert [running.layout(t) for t in got] == [running.layout(t) for t in wanted]
    assert running.homes(got, running.tensors(mine)) == running.homes(wanted, running.tensors(theirs))
    assert not messages
    return record


x, w = torch.randn(2, 4, 8), torch.randn(8)


def rms(x, h, w):
    return w * (x * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_value_that_a_write_only_reads_is_what_its_op_computed():
    def program(x, w):
        h = x + 1
        wide = h.float()
        x.add_(h)
        return rms(wide, wide, w), wide

    assert run(program, x, w).counts() == {"rms_norm": 1}


@pytest.mark.parametrize("norm", ["layer norm", "softmax"])
def test_nothing_is_normed_that_has_no_dimensions(norm):
    def layer_norm(x):
        d = x - x.mean(-1, keepdim=True)
        return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-6)

    def softmax(x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    assert not run(layer_norm if norm == "layer norm" else softmax, torch.tensor(0.5)).sites


def test_strides_reach_an_output_through_what_is_computed_element_by_element():
    """The norm of a transposed tensor is fused to a contiguous one; what was returned beside it is laid out as ever."""

    def program(x, w):
        d = x - x.mean(-1, keepdim=True)
        return torch.where(w > 0, w * (d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-6)), w).sin()

    assert run(program, torch.randn(4, 2, 8).transpose(0, 1), w).counts() == {"layer_norm": 1}


def test_an_in_place_op_whose_shape_rule_is_written_in_python():
    run(lambda x, w: x.sin().lerp_(w, 0.3).cos(), x, w, dynamic=True)


@torch.no_grad()
def quietly(step, x):
    return step(x)


@pytest.mark.parametrize(
    "program",
    [
        lambda x, w: quietly(lambda x: x.view(x.shape), x) * x,
        lambda x, w: quietly(lambda x: x * 1, x) * x,
        lambda x, w: quietly(lambda x: x.mul_(3), x * 2) * w,
        lambda x, w: quietly(lambda x: x.transpose(1, 2), x).double() * x.transpose(1, 2),
        lambda x, w: (rms(h := quietly(lambda x: x.float(), x.bfloat16()), h, w), h),
    ],
)
def test_what_runs_without_gradients_is_cut_off_from_what_it_read(program):
    run(program, x.clone().requires_grad_(), w.clone().requires_grad_())


def test_a_mask_that_is_overwritten_after_its_use_is_what_it_was():
    """Its relation to the rows was lost on the verification, which undid a right rewrite with a warning."""

    def program(x, w):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        out = torch.softmax((x @ x.mT).masked_fill(~mask, torch.finfo(x.dtype).min), -1) @ x
        return out, mask.zero_()

    assert run(program, x, w).counts() == {"attention": 1}


@torch.no_grad()
def test_a_view_that_is_given_another_shape_in_place_is_not_its_base():
    """The input had that shape from then on."""

    def program(x, w, other):
        other.view_as(other).unsqueeze_(0)
        return rms(x, x, w)

    assert run(program, x, w, torch.randn(3)).counts() == {"rms_norm": 1}


@torch.no_grad()
def test_sizes_that_were_not_known_to_be_equal_at_first():
    """The verification raised on a symbol that it had no stand-in for, with a warning."""

    def program(x, w):
        scores = torch.einsum("...ij,...kj->...ik", rms(x, x, w), x.pow(2).mean(-1, keepdim=True))
        e = torch.exp(scores - scores.amax(0, keepdim=True))
        return e / e.sum(0, keepdim=True)

    run(program, torch.randn(2, 3, 5), torch.randn(5), dynamic=True)
