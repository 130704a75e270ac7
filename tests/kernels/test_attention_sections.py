"""Heads are worked on in sections whose keys and values fit the L2 cache: any section gives the same."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels import _flash_parts, _triton
from fxopt.kernels._flash import flash_attention
from fxopt.kernels.attention import attention

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")


def operands_of(batch: int, heads: int, kv_heads: int, rows: int, keys: int, **more: torch.Tensor | None):
    q = torch.randn(batch, heads, rows, 16, device=DEVICE)
    k, v = (torch.randn(batch, kv_heads, keys, 16, device=DEVICE) for _ in "kv")
    return q, k, v


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("room", [0, 2, 3, 100])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_section_gives_the_same(monkeypatch, room, is_causal):
    q, k, v = operands_of(2, 6, 3, 150, 150)
    one = 150 * 32 * 4  # bytes of a head's keys and values
    monkeypatch.setattr(_triton, "l2_cache", lambda device: 2 * room * one)
    given = (None, 0.25, is_causal, "zero")
    torch.testing.assert_close(flash_attention(q, k, v, *given), attention.reference(q, k, v, *given))


@pytest.mark.parametrize("shape", [(1, 6, 150, 130), (1, 6, 1, 130)])
def test_batches_of_a_head_follow_each_other_where_they_share_its_mask(monkeypatch, shape):
    q, k, v = operands_of(3, 6, 2, 150, 130)
    monkeypatch.setattr(_triton, "l2_cache", lambda device: 2 * 2 * 130 * 32 * 4)
    mask = torch.randn(shape, device=DEVICE)
    given = _flash_parts.operands(q, k, v, mask, False, "nan", None, None, None, None, None)
    assert _flash_parts.batch_inner(given)
    assert _flash_parts.section(given) == 6
    result = flash_attention(q, k, v, mask, 0.25, False, "nan")
    torch.testing.assert_close(result, attention.reference(q, k, v, mask, 0.25, False, "nan"))


@pytest.mark.parametrize(("room", "one", "pairs", "expected"), [(10, 3, 8, 2), (10, 3, 7, 1), (0, 5, 4, 1),
                                                                (100, 1, 12, 12), (5, 0, 4, 4)])  # fmt: skip
def test_a_section_divides_the_heads(room, one, pairs, expected):
    assert _flash_parts._kv_heads_within(room, one, pairs) == expected
