"""Masks mean what they meant: rows without a live key, boolean masks, and causality that is proven."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from attending import attend, causal, compare, mask_after, mul_after, padding, qkv, randn, two_masks


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


def test_a_mask_may_be_used_elsewhere(fuser):
    def program(q, k, v, m):
        mask = (m > 0).float() * -1e9
        return mul_after(q, k, v, m) + attend(q @ k.mT + mask, v), mask

    inputs = (*qkv(), randn(2, 1, 5, 7))
    actual, _ = fuser.run(program, *inputs)
    compare(actual, lambda *x: program(*x)[0], inputs)
    assert fuser.sites == 2


def test_a_constant_mask_that_is_written_to_keeps_its_value(fuser):
    def program(q, k, v, m):
        mask = torch.full((5, 7), -1e4)
        mask[:, :3] = 0.0
        return attend(q @ k.mT + mask, v)

    inputs = (*qkv(), None)
    compare(fuser.run(program, *inputs), program, inputs)
    assert fuser.sites == 1


def test_a_mask_written_to_after_it_was_added_is_refused(fuser):
    def program(q, k, v, m):
        mask = m.clone()
        scores = q @ k.mT + mask
        mask[0] = 9.0
        return attend(scores, v), mask

    inputs = (*qkv(), randn(2, 4, 5, 7))
    actual, _ = fuser.run(program, *inputs)
    compare(actual, lambda *x: program(*x)[0], inputs)
    assert fuser.sites == 0
    assert "writes to" in fuser.reasons
