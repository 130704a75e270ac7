"""Attention is found in every spelling and computes what eager computes, also with symbolic sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attending import attend, compare, mask_after, mul_after, qkv, randn, repeat_kv, two_masks
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_softmax import RaiseSoftmax

aten = torch.ops.aten


# Each form takes (q, k, v, bias [2, 4, 5, 7]); the table is the list of spellings that must be found.
def plain(q, k, v, m):
    return attend(q @ k.transpose(-1, -2), v)


def div_after(q, k, v, m):
    return attend(torch.matmul(q, k.mT) / math.sqrt(8), v)


def scale_on_q(q, k, v, m):
    return attend((q * 0.3) @ k.permute(0, 1, 3, 2), v)


def scale_on_k(q, k, v, m):
    return attend(q @ (k / 3.0).transpose(2, 3), v)


def scale_on_both(q, k, v, m):
    return attend((q * 0.5) @ (k.transpose(2, 3) * 0.5), v)


def scale_on_the_left(q, k, v, m):
    return attend(0.3 * (q @ k.mT), v)


def tensor_scale(q, k, v, m):
    return attend(q @ k.mT / torch.tensor(8.0, dtype=q.dtype).sqrt(), v)


def mask_before(q, k, v, m):
    return attend(m + q @ k.mT * 0.3, v)


def mask_subtracted(q, k, v, m):
    return attend(q @ k.mT * 0.3 - m, v)


def mask_with_alpha(q, k, v, m):
    return attend(torch.add(q @ k.mT, m, alpha=0.5), v)


def masks_summed_first(q, k, v, m):
    return attend(q @ k.mT * 0.3 + (m + m[:, :1]), v)


def scale_after_mask(q, k, v, m):
    return attend((q @ k.mT + m) / 3.0, v)


def in_place(q, k, v, m):
    scores = q @ k.mT
    scores *= 0.3
    scores += m
    return attend(scores, v)


def where_inf(q, k, v, m):
    return attend(torch.where(m > -1, q @ k.mT, float("-inf")), v)


def where_min(q, k, v, m):
    return attend(torch.where(m > 9, q @ k.mT * 0.3, torch.finfo(q.dtype).min), v)


def where_tensor_min(q, k, v, m):
    least = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype)
    return attend(torch.where(m > 0, q @ k.mT * 0.3, least), v)


def filled(q, k, v, m):
    return attend((q @ k.mT).masked_fill(m < 0, -1e9), v)


def filled_in_place(q, k, v, m):
    return attend((q @ k.mT).masked_fill_(m < 0, torch.finfo(q.dtype).min), v)


def filled_all(q, k, v, m):
    return attend((q @ k.mT).masked_fill(m < 9, -10000.0), v)


def bias_then_where(q, k, v, m):
    return attend(torch.where(m > 0, q @ k.mT + m, float("-inf")), v)


def where_then_bias(q, k, v, m):
    return attend(torch.where(m > 0, q @ k.mT, torch.finfo(torch.float32).min) + m, v)


def two_wheres(q, k, v, m):
    return attend(torch.where(m > -1, (q @ k.mT).masked_fill(m > 1, -math.inf), -math.inf), v)


def softmax_in_fp32(q, k, v, m):
    return torch.softmax(q @ k.mT * 0.3 + m, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def cast_around_softmax(q, k, v, m):
    return F.softmax((q @ k.mT + m).float(), -1).type_as(v) @ v


def scores_in_fp32(q, k, v, m):
    return torch.softmax(q.float() @ k.float().mT * 0.3, -1).to(v.dtype) @ v


def dropped_out(q, k, v, m):
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.1, training=False) @ v


def einsum(q, k, v, m):
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def einsum_sequence_first(q, k, v, m):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1), v)


def three_dims(q, k, v, m):
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, -1), v)


def three_dims_mask_round_trip(q, k, v, m):
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(2, 4, 5, 7) + m[:, :1]
    return torch.bmm(torch.softmax(scores.view(8, 5, 7), -1), v).view(2, 4, 5, 8).transpose(1, 2)


def three_dims_mask(q, k, v, m):
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) + m.reshape(8, 5, 7), -1), v)


def baddbmm(q, k, v, m):
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    return torch.softmax(torch.baddbmm(m.reshape(8, 5, 7), q, k.mT, beta=0.5, alpha=0.3), -1) @ v


def baddbmm_empty(q, k, v, m):
    q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
    empty = torch.empty(8, 5, 7, dtype=q.dtype)
    return torch.softmax(torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.3), -1) @ v


def two_dims(q, k, v, m):
    return torch.softmax(q[0, 0] @ k[0, 0].T * 0.3, -1) @ v[0, 0]


def five_dims(q, k, v, m):
    q, k, v = (x.reshape(2, 2, 2, -1, 8) for x in (q, k, v))
    return attend(q @ k.mT * 0.3 + m.reshape(2, 2, 2, 5, 7), v)


def windows_of_masks(q, k, v, m):
    """Swin: scores of [batch · windows, heads, ...] are viewed apart to add a mask for each window."""
    scores = (q @ k.mT).view(1, 2, 4, 5, 7) + m[:, 0].unsqueeze(1).unsqueeze(0)
    return attend(scores.view(2, 4, 5, 7), v)


def shared_keys(q, k, v, m):
    return attend(q @ k[:1].mT, v[:1].expand(2, -1, -1, -1))


def one_kv_head(q, k, v, m):
    return attend(q @ k[:, :1].mT, v[:, :1].expand(-1, 4, -1, -1))


def row_maximum_subtracted(q, k, v, m):
    scores = q @ k.mT * 0.3
    return attend(scores - scores.amax(-1, keepdim=True).detach() + m, v)


def stabilised_twice(q, k, v, m):
    """CogView: divided, shifted by the row maximum, multiplied again."""
    scores = (q @ k.mT + m) / 32.0
    return attend((scores - scores.amax(-1).unsqueeze(-1)) * 32.0, v)


def mask_expanded_as_scores(q, k, v, m):
    scores = q @ k.mT
    return attend(scores.masked_fill((m[:, :1] > 0).expand_as(scores), -math.inf), v)


def bias_shaped_as_scores(q, k, v, m):
    scores = q.reshape(8, 5, 8) @ k.reshape(8, 7, 8).mT
    return attend(scores + m.reshape_as(scores), v.reshape(8, 7, 8))


def bias_split_over_keys(q, k, v, m):
    """Relative positions of an image: keys are viewed apart to add a term for each axis."""
    k, v = k[:, :, :6], v[:, :, :6]
    scores = (q @ k.mT).view(2, 4, 5, 2, 3) + m[..., :2, None] + m[..., None, 2:5]
    return attend(scores.view(2, 4, 5, 6), v)


def raised_to_the_least_number(q, k, v, m):
    scores = q @ k.mT + m.masked_fill(m < 0, -math.inf).masked_fill(m > 2, torch.finfo(q.dtype).min)
    return attend(torch.max(scores, torch.tensor(torch.finfo(q.dtype).min)), v)


def handwritten_softmax(q, k, v, m):
    scores = q @ k.mT * 0.3
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True) @ v


def laid_out(q, k, v, m):
    q, k, v = (x.transpose(1, 2).contiguous().view(2, -1, 32).view(2, -1, 4, 8).permute(0, 2, 1, 3) for x in (q, k, v))
    return attend(q.contiguous() @ k.transpose(-1, -2).contiguous(), v.contiguous()).transpose(1, 2).reshape(2, 5, 32)


def sdpa(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_mask(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, m, scale=0.2)


def sdpa_bool(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, m > 1)


def sdpa_causal(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_three_dims(q, k, v, m):
    return F.scaled_dot_product_attention(q[0], k[0], v[0], m[0])


FORMS = [
    plain, mul_after, div_after, scale_on_q, scale_on_k, scale_on_both, scale_on_the_left, tensor_scale, mask_after,
    mask_before, mask_subtracted, mask_with_alpha, two_masks, masks_summed_first, scale_after_mask, in_place, where_inf,
    where_min, where_tensor_min, filled, filled_in_place, filled_all, bias_then_where, where_then_bias, two_wheres,
    softmax_in_fp32, cast_around_softmax, scores_in_fp32, dropped_out, einsum, einsum_sequence_first, three_dims,
    three_dims_mask_round_trip, three_dims_mask, baddbmm, baddbmm_empty, two_dims, five_dims, windows_of_masks,
    shared_keys, one_kv_head, row_maximum_subtracted, stabilised_twice, raised_to_the_least_number,
    mask_expanded_as_scores, bias_shaped_as_scores, bias_split_over_keys, handwritten_softmax, laid_out, sdpa,
    sdpa_mask, sdpa_bool, sdpa_causal, sdpa_three_dims,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_form_in_float32(fuser, form):
    inputs = (*qkv(), randn(2, 4, 5, 7, seed=4))
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 1, fuser.reasons
    compare(actual, form, inputs)


HALF = [plain, mul_after, scale_on_both, tensor_scale, mask_after, two_masks, where_inf, where_min, filled_all,
        softmax_in_fp32, cast_around_softmax, scores_in_fp32, three_dims_mask_round_trip, sdpa_mask]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", HALF, ids=lambda f: f.__name__)
def test_form_in_half_precision(fuser, form, dtype):
    inputs = (*qkv(dtype), randn(2, 4, 5, 7, dtype=dtype, seed=4))
    if form is where_inf or form is where_min:
        inputs = (*inputs[:3], inputs[3].abs() - (inputs[3] < -1.5).to(dtype) * 9)
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 1, fuser.reasons
    compare(actual, form, inputs)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float16).min, -1e4])
def test_fills_of_float16_at_the_width_of_a_head(fuser, fill):
    """Hostile rows of the verification stay within what scores in float16 can be."""

    def program(q, k, v, m):
        return attend((q @ k.mT).masked_fill(m < -1.5, fill), v)

    inputs = (*(randn(2, 4, n, 128, dtype=torch.float16, seed=n) for n in (5, 7, 7)), randn(2, 4, 5, 7, seed=4))
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1, fuser.reasons


def test_value_width_may_differ(fuser):
    inputs = (*qkv(value_width=3), None)
    compare(fuser.run(mul_after, *inputs), mul_after, inputs)
    assert fuser.sites == 1


GROUPED = {
    "expand and reshape": lambda x: repeat_kv(x, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "unsqueeze, repeat, flatten": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "sequence first": lambda x: x.mT.mT.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("repeat", GROUPED.values(), ids=GROUPED.keys())
@pytest.mark.parametrize("folded", [False, True], ids=["4-D", "3-D"])
def test_repeated_heads_are_passed_unrepeated(fuser, repeat, folded):
    def program(q, k, v, m):
        k, v = repeat(k), repeat(v)
        if folded:
            q, k, v = (x.reshape(8, -1, 8) for x in (q, k, v))
        return attend(q @ k.transpose(-1, -2) * 0.3, v)

    inputs = (*qkv(kv_heads=2), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1, fuser.reasons
    assert [list(a.meta["val"].shape) for a in fuser.calls[0][1:3]] == [[2, 2, 7, 8]] * 2


def test_heads_repeated_in_another_order_are_not_grouped(fuser):
    def program(q, k, v, m):
        return attend(q @ k.repeat(1, 2, 1, 1).mT, v.repeat(1, 2, 1, 1))

    inputs = (*qkv(kv_heads=2), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1
    assert [a.meta["val"].shape[1] for a in fuser.calls[0][1:3]] == [4, 4]


def test_keys_and_values_repeated_in_different_orders(fuser):
    def program(q, k, v, m):
        return attend(q @ repeat_kv(k, 2).mT, v.repeat(1, 2, 1, 1))

    inputs = (*qkv(kv_heads=2), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1


def test_sdpa_with_grouped_heads(fuser):
    def named(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def repeated(q, k, v, m):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), m)

    inputs = (*qkv(kv_heads=2), randn(2, 4, 5, 7))
    for program in (named, repeated):
        compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 2
    assert all(args[1].meta["val"].shape[1] == 2 for args in fuser.calls)


def test_no_transpose_is_made_where_undoing_the_models_own_will_do(fuser):
    fuser.run(laid_out, *qkv(), None)
    q, k, v = fuser.calls[0][:3]
    assert all(x.target is not aten.transpose.int or x.args[0].target is aten.reshape.default for x in (q, k, v))
    made = [n for n in fuser.graphs[0].graph.nodes if n.name in fuser.steps[0].made]
    assert len(made) == 1


def test_repeated_keys_used_elsewhere_are_passed_repeated_or_not_but_right(fuser):
    def program(q, k, v, m):
        k = repeat_kv(k, 2)
        return attend(q @ k.mT, repeat_kv(v, 2)), k.sum()

    inputs = (*qkv(kv_heads=2), None)
    compare(fuser.run(program, *inputs)[0], lambda *x: program(*x)[0], inputs)
    assert fuser.sites == 1


# Dynamic shapes

SYMBOLIC = [plain, div_after, scale_on_both, mask_after, two_masks, where_min, softmax_in_fp32, cast_around_softmax,
            row_maximum_subtracted, sdpa, sdpa_mask, sdpa_causal]  # fmt: skip


@pytest.mark.parametrize("form", SYMBOLIC, ids=lambda f: f.__name__)
def test_symbolic_sizes_are_not_specialised(fuser, form):
    torch._dynamo.reset()
    program = form

    def form(q, k, v, m):
        return program(q, k, v + 0 * k, m)  # says that k and v are equally long

    compiled = torch.compile(form, backend=fuser, fullgraph=True)
    for rows, keys in ((5, 7), (9, 3), (33, 20)):
        inputs = (*qkv(rows=rows, keys=keys), randn(2, 4, rows, keys))
        for i, tensor in enumerate(inputs):
            for dim in (0, 2, 3) if i == 3 else (0, 2):
                torch._dynamo.mark_dynamic(tensor, dim)
        with torch.no_grad():
            compare(compiled(*inputs), form, inputs)
    assert fuser.sites == 1, fuser.reasons
    assert len(fuser.graphs) == 1


class Layer(torch.nn.Module):
    """Projections, grouped heads and a scale that is a float attribute, which dynamic=True makes symbolic."""

    def __init__(self, folded):
        super().__init__()
        self.q, self.k, self.v = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.scale, self.folded = 0.3, folded

    def forward(self, x, mask):
        b, n, _ = x.shape
        q, k, v = (proj(x).view(b, n, -1, 8).transpose(1, 2) for proj in (self.q, self.k, self.v))
        k, v = repeat_kv(k, 2), repeat_kv(v, 2)
        if not self.folded:
            return attend(q @ k.transpose(2, 3) * self.scale + mask[:, :, :, : k.shape[-2]], v).transpose(1, 2)
        q, k, v = (y.reshape(b * 4, n, 8) for y in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, 4, n, n) * self.scale + mask
        return torch.bmm(torch.softmax(scores, -1).view(b * 4, n, n), v).view(b, 4, n, 8)


@pytest.mark.parametrize("folded", [False, True], ids=["4-D", "3-D"])
def test_symbolic_layer_with_a_symbolic_scale(fuser, folded):
    torch._dynamo.reset()
    layer = Layer(folded)
    compiled = torch.compile(layer, backend=fuser, dynamic=True, fullgraph=True)
    for batch, n, scale in ((2, 5, 0.3), (3, 9, 0.7), (4, 17, 0.1)):
        layer.scale = scale
        inputs = (randn(batch, n, 16), randn(batch, 1, n, n, seed=5))
        with torch.no_grad():
            compare(compiled(*inputs), layer, inputs)
    assert fuser.sites == 1, fuser.reasons
    assert len(fuser.graphs) == 1
    assert fuser.calls[0][1].meta["val"].shape[1] == 2


@pytest.mark.parametrize("example", [*FuseAttention().examples(), *RaiseSoftmax().examples()], ids=lambda e: e.name)
def test_examples_are_as_they_say(fuser, example):
    inputs = example.inputs()
    torch.testing.assert_close(fuser.run(example.program, *inputs), example.program(*inputs), rtol=1e-5, atol=1e-5)
    if example.name in [e.name for e in FuseAttention().examples()]:
        assert fuser.sites == example.sites
        assert (example.refused or "") in fuser.reasons
