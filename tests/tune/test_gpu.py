"""The tuner on a GPU: a kernel is chosen where it is faster, in a CUDA graph, and results stay right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt.kernels.small_linear import small_linear
from fxopt.ops import Target
from fxopt.tune import choose, session, store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer(x, weight, residual, norm):
    return F.linear(F.rms_norm(x, (x.shape[-1],), norm, 1e-5), weight) + residual


def inputs(rows):
    x, weight, residual, norm = ((rows, 1, 4096), (4096, 4096), (rows, 1, 4096), (4096,))
    made = [torch.randn(shape, device="cuda").bfloat16() for shape in (x, weight, residual, norm)]
    made[1] /= 64
    return made


@pytest.mark.parametrize("rows", [1, 8])
def test_a_decode_layer_is_measured_and_right(rows, assert_as_good_as):
    args = inputs(rows)
    torch._dynamo.reset()
    compiled = torch.compile(
        layer,
        backend="fxopt",
        options={"mode": "reduce-overhead", "tune": "full", "fusions": ["rms_norm", "small_linear"]},
    )
    with fxopt.record() as rec, torch.no_grad():
        for _ in range(4):
            out = compiled(*args).clone()
    assert [site.op for site in rec.sites] == (["small_linear"] if rows == 1 else ["rms_norm", "small_linear"])
    (entry,) = (e for e in store._memory.values() if e and e.key["op"] == "small_linear")
    assert len(entry.microseconds) > 3
    assert not entry.rejected
    assert min(entry.microseconds.values()) > 1.0
    print(entry.note, entry.microseconds)
    assert_as_good_as(out, layer(*args), layer(*(a.double() for a in args)))


def test_a_kernel_in_a_cuda_graph_is_timed_alike_twice():
    target = Target(torch.device("cuda"), cuda_graphs=True)
    x, weight, residual, _ = inputs(1)
    args = small_linear.bind(x, weight, None, residual)
    times = []
    with session("full", target):
        for _ in range(2):
            store.clear()
            for file in store.cachedir.cachedir("tune").iterdir():
                file.unlink()
            choose(small_linear, target, args)
            (entry,) = (e for e in store._memory.values() if e)
            times.append(min(entry.microseconds.values()))
    assert max(times) < 1.3 * min(times)
    assert 2 * 4096**2 / (min(times) * 1e-6) < 8e12  # the weight came from memory
