"""The forms of attention that PyTorch's own tests of fused attention are about, written anew, and what must not fuse.

Numbers are those of Inductor's patterns for the same algebra (torch._inductor.fx_passes.fuse_attention, torch 2.13). A
form takes q, k, v (and a mask); `heads_last` ones take them as [batch, length, heads, width] and permute them. Forms
with dropout run in inference, where it drops nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, S, D = 2, 4, 16, 32


@dataclass(frozen=True)
class Form:
    """One way to spell attention. `sites` is how many fused ones are right: 0 where it must stay as it is."""

    name: str
    pattern: str  # Inductor's number for it; "" where it has none
    program: Callable[..., Any]
    mask: str = ""  # "float" [B, 1, S, S], "keep" [B, S] of 0 and 1, "causal" [1, 1, S, S] bool, "wide" float32
    dtype: torch.dtype = torch.float32
    layout: str = "heads first"  # or "heads last", "flat" [B * H, S, D]
    sites: int = 1

    def inputs(self) -> tuple[Tensor, ...]:
        """Fresh random inputs."""
        shape = {"heads first": (B, H, S, D), "heads last": (B, S, H, D), "flat": (B * H, S, D)}[self.layout]
        q, k, v = (torch.randn(shape).to(self.dtype) for _ in range(3))
        masks: dict[str, Callable[[], Tensor]] = {
            "float": lambda: torch.randn(B, 1, S, S).to(self.dtype),
            "wide": lambda: torch.randn(B, 1, S, S),
            "keep": lambda: (torch.arange(S) < torch.tensor([[S], [S - 5]])).to(torch.int64),
            "causal": lambda: torch.ones(1, 1, S, S, dtype=torch.bool).tril(),
        }
        return (q, k, v, masks[self.mask]()) if self.mask else (q, k, v)


def _swap(*values: Tensor) -> list[Tensor]:
    return [value.permute(0, 2, 1, 3) for value in values]


def _drop(weights: Tensor) -> Tensor:
    return F.dropout(weights, 0.1, training=False)


def _fill(scores: Tensor, keep: Tensor) -> Tensor:
    dead = (keep == 0).view(keep.shape[0], 1, 1, -1).expand_as(scores)
    return scores.masked_fill(dead, torch.full((), -math.inf, dtype=scores.dtype))


def _half_weights(scores: Tensor, v: Tensor) -> Tensor:
    """The softmax in float32, its result rounded to half precision."""
    return scores.float().softmax(-1).to(torch.float16) @ v.to(torch.float16)


def _scaled_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    return _half_weights(q @ k.mT / 5.0, v)


def _scaled_early(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    return _half_weights((q / 5.0) @ k.mT, v)


def _bert(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    return ((q @ k.mT).div(5.0) + mask).softmax(-1) @ v


def _distilbert(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    return _fill((q @ k.mT).div(5.0), keep).softmax(-1) @ v


def _distilbert_early(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    return _drop(_fill(q.div(5.0) @ k.mT, keep).softmax(-1)) @ v


def _gpt2(q: Tensor, k: Tensor, v: Tensor, causal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _swap(q, k, v)
    scores = q @ k.transpose(-1, -2)
    scores = scores / torch.full([], 5.0, dtype=scores.dtype)
    least = torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return _drop(torch.where(causal, scores, least).softmax(-1)) @ v, k, v


def _gpt2_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    causal = torch.ones(S, S, dtype=torch.bool).tril()
    scores = (q @ k.mT) / torch.full([], 5.0, dtype=q.dtype)
    scores = torch.where(causal, scores, torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype)) + mask
    return _drop(scores.softmax(-1).type(v.dtype)) @ v


def _t5(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = _swap(q, k, v)
    scores = q @ k.transpose(3, 2)
    scores = scores + bias
    return scores.float().softmax(-1).type_as(q) @ v


def _t5_cached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _t5(q, k, v, bias)
    return out, k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)


def _t5_unbiased(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _swap(q, k, v)
    return _drop((q @ k.mT).float().softmax(-1).type_as(q)) @ v, k, v


def _mbart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    flat = [value.reshape(B * H, -1, D) for value in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(B, H, S, S) + mask
    weights = scores.view(B * H, S, S).softmax(-1)
    return torch.bmm(weights.to(q.dtype), flat[2]).view(B, H, S, D)


def _split_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = _swap(q, k, v)
    root = D**-0.25
    scores = (q * root) @ (k.mT * root)
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def _reused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT).div(5.0).softmax(-1)
    return weights @ v, weights


def _written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    q.mul_(2)
    return weights @ v


def _repeat(heads: Tensor) -> Tensor:
    """Every other head, twice, as transformers' repeat_kv does it."""
    return heads[:, ::2].unsqueeze(2).expand(B, H // 2, 2, S, D).reshape(B, H, S, D)


_contract = torch.einsum


FORMS = [
    Form("divided by the scale", "1", lambda q, k, v: (q @ k.mT).div(5.0).softmax(-1) @ v),
    Form("multiplied by the scale", "2", lambda q, k, v: (q @ k.mT).mul(0.4).softmax(-1) @ v),
    Form("divided, dropout", "3", lambda q, k, v: _drop((q @ k.mT).div(3.0).softmax(-1)) @ v),
    Form("multiplied, dropout", "4", lambda q, k, v: _drop((q @ k.mT).mul(0.4).softmax(-1)) @ v),
    Form("divided, mask", "5", lambda q, k, v, m: ((q @ k.mT / 5.0) + m).softmax(-1) @ v, "float"),
    Form("divided, mask, dropout", "6", lambda q, k, v, m: _drop(((q @ k.mT / 5.0) + m).softmax(-1)) @ v, "float"),
    Form("half weights, scaled late", "7, 8", _scaled_late, dtype=torch.float16, layout="heads last"),
    Form("half weights, scaled early", "9, 10", _scaled_early, dtype=torch.float16, layout="heads last"),
    Form(
        "heads last",
        "11, 12",
        lambda q, k, v: _drop((_swap(q)[0] @ _swap(k)[0].mT).div(5.0).softmax(-1)) @ _swap(v)[0],
        layout="heads last",
    ),
    Form("bmm, no scale", "13", lambda q, k, v: torch.bmm(q.bmm(k.transpose(1, 2)).softmax(-1), v), layout="flat"),
    Form("BERT", "14, 16", _bert, "float", layout="heads last"),
    Form("DistilBERT", "15, 17", _distilbert, "keep", layout="heads last"),
    Form("DistilBERT, scaled early", "20", _distilbert_early, "keep", layout="heads last"),
    Form("GPT-2, keys and values returned", "18", _gpt2, "causal", layout="heads last"),
    Form("GPT-2, padded", "19", _gpt2_padded, "float"),
    Form("T5", "21, 25", _t5, "float", layout="heads last"),
    Form("T5, bfloat16", "21, 25", _t5, "float", torch.bfloat16, "heads last"),
    Form("T5, keys and values returned", "22, 26", _t5_cached, "float", layout="heads last"),
    Form("T5 without a bias", "23, 27", _t5_unbiased, layout="heads last"),
    Form("MBart", "24", _mbart, "float"),
    Form("MBart, a wider mask", "24", _mbart, "wide", torch.bfloat16),
    Form(
        "multiplied, heads last",
        "28",
        lambda q, k, v: (_swap(q)[0] @ _swap(k)[0].mT).mul(0.4).softmax(-1) @ _swap(v)[0],
        layout="heads last",
    ),
    # Near them, and in none of the 30 (29 and 30 are what PyTorch makes of SDPA itself).
    Form("scale split, mask", "", _split_scale, "float", layout="heads last"),
    Form("scale split", "", _split_scale, layout="heads last"),
    Form("over channels (XCiT)", "", lambda q, k, v: (q.mT @ k).mul(0.4).softmax(-1) @ v.mT),
    Form("multiplied, mask", "", lambda q, k, v, m: (q @ k.mT * 0.4 + m).softmax(-1) @ v, "float"),
    Form("mask first", "", lambda q, k, v, m: (m + q @ k.mT / 5.0).softmax(-1) @ v, "float"),
    Form("q scaled, mask", "", lambda q, k, v, m: ((q * 0.4) @ k.mT + m).softmax(-1) @ v, "float"),
    Form("mask and bias", "", lambda q, k, v, m: (q @ k.mT + m + m.mT).softmax(-1) @ v, "float"),
    Form("soft cap", "", lambda q, k, v: (30 * torch.tanh(q @ k.mT * 0.4 / 30)).softmax(-1) @ v),
    Form(
        "grouped heads",
        "",
        lambda q, k, v: (
            (q @ k[:, ::2].repeat_interleave(2, 1).mT * 0.4).softmax(-1) @ v[:, ::2].repeat_interleave(2, 1)
        ),
    ),
    Form("grouped heads, expanded", "", lambda q, k, v: (q @ _repeat(k).mT * 0.4).softmax(-1) @ _repeat(v)),
    Form("einsum", "", lambda q, k, v: _contract("bhqk,bhkd->bhqd", _contract("bhqd,bhkd->bhqk", q, k).softmax(-1), v)),
    Form("exponentials spelled out", "", lambda q, k, v: _by_hand(q @ k.mT * 0.4) @ v),
    # What must stay as it is, or keep what it returns.
    Form("softmax over the queries", "", lambda q, k, v: (q @ k.mT / 5.0).softmax(-2) @ v, sites=0),
    Form("softmax over the batch", "", lambda q, k, v: (q @ k.mT / 5.0).softmax(0) @ v, sites=0),
    Form("weights returned too", "", _reused, sites=0),
    Form("a query written to in between", "", _written, sites=0),
    Form("weights squared", "", lambda q, k, v: (q @ k.mT).softmax(-1).square() @ v, sites=0),
    Form("a sum of weights", "", lambda q, k, v: ((q @ k.mT).softmax(-1) + 1.0) @ v, sites=0),
]


def _by_hand(scores: Tensor) -> Tensor:
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)
