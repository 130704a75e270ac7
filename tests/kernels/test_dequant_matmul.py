"""int8_matmul and int4_matmul: every implementation against float64, every layout against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from fxopt.kernels import _int4
from fxopt.kernels.dequant_matmul import int4_matmul, int8_matmul
from fxopt.ops import Target

CPU = Target(torch.device("cpu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int8_case(m, n, k, dtype=torch.float32, bias=False, scale_dtype=None):
    x = torch.randn(m, k).to(dtype)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = (torch.rand(n) / 64 + 0.01).to(scale_dtype or dtype)
    return [x, weight, scale, torch.randn(n).to(dtype) if bias else None]


def int4_case(m, n, k, group=32, layout="low/2", dtype=torch.float32, packed=torch.uint8, form="symmetric", bias=False):
    q = torch.randint(0, 16, (n, k))
    scale = (torch.rand(n, k // group) / 16 + 0.01).to(dtype)
    zero = minimum = None
    if form == "integer zero":
        zero = torch.randint(0, 17, (n, k // group), dtype=torch.int8)
    elif form == "float zero":
        zero = (torch.rand(n, k // group) * 15).to(dtype)
    elif form == "minimum":
        minimum = torch.randn(n, k // group).to(dtype)
    offset = 8.0 if form == "symmetric" else 7.5 if form == "half" else 0.0
    x = torch.randn(m, k).to(dtype)
    words = _int4.pack(q, layout, packed)
    return [x, words, scale, zero, minimum, group, layout, offset, torch.randn(n).to(dtype) if bias else None]


def in_float64(op, args):
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    return op.reference(*wide)


def on(device, args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


@pytest.fixture
def check(assert_as_good_as):
    """Compare one implementation with the reference in float64, and its error with the reference's own at x's dtype."""

    def check(op, name, args, device="cpu"):
        args = on(device, args)
        assert_as_good_as(op.run(name, *args), op.reference(*args), in_float64(op, args))

    return check


@pytest.mark.parametrize("layout", ["low/2", "high/2", "low/32", "high/64", "low/row", "high/row"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_unpack_inverts_pack(layout, dtype):
    values = torch.randint(0, 16, (5, 192))
    assert torch.equal(_int4.unpack(_int4.pack(values, layout, dtype), layout).long(), values)


def test_layouts_are_what_their_names_say():
    values = torch.arange(16).reshape(1, 16)
    assert _int4.pack(values, "low/2")[0, 0] == 0 + 16 * 1
    assert _int4.pack(values, "high/2")[0, 0] == 16 * 0 + 1
    assert _int4.pack(values, "low/8")[0, 0] == 0 + 16 * 4
    assert _int4.pack(values, "low/row")[0, 0] == 0 + 16 * 8
    assert _int4.pack(values, "low/8", torch.int32)[0, 0] == 0x76543210
    assert _int4.pack(values, "low/8", torch.int32)[0, 1] == 0xFEDCBA98 - (1 << 32)


@pytest.mark.parametrize("layout, dtype", [("sideways/2", torch.uint8), ("low/3", torch.uint8), ("low/2", torch.int32)])
def test_unknown_layouts_are_errors(layout, dtype):
    with pytest.raises(ValueError, match="layout"):
        _int4.Layout.parse(layout, dtype, 64)
    with pytest.raises(ValueError, match="int64"):
        _int4.Layout.parse("low/2", torch.int64, 64)


@pytest.mark.parametrize("m", [1, 3, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_triton(check, triton_device, m, dtype):
    check(int8_matmul, "triton", int8_case(m, 97, 131, dtype, bias=True), triton_device)
    check(int8_matmul, "triton", int8_case(m, 32, 256, dtype, scale_dtype=torch.float32), triton_device)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "group, layout", [(32, "low/2"), (64, "high/2"), (128, "low/row"), (32, "low/32"), (96, "high/2")]
)
def test_int4_triton_layouts(check, triton_device, m, dtype, group, layout):
    check(int4_matmul, "triton", int4_case(m, 33, 384, group, layout, dtype), triton_device)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("form", ["symmetric", "integer zero", "float zero", "minimum", "half"])
@pytest.mark.parametrize("group", [32, 128, 640])
def test_int4_triton_forms(check, triton_device, m, form, group):
    for dtype in (torch.float32, torch.bfloat16):
        check(int4_matmul, "triton", int4_case(m, 17, 640, group, form=form, dtype=dtype, bias=True), triton_device)


@pytest.mark.parametrize("m", [1, 2])
def test_groups_that_chunks_straddle(check, triton_device, m):
    for group, layout in ((8, "low/2"), (24, "low/row"), (32, "high/64"), (6, "high/6")):
        check(int4_matmul, "triton", int4_case(m, 9, 192, group, layout), triton_device)


@pytest.mark.parametrize("m", [1, 5])
def test_gptq_words(check, triton_device, m):
    """int32 [K / 8, N] with [K / g, N] tables, passed as transposed views."""
    args = int4_case(m, 40, 256, 64, "low/8", torch.float16, torch.int32, "integer zero")
    for i in (1, 2, 3):
        args[i] = args[i].t().contiguous().t()
    check(int4_matmul, "triton", args, triton_device)
    args[1] = args[1].contiguous()  # row-major words are read as bytes
    check(int4_matmul, "triton", args, triton_device)


@pytest.mark.parametrize("m", [1, 4])
def test_strides_are_read_in_place(triton_device, m):
    int8 = on(triton_device, int8_case(m, 24, 96))
    int4 = on(triton_device, int4_case(m, 24, 96))
    for op, args in ((int8_matmul, int8), (int4_matmul, int4)):
        expected = op.run("triton", *args)
        x, w = args[0], args[1]
        args[0] = torch.stack([x, x], -1)[..., 0]
        args[1] = torch.cat([w, w], 1)[:, : w.shape[1]]
        args[2] = torch.stack([args[2], args[2]], -1)[..., 0]
        # Other strides may mean other tiles, which add up in another order.
        torch.testing.assert_close(op.run("triton", *args), expected, rtol=1e-5, atol=1e-5)


def test_leading_dimensions(triton_device):
    for op, args in ((int8_matmul, int8_case(6, 24, 96)), (int4_matmul, int4_case(6, 24, 96))):
        args = on(triton_device, args)
        flat = op.run("triton", *args)
        args[0] = args[0].reshape(2, 3, 96)
        assert torch.equal(op.run("triton", *args), flat.reshape(2, 3, 24))
        args[0] = args[0][0, 0]
        assert op.run("triton", *args).shape == (24,)
        args[0] = args[0].new_empty(0, 96)
        assert op.run("triton", *args).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8])
def test_int8_aten(check, dtype, m):
    for bias in (False, True):
        check(int8_matmul, "aten", int8_case(m, 48, 256, dtype, bias))
        if dtype == torch.bfloat16:
            check(int8_matmul, "aten", int8_case(m, 48, 256, dtype, bias, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_decomposed(check, dtype):
    for bias in (False, True):
        check(int8_matmul, "decomposed", int8_case(5, 48, 256, dtype, bias, torch.float32))


def test_float16_sums_do_not_overflow():
    x, weight = torch.full((2, 4096), 8.0).half(), torch.full((32, 4096), 127, dtype=torch.int8)
    for scale in (torch.full((32,), 1e-3), torch.full((32,), 1e-3).half()):
        assert int8_matmul(x, weight, scale).isfinite().all()
        assert int8_matmul.run("decomposed", x, weight, scale).isfinite().all()


@pytest.mark.parametrize(
    "args, objection",
    [
        (int8_case(1, 16, 64, torch.float32), "16-bit x only"),
        (int8_case(1, 16, 63, torch.bfloat16), "multiples of 32"),  # it crashes there
        (int8_case(9, 16, 64, torch.bfloat16), "up to 8 rows"),
        (int8_case(1, 16, 64, torch.float16, scale_dtype=torch.float32), "overflow float16"),
    ],
)
def test_aten_is_not_used_where_it_is_slow_or_unsafe(args, objection):
    chosen, passed_over = int8_matmul.select(CPU, *args)
    assert chosen.name == "decomposed"
    assert objection in dict(passed_over)["aten"]


def test_what_is_chosen_on_the_cpu():
    assert int8_matmul.select(CPU, *int8_case(1, 16, 64, torch.bfloat16))[0].name == "aten"
    assert int4_matmul.select(CPU, *int4_case(1, 16, 64, 32))[0].name == "decomposed"
    training = Target(torch.device("cpu"), training=True)
    assert int8_matmul.select(training, *int8_case(1, 16, 64, torch.bfloat16))[0].name == "reference"


def test_int4_reference_is_the_formula():
    args = int4_case(2, 3, 64, form="integer zero", dtype=torch.float64)
    x, packed, scale, zero, _, group, layout, _, _ = args
    q = _int4.unpack(packed, layout).double()
    w = (q - zero.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)
    torch.testing.assert_close(int4_matmul(*args), F.linear(x, w))


@pytest.mark.parametrize(
    "op, args", [(int8_matmul, int8_case(3, 8, 32)), (int4_matmul, int4_case(3, 8, 64, form="minimum"))]
)
def test_opcheck(op, args):
    torch.library.opcheck(op.overload, tuple(args))
    for i in (0, 2):
        args[i] = args[i].clone().requires_grad_()
    torch.library.opcheck(op.overload, tuple(args))


def test_gradients_are_the_references():
    args = int4_case(3, 8, 64, form="minimum", dtype=torch.float64)
    for i in (0, 2, 4):
        args[i].requires_grad_()
    wanted = [args[i] for i in (0, 2, 4)]
    got = torch.autograd.grad(int4_matmul(*args).square().sum(), wanted)
    expected = torch.autograd.grad(int4_matmul.reference(*args).square().sum(), wanted)
    torch.testing.assert_close(got, expected)


def test_dynamic_rows():
    calls = 0

    def backend(gm, _):
        nonlocal calls
        calls += 1
        return gm

    _, *rest = int4_case(4, 8, 64)
    compiled = torch.compile(lambda x: int4_matmul(x, *rest), backend=backend, dynamic=True)
    for m in (4, 7, 9):
        y = torch.randn(m, 64)
        torch.testing.assert_close(compiled(y), int4_matmul.reference(y, *rest))
    assert calls == 1


@pytest.mark.parametrize("m", [1, 3])
def test_every_configuration(assert_as_good_as, triton_device, m):
    for op, args in ((int4_matmul, int4_case(m, 40, 256)), (int8_matmul, int8_case(m, 40, 256))):
        args = on(triton_device, args)
        kernel = next(i for i in op.implementations if i.name == "triton")
        eager, truth = op.reference(*args), in_float64(op, args)
        for config in kernel.configs(*op.bind(*args)):
            assert_as_good_as(op.run("triton", *args, config=config), eager, truth, ulps=4)


def test_what_the_tuner_draws_is_of_the_kind_and_has_all_bits():
    for op, args in ((int4_matmul, int4_case(3, 40, 256, form="integer zero")), (int8_matmul, int8_case(3, 40, 256))):
        args = op.bind(*args)
        metas = tree_map(lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, args)
        drawn = op.drawn(*metas)
        kinds = [[(t.shape, t.dtype) for t in some if isinstance(t, torch.Tensor)] for some in (args, drawn)]
        assert kinds[0] == kinds[1]
        assert [a for a in drawn if not isinstance(a, torch.Tensor)] == [
            a for a in args if not isinstance(a, torch.Tensor)
        ]
        assert len(drawn[1].unique()) > 200
        assert op.reference(*drawn).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("m", [1, 2, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(check, m, dtype):
    for layout, form in (("low/2", "symmetric"), ("low/32", "minimum"), ("low/row", "integer zero")):
        check(int4_matmul, "triton", int4_case(m, 1000, 1024, 32, layout, dtype, form=form, bias=True), "cuda")
    args = on("cuda", int8_case(m, 1000, 1024, dtype))
    chosen = int8_matmul.select(Target(torch.device("cuda")), *args)[0].name
    assert chosen == ("triton" if m <= 32 else "decomposed")
    check(int8_matmul, "triton", args, "cuda")
