"""First and second derivatives of every fused op, in every implementation that training may choose."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fxopt.kernels import attention as attention_module
from fxopt.kernels._int4 import pack
from fxopt.kernels.attention import attention
from fxopt.kernels.attention_training import attention_stats
from fxopt.kernels.dequant_matmul import int4_matmul, int8_matmul
from fxopt.kernels.layer_norm import add_layer_norm, layer_norm
from fxopt.kernels.rms_norm import add_rms_norm, rms_norm
from fxopt.ops import Target, find_op

F64 = torch.float64
TRAINING = Target(torch.device("cpu"), training=True)


def randn(*shape):
    return torch.randn(shape, dtype=F64, requires_grad=True)


def rms(residual=False, weighted=True, **rest):
    op = add_rms_norm if residual else rms_norm
    x = [randn(3, 5) for _ in range(1 + residual)]
    return op, (*x, randn(5) if weighted else None, 1e-3, *rest.values())


def layer(residual=False, dims=1, affine=True):
    op = add_layer_norm if residual else layer_norm
    x = [randn(2, 2, 3) for _ in range(1 + residual)]
    shape = (2, 3)[2 - dims :]
    return op, (*x, *((randn(*shape), randn(*shape)) if affine else (None, None)), 1e-3, dims)


def attend(mask=None, causal=False, empty_rows="nan", shape=(1, 4, 2, 3, 4, 3, 2)):
    b, h, g, m, n, d, e = shape
    keep = torch.rand(b, 1, m, n) < 0.6
    keep[..., 0] = True
    if empty_rows != "nan":
        keep[..., 1, :] = False
    made = {None: None, "bool": keep, "bias": randn(h, m, n), "row": randn(b, 1, 1, n)}[mask]
    return attention, (randn(b, h, m, d), randn(b, g, n, d), randn(b, g, n, e), made, 0.6, causal, empty_rows)


def int8(bias=True):
    weight = torch.randint(-127, 128, (4, 6), dtype=torch.int8)
    return int8_matmul, (
        randn(3, 6),
        weight,
        (torch.rand(4, dtype=F64) / 64).requires_grad_(),
        randn(4) if bias else None,
    )


def int4(zero=False, minimum=False, layout="low/2"):
    packed = pack(torch.randint(0, 16, (4, 8), dtype=torch.uint8), layout)
    tables = [randn(4, 2) if on else None for on in (True, zero, minimum)]
    return int4_matmul, (randn(3, 8), packed, *tables, 4, layout, 8.0, randn(4))


CASES = {
    "rms_norm": rms,
    "rms_norm, no weight": functools.partial(rms, weighted=False),
    "rms_norm, offset": functools.partial(rms, offset=1.0),
    "rms_norm, rounded": functools.partial(rms, offset=0.0, round_to=F64, out=F64),
    "add_rms_norm": functools.partial(rms, residual=True),
    "layer_norm": layer,
    "layer_norm, two dimensions": functools.partial(layer, dims=2),
    "layer_norm, not affine": functools.partial(layer, affine=False),
    "add_layer_norm": functools.partial(layer, residual=True),
    "attention": attend,
    "attention, causal": functools.partial(attend, causal=True),
    "attention, boolean mask": functools.partial(attend, "bool"),
    "attention, empty rows of 0": functools.partial(attend, "bool", empty_rows="zero"),
    "attention, uniform empty rows": functools.partial(attend, "bool", empty_rows="uniform"),
    "attention, uniform and causal": functools.partial(attend, "bool", causal=True, empty_rows="uniform"),
    "attention, bias": functools.partial(attend, "bias"),
    "attention, bias as SDPA takes it": functools.partial(attend, "bias", empty_rows="zero"),
    "attention, bias and causal": functools.partial(attend, "row", causal=True),
    "attention, one row": functools.partial(attend, shape=(1, 4, 2, 1, 5, 3, 3)),
    "attention, wide values": functools.partial(attend, shape=(1, 2, 2, 3, 4, 2, 4)),
    "int8_matmul": int8,
    "int8_matmul, no bias": functools.partial(int8, bias=False),
    "int4_matmul": int4,
    "int4_matmul, zero and minimum": functools.partial(int4, zero=True, minimum=True, layout="high/2"),
}


def usable(op, args, target=TRAINING):
    """The implementations that take these arguments in training, and the reference."""
    args = op.bind(*args)
    return ["reference", *(i.name for i in op.implementations if i.objection(target, *args) is None)]


def split(args):
    """The differentiable arguments, and a way to put others in their place."""
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def fill(values):
        filled = list(args)
        for i, value in zip(at, values, strict=True):
            filled[i] = value
        return filled

    return [args[i] for i in at], fill


@pytest.mark.parametrize("name", CASES)
def test_first_derivatives(name):
    op, args = CASES[name]()
    wanted, fill = split(args)
    checked = usable(op, args)
    assert op is int8_matmul or len(checked) > 1
    for implementation in checked:
        assert gradcheck(lambda *values: op.run(implementation, *fill(values)), wanted, fast_mode=True)  # noqa: B023
    assert gradcheck(lambda *values: op(*fill(values)), wanted, fast_mode=True)


# The CPU's flash kernel, which SDPA takes wherever it can, has no second derivative in eager mode either.
NO_SECOND = {"attention": "sdpa"}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    op, args = CASES[name]()
    wanted, fill = split(args)
    for implementation in usable(op, args):
        if not implementation.startswith(NO_SECOND.get(op.name, "-")):
            assert gradgradcheck(lambda *values: op.run(implementation, *fill(values)), wanted, fast_mode=True)  # noqa: B023
    assert gradgradcheck(lambda *values: op(*fill(values)), wanted, fast_mode=True)


def test_second_derivatives_of_arguments_that_depend_on_each_other():
    w = randn(5)
    assert gradgradcheck(lambda x: add_rms_norm(x, x.sin(), w, 1e-3)[0], (randn(3, 5),), fast_mode=True)


def test_a_declared_gradient_is_used_and_can_be_differentiated_itself():
    _, args = attend("bias", empty_rows="zero")
    wanted, fill = split([*args, 2.0, None, None, None, None, None])

    def result(*values):
        return attention_stats(*fill(values))[0]

    assert gradcheck(result, wanted, fast_mode=True)
    assert gradgradcheck(result, wanted, fast_mode=True)
    (declared,) = [attention_stats._gradient]
    called = []
    attention_stats._gradient = lambda *a: called.append(a[3]) or declared(*a)
    try:
        torch.autograd.grad(result(*wanted).sum(), wanted[0])
    finally:
        attention_stats._gradient = declared
    assert called == [tuple(i < 4 for i in range(13))]


def test_a_gradient_must_be_where_the_ops_name_covers_it():
    with pytest.raises(ValueError, match="name it in the op's sources"):
        attention_stats.gradient(lambda *a: a)


def test_no_opaque_kernel_in_training():
    """Their backward would be the reference's, recomputed: right, but not what they were chosen for."""
    for name, make in CASES.items():
        op, args = make()
        for kind in ("cpu", "cuda"):
            chosen, _ = op.select(Target(torch.device(kind), training=True, cuda_graphs=True), *op.bind(*args))
            assert not chosen.opaque, name


def test_heads_are_repeated_under_a_mask_on_a_gpu():
    args = attention.bind(*attend("bool", empty_rows="uniform")[1])
    chosen = [attention.select(Target(torch.device(kind), training=True), *args)[0].name for kind in ("cuda", "cpu")]
    assert chosen == ["sdpa_repeated", "sdpa"]
    torch.testing.assert_close(attention.run("sdpa_repeated", *args), attention.run("reference", *args))
    plain = attention.bind(*attend()[1])
    assert attention.select(Target(torch.device("cuda"), training=True), *plain)[0].name == "sdpa"


def test_a_fill_with_minus_infinity_has_an_implementation_of_its_own():
    def chosen(training, *mask, **settings):
        args = attention.bind(*attend(*mask, **settings)[1])
        return attention.select(Target(torch.device("cpu"), training=training), *args)[0].name

    assert chosen(True, "bool") == "sdpa_filled"
    assert chosen(False, "bool") == "sdpa"
    assert chosen(True, "bool", empty_rows="zero") == chosen(True, "bool", empty_rows="uniform") == "sdpa"


@pytest.mark.parametrize("fill, forms", [("masked_fill", "uniform"), ("add", "nan")])
@pytest.mark.parametrize("value", ["min", -1e9, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_training_chooses_is_right_in_rows_masked_throughout(fill, forms, value, dtype):
    """SDPA's flash backward makes the weights of such rows 1, not 1 / N."""
    value = torch.finfo(dtype).min if value == "min" else value
    q, k, v = (torch.randn(2, 4, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7))
    keep = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    keep[0, :, 2] = keep[1, ..., 4:] = False
    added = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, value)
    scores = q @ k.mT * 0.3
    eager = (scores.masked_fill(~keep, value) if fill == "masked_fill" else scores + added).softmax(-1) @ v
    args = attention.bind(q, k, v, keep if fill == "masked_fill" else added, 0.3, False, forms)
    chosen, _ = attention.select(TRAINING, *args)
    ours = chosen.run(*args)
    upstream = torch.randn_like(eager)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(eager, (q, k, v), upstream)
    )


def test_the_flash_backward_is_still_wrong_there():
    """Once this fails, `attention` can give additive masks to SDPA in training again."""
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    dead = torch.full((4, 4), torch.finfo(torch.float32).min)
    grads = [
        torch.autograd.grad(attention.run(name, q, k, v, dead, 0.3, False, "nan").sum(), v)[0]
        for name in ("sdpa", "reference")
    ]
    assert not torch.allclose(*grads)


def test_every_op_is_tested():
    from fxopt import ops

    assert {op.name for op in ops._OPS.values() if op.overload.namespace == ops.NAMESPACE} >= {
        make()[0].name for make in CASES.values()
    }
    assert find_op(attention.overload) is attention_module.attention
