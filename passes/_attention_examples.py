"""Forms of attention that FuseAttention must find, one for each family, and some that it must refuse."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.rewrite.fusion import Example


def examples() -> Iterable[Example]:
    """One program for each family of forms, and what must be refused."""

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, 4, n, 8) for n in (5, 7, 7))

    def grouped() -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, h, 6, 8) for h in (4, 2, 2))

    yield Example(_spelled_out, inputs, name="spelled out")
    yield Example(_named, inputs, name="F.scaled_dot_product_attention")
    yield Example(_causal, grouped, name="grouped heads, causal")
    yield Example(_biased, lambda: (*inputs(), torch.randn(1, 4, 5, 7)), name="a bias added")
    yield Example(_capped, inputs, name="soft cap")
    yield Example(_sink, lambda: (*inputs(), torch.randn(4)), name="a sink")
    yield Example(_other_dim, inputs, sites=0, refused="not the last", name="softmax over the rows")
    yield Example(_with_weights, inputs, sites=0, refused="weights are returned", name="the weights are returned too")


def _spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v


def _named(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / 8**0.5).masked_fill(later, float("-inf"))
    return scores.float().softmax(-1).to(q.dtype) @ v


def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(bias + (q * 0.3) @ k.mT, -1) @ v


def _capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(5.0 * torch.tanh(q @ k.mT * 0.3 / 5.0), -1) @ v


def _sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    column = sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def _other_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -2) @ v


def _with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v, weights
