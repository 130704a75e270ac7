"""What is not attention is refused in words, and what looks like it by mistake is not mistaken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attending import attend, compare, qkv, randn

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


def soft_cap_after_the_mask(q, k, v, m):
    return attend(torch.tanh((q @ k.mT + m) / 5.0) * 5.0, v)


def soft_cap_shifted(q, k, v, m):
    return attend(torch.tanh((q @ k.mT + 1.0) / 5.0) * 5.0, v)


def soft_cap_after_the_row_maximum(q, k, v, m):
    scores = q @ k.mT
    return attend(torch.tanh((scores - scores.amax(-1, keepdim=True)) / 5.0) * 5.0, v)


def soft_cap_per_head(q, k, v, m):
    return attend(torch.tanh(q @ k.mT) * m[:, :, :1, :1], v)


def multiplied_after_the_row_maximum(q, k, v, m):
    scores = q @ k.mT
    return attend((scores - scores.amax(-1, keepdim=True)) * m, v)


def sink_that_is_kept(q, k, v, m):
    return torch.softmax(torch.cat([q @ k.mT, m[..., :1]], -1), -1) @ torch.cat([v, v[:, :, :1]], 2)


def key_dropped_in_place_of_the_sink(q, k, v, m):
    return torch.softmax(torch.cat([q @ k.mT, m[..., :1]], -1), -1)[..., 1:] @ v


def sink_beside_shifted_scores(q, k, v, m):
    scores = q @ k.mT
    scores = torch.cat([scores - scores.amax(-1, keepdim=True), m[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def masked_after_the_sink(q, k, v, m):
    scores = torch.cat([q @ k.mT, m[..., :1]], -1) + torch.cat([m, m[..., :1]], -1)
    return torch.softmax(scores, -1)[..., :-1] @ v


def columns_on_both_sides(q, k, v, m):
    return torch.softmax(torch.cat([m[..., :1], q @ k.mT, m[..., :1]], -1), -1)[..., 1:-1] @ v


def weights_scaled_key_by_key(q, k, v, m):
    return (torch.softmax(q @ k.mT, -1) * m) @ v


def weights_divided_by_the_sum_of_others(q, k, v, m):
    weights = torch.softmax(q @ k.mT, -1)
    return (weights / weights.sum(-2, keepdim=True)) @ v


def weights_blanked_elsewhere(q, k, v, m):
    weights = torch.softmax((q @ k.mT).masked_fill(m > 1, -torch.inf), -1)
    return weights.masked_fill(m > 0, 0.0) @ v


def heads_mixed_too_wide(q, k, v, m):
    q, k, v = (x.repeat(1, 1, 1, 9) for x in (q, k, v))
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), m[0, 0, :4, :4]).permute(0, 3, 1, 2)
    return attend(scores, v)


def rows_mixed(q, k, v, m):
    scores = F.linear((q @ k.mT).permute(0, 1, 3, 2), m[0, 0, :, :5]).permute(0, 1, 3, 2)
    return attend(scores, v)


def heads_mixed_after_a_mask(q, k, v, m):
    scores = F.linear((q @ k.mT + m).permute(0, 2, 3, 1), m[0, 0, :4, :4]).permute(0, 3, 1, 2)
    return attend(scores, v)


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


def weights_blanked_beside_another_mask(q, k, v, m):
    """A row whose kept keys the first mask rules out is blank altogether, although not every key of it is masked."""
    gone = m > 1
    scores = (q @ k.mT + m.masked_fill(m < 0, -torch.inf)).masked_fill(gone, torch.finfo(torch.float32).min)
    return torch.softmax(scores, -1).masked_fill(gone, 0.0) @ v


def weights_divided_and_rounded(q, k, v, m):
    return torch.div(torch.softmax(q @ k.mT, -1), 0.1, rounding_mode="floor") @ v


def scores_divided_and_rounded(q, k, v, m):
    return attend(torch.div(q @ k.mT, 0.1, rounding_mode="trunc"), v)


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
    soft_cap_after_the_mask: "capped after they were masked",
    soft_cap_shifted: "added to whole rows before the scores are capped",
    soft_cap_after_the_row_maximum: "added to whole rows before the scores are capped",
    soft_cap_per_head: "capped scores are multiplied by the tensor",
    multiplied_after_the_row_maximum: "before they are multiplied key by key",
    sink_that_is_kept: "they are keys, not a sink",
    key_dropped_in_place_of_the_sink: "other weights than those of the extra columns",
    sink_beside_shifted_scores: "before a sink is put beside them",
    masked_after_the_sink: "changed after extra columns",
    columns_on_both_sides: "columns are concatenated to the scores on both sides",
    weights_scaled_key_by_key: "multiplied key by key",
    weights_divided_by_the_sum_of_others: "in more than one way",
    weights_blanked_beside_another_mask: "filled with a finite number beside another mask",
    weights_divided_and_rounded: "aten.div.Tensor_mode is applied to the attention weights",
    scores_divided_and_rounded: "the scores go through div",
    weights_blanked_elsewhere: "at other positions than were masked",
    heads_mixed_too_wide: "side by side they are wider",
    rows_mixed: "go through a linear layer",
    heads_mixed_after_a_mask: "heads are mixed after the scores were masked",
    clamped: "clamped",
    small_fill: "leaves them weight",
    fill_changed_afterwards: "then changed further",
    active_dropout: "dropout is active",
    active_dropout_in_sdpa: "dropout is active",
    weights_returned: "weights are returned",
    scores_returned: "is returned",
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
