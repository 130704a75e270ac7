"""Masks as people write them in plain PyTorch, and what reaches the op of each: bounds, numbers, or what is left."""

from __future__ import annotations

import math

import pytest
import torch

import attending
from attending import attend, compare, qkv
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax

N, HALF, BLOCK = 40, 20, 5
MIN = torch.finfo(torch.float32).min


def true(*shape):
    return torch.ones(shape, dtype=torch.bool)


def block_diffusion(i, j, m):
    """A noisy copy of the sequence before a clean one: blocks see themselves, and clean blocks before them."""
    noisy_i, noisy_j, block_i, block_j = i < HALF, j < HALF, i % HALF // BLOCK, j % HALF // BLOCK
    same = (noisy_i == noisy_j) & (block_i == block_j)
    return same | (~noisy_j & noisy_i & (block_i > block_j)) | (~noisy_i & ~noisy_j & (block_i >= block_j))


# mask of (i, j, m) -> (is_causal, first, last, shape of the mask); m is int64 [2, N], 0 where keys are padded
FORMS = {
    "documents in any order": (
        lambda i, j, m: (m + i.T % 5)[:, None, :, None] == (m + i.T % 5)[:, None, None, :],
        (False, False, False, (2, 1, N, N)),
    ),
    "documents by a column's numbers": (
        lambda i, j, m: m[:, None, :, None] == m[:, None, None, :],
        (False, True, True, (2, 1, N)),
    ),
    "prefix": (lambda i, j, m: (j <= i) | (j < 8), (False, False, True, None)),
    "a prefix a sequence": (
        lambda i, j, m: (j <= i) | (j < m.sum(-1)[:, None, None, None]),
        (False, False, True, None),
    ),
    "chunks": (lambda i, j, m: i // 8 == j // 8, (False, True, True, None)),
    "causal by blocks": (lambda i, j, m: i // 8 >= j // 8, (False, False, True, None)),
    "block diffusion": (block_diffusion, (False, False, False, (N, N))),
    "rows stacked": (lambda i, j, m: torch.stack([torch.arange(N) <= n for n in range(N)]), (True, False, False, None)),
    "flipped": (lambda i, j, m: true(N, N).triu().flip(0).flip(1), (True, False, False, None)),
    "new keys beside padded ones": (
        lambda i, j, m: torch.cat([true(2, 4), m[:, 4:] != 0], 1)[:, None, None, :] & (i >= 0),
        (False, False, False, (2, 1, 1, N)),
    ),
    "a prefix beside a triangle": (
        lambda i, j, m: torch.cat([true(N, 10), torch.cat([~true(10, 30), true(30, 30).tril()])], 1),
        (False, False, True, (1, 1, N, N)),
    ),
    "three dimensions": (
        lambda i, j, m: ((m != 0)[:, None, :] & true(N, 1))[:, None],
        (False, False, False, (2, 1, 1, N)),
    ),
    "three dimensions, causal": (
        lambda i, j, m: ((m != 0)[:, None, :].repeat(1, N, 1) & true(N, N).tril())[:, None],
        (False, False, True, (2, 1, 1, N)),
    ),
    "rows and keys of each length": (
        lambda i, j, m: (j < m.sum(-1)[:, None, None, None]) & (i < m.sum(-1)[:, None, None, None]),
        (False, False, True, (2, 1, N, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fill", [-math.inf, MIN])
def test_what_reaches_the_op(fuser, monkeypatch, form, fill):
    monkeypatch.setattr(attending, "FUSIONS", (RaiseSoftmax(), RaiseEinsum(), FuseAttention(bounds=True)))
    live, expected = FORMS[form]

    def program(q, k, v, m):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        mask = torch.zeros((), dtype=q.dtype).masked_fill(~live(i, j, m), fill)
        return attend(q @ k.mT * 0.3 + mask, v)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=fuser, fullgraph=True)
    for left in (11, 0, 23):
        m = torch.ones(2, N, dtype=torch.int64)
        m[1, :left] = 0
        arguments = (*qkv(rows=N, keys=N), m)
        with torch.no_grad():
            compare(compiled(*arguments), program, arguments)
    assert fuser.sites == 1, fuser.reasons
    args = (*fuser.calls[0], *[None] * 13)
    mask = None if args[3] is None else tuple(args[3].meta["val"].shape)
    assert (args[5], args[10] is not None, args[11] is not None, mask) == expected
