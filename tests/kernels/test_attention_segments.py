"""Attention whose mask is numbers of segments: bounds where a segment lies together, comparisons where it does not."""

import pytest
import torch

from fxopt.kernels._flash_parts import SEGMENTS, operands
from fxopt.kernels._flash_tiles import worth_listing
from fxopt.kernels.attention import attention
from fxopt.ops import Target

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
B, HQ, HKV = 2, 4, 2


def numbers(n, device):
    """[B or 1, 1, n] of each kind."""
    i = torch.arange(n, device=device)
    random = torch.randint(0, 5, (B, 1, n), device=device)
    return {
        "sorted": (i // 23)[None, None],
        "falling": -(i // 40)[None, None],
        "padding at both ends": torch.where((i > 8) & (i < n - 9), i // 30 + 1, 0)[None, None],
        "any order": random,
        "one batch in order": torch.where(torch.tensor([True, False], device=device)[:, None, None], i // 50, random),
        "one segment": torch.full((1, 1, n), 1 << 40, device=device),
        "each its own": i[None, None],
    }


def told(number, last=None):
    """What the op is told of segments: (mask, first, last)."""
    same, key = number[..., :, None] == number[..., None, :], torch.arange(number.shape[-1], device=number.device)
    first, end = torch.where(same, key, 1 << 20).amin(-1), torch.where(same, key, -1).amax(-1)
    first = torch.where(end - first + 1 == same.sum(-1), first, -1)
    return number, first, end if last is None else torch.minimum(end, last)


def exact(q, k, v, number, last, dtype, empty_rows="zero", softcap=None, bias=None):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v))
    s = q @ k.mT * 0.3
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    key = torch.arange(k.shape[2], device=q.device)
    s = s if bias is None else s + bias.to(dtype)[..., None, None] * (key - key[:, None])
    live = number[..., :, None] == number[..., None, :]
    live = live if last is None else live & (key <= last[..., None])
    s = s.masked_fill(~live, -1e30 if empty_rows == "uniform" else -float("inf"))
    p = torch.softmax(s, -1, dtype=None if dtype == F64 else F32).to(dtype)
    return (p.nan_to_num(0.0) if empty_rows == "zero" else p) @ v


def check(assert_as_good_as, implementation, kind, n, dtype, device, cut=0, **more):
    make = lambda h, w: torch.randn(B, h, n, w, device=device).to(dtype)  # noqa: E731
    q, k, v = make(HQ, 16), make(HKV, 16), make(HKV, 24)
    number = numbers(n, device)[kind]
    last = torch.arange(n, device=device) - cut if cut is not None else None
    mask, first, end = told(number, last)
    given = {"mask": mask, "first": first, "last": end, "empty_rows": "zero", **more}
    y = attention.run(implementation, q, k, v, scale=0.3, **given)
    theirs, right = (exact(q, k, v, number, last, d, **more) for d in (dtype, F64))
    assert_as_good_as(y, theirs, right, 4)


@pytest.mark.parametrize("kind", numbers(1, "cpu"))
@pytest.mark.parametrize("implementation", ["reference", "sdpa", "decomposed", "triton"])
@pytest.mark.parametrize("n, dtype", [(150, F32), (5, F32), pytest.param(260, BF16, marks=pytest.mark.slow)])
def test_segments_against_float64(assert_as_good_as, triton_device, implementation, kind, n, dtype):
    check(assert_as_good_as, implementation, kind, n, dtype, triton_device)


@pytest.mark.parametrize("kind", ["padding at both ends", "any order"])
@pytest.mark.parametrize("implementation", ["sdpa", "decomposed", "triton"])
def test_segments_beside_everything_else(assert_as_good_as, triton_device, implementation, kind):
    run = lambda **more: check(assert_as_good_as, implementation, kind, 150, F32, triton_device, **more)  # noqa: E731
    run(cut=None)
    run(cut=9)  # some rows are empty
    run(cut=9, empty_rows="uniform")
    run(bias=torch.randn(1, HQ, device=triton_device))
    if implementation != "sdpa":
        run(softcap=3.0)


def test_rows_that_are_told_are_not_compared():
    """Where first isn't negative the numbers don't count: what the kernels may rely on is what the op says."""
    q = torch.randn(1, 1, 4, 8)
    mask, first = torch.arange(4)[None, None], torch.tensor([[[0, 0, -1, 0]]])
    out = attention(q, q, q, mask, 1.0, first=first, empty_rows="zero")
    alone = torch.arange(4) == 2
    torch.testing.assert_close(out[0, 0, alone], q[0, 0, alone])
    assert not torch.isclose(out[0, 0, ~alone], q[0, 0, ~alone]).any()


def test_tiles_of_segments_are_not_listed():
    q = torch.randn(B, 8, 300, 16)
    given = operands(q, q, q, torch.zeros(1, 1, 300, dtype=torch.int32), False, "zero", None, None, None,
                     torch.zeros(1, 1, 300), None)  # fmt: skip
    assert given.flags["MASK"] == SEGMENTS
    assert given.mask.shape == (B, 8, 300, 1)
    assert not worth_listing(given, 64)


def test_opcheck_and_gradients():
    number = torch.randint(0, 3, (1, 1, 9))
    mask, first, last = told(number)
    q, k, v = (torch.randn(B, h, 9, 4) for h in (HQ, HKV, HKV))
    args = attention.bind(q, k, v, mask, 0.3, empty_rows="zero", first=first, last=last)
    torch.library.opcheck(attention.overload, tuple(args))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention.reference(q, k, v, mask, 0.3, empty_rows="zero", first=first, last=last), leaves
    )


@pytest.mark.parametrize("target, chosen", [
    (Target(torch.device("cuda")), "triton"), (Target(torch.device("cpu")), "sdpa"),
    (Target(torch.device("cuda"), training=True), "triton_trained"),
])  # fmt: skip
def test_what_is_chosen(target, chosen):
    pytest.importorskip("triton")
    q = torch.randn(1, 2, 1024, 64, dtype=BF16)
    mask, first, last = told(torch.arange(1024)[None, None] // 100)
    args = attention.bind(q, q, q, mask, 0.3, empty_rows="zero", first=first, last=last)
    assert attention.select(target, *args)[0].name == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", numbers(1, "cpu"))
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_at_the_size_of_a_model(assert_as_good_as, kind, dtype):
    for n, cut in ((1500, 0), (1024, None)):
        check(assert_as_good_as, "triton", kind, n, dtype, "cuda", cut=cut)
