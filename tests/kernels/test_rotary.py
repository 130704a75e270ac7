"""Rotary embeddings: every pairing against complex numbers in float64, tables, strides, both of q and k in a launch."""

import pytest
import torch

from fxopt.kernels.rotary import PAIRS, rotary, rotary_pair
from fxopt.ops import Target

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def exact(x, cos, sin, pairs="halves", half_tables=False, last=False, inverse=False, *_):
    """The rotation in complex numbers: tables of one number a pair are needed."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    read, written = PAIRS[pairs]
    if not half_tables:
        count = cos.shape[-1] // 2
        cos, sin = (t[..., :count] if written == "halves" else t[..., ::2] for t in (cos, sin))
    width = 2 * cos.shape[-1]
    start = x.shape[-1] - width if last else 0
    part = x[..., start : start + width]
    a, b = part.chunk(2, -1) if read == "halves" else (part[..., ::2], part[..., 1::2])
    z = torch.complex(a, b) * torch.complex(cos, -sin if inverse else sin)
    turned = torch.cat((z.real, z.imag), -1) if written == "halves" else torch.stack((z.real, z.imag), -1).flatten(-2)
    return torch.cat((x[..., :start], turned, x[..., start + width :]), -1)


def tables(shape, width, pairs, half_tables, dtype, device):
    angle = torch.rand((*shape, width // 2), device=device, dtype=F64) * 6
    if not half_tables:
        angle = torch.cat((angle, angle), -1) if pairs.endswith("halves") else angle.repeat_interleave(2, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("implementation", ["reference", "decomposed", "triton"])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("half_tables", [False, True])
@pytest.mark.parametrize("lanes, width, last", [(16, 16, False), (20, 12, False), (20, 12, True), (2, 2, False)])
def test_every_pairing(assert_as_good_as, triton_device, implementation, pairs, half_tables, lanes, width, last):
    for dtype, inverse in ((F32, False), (BF16, False), (F16, True)):
        x = torch.randn(2, 3, 5, lanes, device=triton_device).to(dtype)
        cos, sin = tables((1, 1, 5), width, pairs, half_tables, dtype, triton_device)
        args = (x, cos, sin, pairs, half_tables, last, inverse)
        assert_as_good_as(rotary.run(implementation, *args), rotary.reference(*args), exact(*args))


@pytest.mark.parametrize("compute, out_dtype", [(None, None), (F32, None), (F32, BF16), (None, F16)])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16), (F32, F16)])
def test_casts(assert_as_good_as, triton_device, dtypes, compute, out_dtype):
    x = torch.randn(3, 5, 12, device=triton_device).to(dtypes[0])
    cos, sin = tables((5,), 8, "halves", False, dtypes[1], triton_device)
    args = (x, cos, sin, "halves", False, False, False, compute, out_dtype)
    y, eager = rotary.run("triton", *args), rotary.reference(*args)
    assert y.dtype == eager.dtype == rotary(*args).dtype
    assert_as_good_as(y, eager, exact(*args))


@pytest.mark.parametrize("view", [
    lambda t: t.transpose(1, 2), lambda t: t[..., 3:15], lambda t: t[..., ::2], lambda t: t[:, :1].expand(2, 4, 6, 24),
    lambda t: t[0], lambda t: t[0, 0], lambda t: t[0, 0, 0], lambda t: t.permute(2, 0, 1, 3),
])  # fmt: skip
def test_strides_and_ranks(triton_device, view):
    x = view(torch.randn(2, 4, 6, 24, device=triton_device))
    cos, sin = tables((), x.shape[-1], "interleaved", False, F32, triton_device)
    args = (x, cos, sin, "interleaved")
    torch.testing.assert_close(rotary.run("triton", *args), rotary.reference(*args))


@pytest.mark.parametrize("shape", [(5, 16), (1, 1, 5, 16), (2, 1, 5, 16), (2, 1, 1, 16), (2, 3, 5, 16)])
def test_tables_broadcast(triton_device, shape):
    x = torch.randn(2, 3, 5, 16, device=triton_device)
    wide = torch.randn(*shape[:-1], 64, device=triton_device)
    cos, sin = wide[..., :32:2], wide[..., 33::2].contiguous()
    torch.testing.assert_close(rotary.run("triton", x, cos, sin), rotary.reference(x, cos, sin))


@pytest.mark.parametrize("heads", [(4, 2), (1, 4), (4, 0), (0, 2), (0, 0)])
@pytest.mark.parametrize("implementation", ["decomposed", "triton"])
def test_q_and_k(triton_device, implementation, heads):
    q, k = (torch.randn(2, 5, n, 16, device=triton_device).transpose(1, 2) for n in heads)
    cos, sin = tables((1, 1, 5), 16, "halves", False, F32, triton_device)
    for actual, x in zip(rotary_pair.run(implementation, q, k, cos, sin), (q, k), strict=True):
        torch.testing.assert_close(actual, rotary.reference(x, cos, sin))


@pytest.mark.parametrize("options", [(), ("interleaved", True, True), ("interleaved to halves", False, False, True)])
@pytest.mark.parametrize("op", [rotary, rotary_pair])
def test_opcheck(op, options):
    for x in (torch.randn(2, 3, 4, 8), torch.randn(2, 4, 3, 8).transpose(1, 2), torch.randn(3, 4, 8)):
        cos, sin = tables(
            (4,), 8 if not options else 4, *(options or ("halves",))[:1], options[1:2] == (True,), F32, "cpu"
        )
        xs = (x,) if op is rotary else (x, x[..., :1, :, :])
        torch.library.opcheck(op.overload, (*xs, cos, sin, *options))


@pytest.mark.parametrize("pairs", PAIRS)
def test_gradcheck(pairs):
    shapes = (2, 3, 6), (1, 3, 6), (3, 4), (3, 4)
    q, k, cos, sin = (torch.randn(s, dtype=F64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *t: rotary(*t, pairs), (q, cos, sin))
    assert torch.autograd.gradcheck(lambda *t: rotary_pair(*t, pairs), (q, k, cos, sin))


def test_dynamic_shapes():
    def f(q, k, cos, sin):
        return rotary_pair(q, k, cos, sin)

    compiled = torch.compile(f, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (3, 5, 9):
        q, k, cos, sin = (torch.randn(s) for s in ((2, 4, tokens, 8), (2, 2, tokens, 8), (tokens, 8), (tokens, 8)))
        torch.testing.assert_close(compiled(q, k, cos, sin), rotary_pair.reference(q, k, cos, sin))


def test_an_unknown_pairing_is_named():
    with pytest.raises(ValueError, match="pairs is 'quarters'; there are 'halves', "):
        rotary.reference(torch.randn(2, 8), torch.randn(8), torch.randn(8), "quarters")


@pytest.mark.parametrize("target, x, chosen, reason", [
    (Target(torch.device("cuda"), compiled=True), torch.empty(2, 8), "decomposed", "under the compiler"),
    (Target(torch.device("cuda"), compiled=False, training=True), torch.empty(2, 8), "decomposed", "no backward"),
    (Target(torch.device("cuda"), compiled=False), torch.empty(2, 8), "triton", None),
    (Target(torch.device("cuda"), compiled=False), torch.empty(2, 8).double(), "decomposed", "float32"),
    (Target(torch.device("cuda"), compiled=False), torch.empty(1, 1, 1, 2, 8), "decomposed", "three dimensions"),
    (Target(torch.device("cpu"), compiled=False), torch.empty(2, 8), "decomposed", "CUDA device"),
])  # fmt: skip
def test_which_implementation_serves_where(target, x, chosen, reason):
    for op, xs in ((rotary, (x,)), (rotary_pair, (x, x))):
        implementation, passed_over = op.select(target, *op.bind(*xs, torch.empty(8), torch.empty(8)))
        assert implementation.name == chosen
        assert all(reason in objection for _, objection in passed_over)


@pytest.mark.gpu
def test_on_a_gpu(assert_as_good_as):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q, k = (torch.randn(2, 64, n, 128, device="cuda").bfloat16().transpose(1, 2) for n in (32, 8))
    cos, sin = tables((1, 1, 64), 128, "halves", False, BF16, "cuda")
    for y, x in zip(rotary_pair.run("triton", q, k, cos, sin), (q, k), strict=True):
        assert_as_good_as(y, rotary.reference(x, cos, sin), exact(x, cos, sin))
