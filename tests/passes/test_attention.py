"""Attention is found in every spelling, computes what eager computes, and what is not attention is refused in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.graph.canonical import canonicalise
from fxopt.graph.retrace import retrace
from fxopt.match.miss import NearMiss
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.verify import Verifier

aten = torch.ops.aten
FUSIONS = (RaiseSoftmax(), RaiseEinsum(), FuseAttention())


@dataclass
class Fuser:
    """A backend that fuses attention, runs what is left eagerly, and keeps what happened."""

    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    steps: list = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)

    def __call__(self, module, inputs):
        normal = retrace(module, inputs)
        canonicalise(normal)
        outcome = run_fusions(normal, FUSIONS, Verifier("numeric"))
        normal.recompile()
        self.graphs.append(normal)
        self.steps += [s for s in outcome.steps if s.fusion == "attention"]
        self.misses += [m for m in outcome.misses if m.fusion == "attention"]
        return normal

    def run(self, program, *inputs, dynamic=False):
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(program, backend=self, dynamic=dynamic, fullgraph=True)(*inputs)

    @property
    def sites(self):
        assert all(s.applied for s in self.steps), [s.verdict for s in self.steps]
        return len(self.steps)

    @property
    def calls(self):
        """The arguments of the fused calls."""
        nodes = [n for g in self.graphs for n in g.graph.nodes]
        return [n.args for n in nodes if "fxopt.attention" in str(n.target)]

    @property
    def reasons(self):
        return " | ".join(m.reason for m in self.misses)


@pytest.fixture
def fuser():
    return Fuser()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(dtype=torch.float32, heads=4, kv_heads=None, rows=5, keys=7, width=8, value_width=None):
    kv_heads = kv_heads or heads
    return (
        randn(2, heads, rows, width, dtype=dtype, seed=1),
        randn(2, kv_heads, keys, width, dtype=dtype, seed=2),
        randn(2, kv_heads, keys, value_width or width, dtype=dtype, seed=3),
    )


def padding(dtype=torch.float32, rows=5, keys=7, fill=None):
    """[2, 1, rows, keys]: the second sample's last keys are padding, and one of its rows is all masked."""
    keep = torch.ones(2, 1, rows, keys, dtype=torch.bool)
    keep[1, :, :, 4:] = False
    keep[1, :, 2] = False
    if fill is None:
        return keep
    return torch.zeros(2, 1, rows, keys, dtype=dtype).masked_fill(~keep, fill)


def causal(rows, keys):
    return torch.ones(rows, keys, dtype=torch.bool).tril()


def repeat_kv(x, g):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, g, n, d).reshape(b, h * g, n, d)


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


# Each form takes (q, k, v, bias [2, 4, 5, 7]); the table is the list of spellings that must be found.
def plain(q, k, v, m):
    return attend(q @ k.transpose(-1, -2), v)


def mul_after(q, k, v, m):
    return attend(q @ k.transpose(-1, -2) * 0.3, v)


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


def mask_after(q, k, v, m):
    return attend(q @ k.mT * 0.3 + m, v)


def mask_before(q, k, v, m):
    return attend(m + q @ k.mT * 0.3, v)


def mask_subtracted(q, k, v, m):
    return attend(q @ k.mT * 0.3 - m, v)


def mask_with_alpha(q, k, v, m):
    return attend(torch.add(q @ k.mT, m, alpha=0.5), v)


def two_masks(q, k, v, m):
    return attend(q @ k.mT + m + m[:1, :1], v)


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
    shared_keys, one_kv_head, row_maximum_subtracted, stabilised_twice,
    mask_expanded_as_scores, bias_shaped_as_scores, bias_split_over_keys, handwritten_softmax, laid_out, sdpa,
    sdpa_mask, sdpa_bool, sdpa_causal, sdpa_three_dims,
]  # fmt: skip


def compare(actual, program, inputs):
    """float32: 1e-5 of eager. Narrower: no farther from float64 than twice eager's own distance, and an ulp."""
    expected = program(*inputs)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        return
    exact = program(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
    own = (expected.double() - exact).abs().max() + torch.finfo(expected.dtype).eps * exact.abs().max()
    assert (actual.double() - exact).abs().max() <= 2 * own


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_form_in_float32(fuser, form):
    inputs = (*qkv(), randn(2, 4, 5, 7, seed=4))
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 1, fuser.reasons
    compare(actual, form, inputs)


HALF = [plain, mul_after, scale_on_both, tensor_scale, mask_after, two_masks, where_inf, where_min, filled_all,
        softmax_in_fp32, cast_around_softmax, scores_in_fp32, three_dims_mask_round_trip, sdpa_mask]  # fmt: skip


@pytest.mark.parametrize("form", HALF, ids=lambda f: f.__name__)
def test_form_in_bfloat16(fuser, form):
    inputs = (*qkv(torch.bfloat16), randn(2, 4, 5, 7, dtype=torch.bfloat16, seed=4))
    if form is where_inf or form is where_min:
        inputs = (*inputs[:3], inputs[3].abs() - (inputs[3] < -1.5).to(torch.bfloat16) * 9)
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 1, fuser.reasons
    compare(actual, form, inputs)


@pytest.mark.parametrize("form", [mask_after, two_masks])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_rows_without_a_live_key_are_as_in_eager(fuser, form, fill):
    inputs = (*qkv(), padding(fill=fill).expand(2, 4, 5, 7))
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 1
    compare(actual, form, inputs)


def test_boolean_masks_leave_empty_rows_nan_when_spelled_out_and_zero_in_sdpa(fuser):
    def spelled_out(q, k, v, m):
        return attend(torch.where(m, q @ k.mT, -math.inf), v)

    def named(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m)

    inputs = (*qkv(), padding())
    for program, empty in ((spelled_out, math.nan), (named, 0.0)):
        actual = fuser.run(program, *inputs)
        compare(actual, program, inputs)
        torch.testing.assert_close(actual[1, :, 2], torch.full((4, 8), empty), equal_nan=True)
    assert [args[6] for args in fuser.calls] == ["nan", "zero"]
    assert all(args[3].meta["val"].dtype == torch.bool for args in fuser.calls)


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


# Causality


def causal_of(rows, keys, how):
    if how == "tril":
        return torch.ones(rows, keys, dtype=torch.bool).tril()
    if how == "arange":
        return torch.arange(rows)[:, None] >= torch.arange(keys)[None, :]
    return torch.full((rows, keys), -math.inf).triu(1) == 0


@pytest.mark.parametrize("how", ["tril", "arange", "triu"])
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
def test_a_constant_lower_triangle_is_causal(fuser, how, fill):
    def program(q, k, v, m):
        return attend(torch.where(causal_of(5, 7, how), q @ k.mT, fill), v)

    inputs = (*qkv(), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert [(args[3], args[5]) for args in fuser.calls] == [(None, True)]


def test_an_additive_triangle_beside_a_padding_mask(fuser):
    def program(q, k, v, m):
        triangle = torch.full((5, 7), -math.inf).triu(1)
        return attend(q @ k.mT + triangle + m, v)

    inputs = (*qkv(), randn(2, 1, 5, 7))
    compare(fuser.run(program, *inputs), program, inputs)
    (args,) = fuser.calls
    assert args[5] is True
    assert list(args[3].meta["val"].shape) == [2, 1, 5, 7]


NOT_CAUSAL = {
    "upper": lambda: torch.ones(5, 7, dtype=torch.bool).triu(),
    "shifted": lambda: torch.ones(5, 7, dtype=torch.bool).tril(1),
    "window": lambda: torch.ones(5, 7, dtype=torch.bool).tril().triu(-2),
}


@pytest.mark.parametrize("mask", NOT_CAUSAL.values(), ids=NOT_CAUSAL.keys())
def test_other_constant_masks_stay_masks(fuser, mask):
    def program(q, k, v, m):
        return attend(torch.where(mask(), q @ k.mT, -math.inf), v)

    inputs = (*qkv(), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert [args[5] for args in fuser.calls] == [False]


def test_a_mask_that_is_an_input_is_never_taken_for_causal(fuser):
    inputs = (*qkv(), torch.zeros(5, 7).masked_fill(~causal(5, 7), -math.inf))
    compiled = torch.compile(mask_after, backend=fuser, fullgraph=True)
    for mask in (inputs[3], inputs[3].flip(0)):
        compare(compiled(*inputs[:3], mask), mask_after, (*inputs[:3], mask))
    assert [args[5] for args in fuser.calls] == [False]


def test_a_finite_triangle_beside_another_mask_stays_a_mask(fuser):
    def program(q, k, v, m):
        least = torch.finfo(torch.float32).min
        return attend(q @ k.mT + torch.full((5, 7), least).triu(1) + m, v)

    inputs = (*qkv(), padding(fill=torch.finfo(torch.float32).min))
    compare(fuser.run(program, *inputs), program, inputs)
    assert [args[5] for args in fuser.calls] == [False]


# Refusals, each with its reason


def softmax_over_heads(q, k, v, m):
    return torch.softmax(q @ k.mT, 1) @ v


def softmax_over_batch(q, k, v, m):
    return torch.softmax(q @ k.mT, 0) @ v


def softmax_over_rows(q, k, v, m):
    return torch.softmax(q @ k.mT, -2) @ v


def scores_transposed(q, k, v, m):
    return torch.softmax((q @ k.mT)[:, :, :5, :5].contiguous().mT, -1) @ v[:, :, :5]


def weights_transposed(q, k, v, m):
    return torch.softmax(q @ k.mT, -1).mT @ q


def heads_moved(q, k, v, m):
    return torch.softmax(q @ k.mT, -1).transpose(0, 1).reshape(2, 4, 5, 7) @ v


def soft_cap(q, k, v, m):
    return attend(torch.tanh(q @ k.mT / 50.0) * 50.0, v)


def sinks(q, k, v, m):
    scores = torch.cat([q @ k.mT, m[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def scale_per_head(q, k, v, m):
    return attend(q @ k.mT * m[:, :, :1, :1], v)


def clamped(q, k, v, m):
    return attend((q @ k.mT).clamp(min=-3.0), v)


def small_fill(q, k, v, m):
    return attend(torch.where(m > 0, q @ k.mT, -5.0), v)


def fill_changed_afterwards(q, k, v, m):
    return attend(torch.where(m > 0, q @ k.mT, -1e5) / 1e4, v)


def active_dropout(q, k, v, m):
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=True) @ v


def active_dropout_in_sdpa(q, k, v, m):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def weights_returned(q, k, v, m):
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights


def scores_returned(q, k, v, m):
    scores = q @ k.mT
    return attend(scores, v), scores


def weights_on_the_right(q, k, v, m):
    return v.mT @ torch.softmax(k @ q.mT, -1)


def weights_masked_afterwards(q, k, v, m):
    return torch.softmax(q @ k.mT, -1).masked_fill(m > 0, 0.0) @ v


def global_maximum_subtracted(q, k, v, m):
    scores = q @ k.mT
    return attend(scores - scores.max(), v)


def scores_squared(q, k, v, m):
    scores = q @ k.mT
    return attend(scores * scores, v)


def unknown_fill(q, k, v, m):
    return attend(torch.where(m > 0, q @ k.mT, m[0, 0, 0, 0]), v)


REFUSED = {
    softmax_over_heads: "over dimension 1 of 4, not the last",
    softmax_over_batch: "over dimension 0 of 4, not the last",
    softmax_over_rows: "over dimension 2 of 4, not the last",
    scores_transposed: "",
    weights_transposed: "not over the keys",
    heads_moved: "rows or heads are moved",
    soft_cap: "soft-capped",
    sinks: "concatenated to the scores",
    scale_per_head: "scaled by the tensor",
    clamped: "clamped",
    small_fill: "leaves them weight",
    fill_changed_afterwards: "then changed further",
    active_dropout: "dropout is active",
    active_dropout_in_sdpa: "dropout is active",
    weights_returned: "also used by output",
    scores_returned: "also used by output",
    weights_on_the_right: "not the left operand",
    weights_masked_afterwards: "applied to the attention weights",
    global_maximum_subtracted: "in more than one way",
    scores_squared: "2 times",
    unknown_fill: "value is not known",
}


@pytest.mark.parametrize("form", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_its_reason(fuser, form):
    inputs = (*qkv(), randn(2, 4, 5, 7, seed=4))
    actual = fuser.run(form, *inputs)
    assert fuser.sites == 0
    assert REFUSED[form] in fuser.reasons
    if "dropout" not in form.__name__:
        torch.testing.assert_close(actual, form(*inputs))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 0, 3, 2), (0, 3, 1, 2)])
def test_keys_permuted_otherwise_give_the_right_numbers(fuser, order):
    """How k was transposed is not matched, so a wrong order can't be mistaken for the usual one."""

    def program(q, k, v, m):
        return attend(q @ k.permute(order), v)

    q = randn(4, 4, 4, 4, seed=1)
    inputs = (q, randn(4, 4, 4, 4, seed=2), randn(4, 4, 4, 4, seed=3), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1


def test_a_router_is_not_attention(fuser):
    def router(q, k, v, m):
        return torch.softmax(F.linear(q, k[0, 0]), -1).topk(2).values

    fuser.run(router, *qkv(), None)
    assert (fuser.sites, fuser.reasons) == (0, "")


def test_a_mask_may_be_used_elsewhere(fuser):
    def program(q, k, v, m):
        mask = (m > 0).float() * -1e9
        return mul_after(q, k, v, m) + attend(q @ k.mT + mask, v), mask

    inputs = (*qkv(), randn(2, 1, 5, 7))
    actual, _ = fuser.run(program, *inputs)
    compare(actual, lambda *x: program(*x)[0], inputs)
    assert fuser.sites == 2


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
