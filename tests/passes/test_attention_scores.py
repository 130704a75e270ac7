"""Attention whose scores are capped, multiplied, given sinks or mixed, and whose weights are changed afterwards."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

_spec = importlib.util.spec_from_file_location("fxopt_test_attending", Path(__file__).with_name("_attending.py"))
_shared = importlib.util.module_from_spec(_spec)
sys.modules["fxopt_test_attending"] = _shared
_spec.loader.exec_module(_shared)
fuser = _shared.fuser
randn = _shared.randn
qkv = _shared.qkv
attend = _shared.attend
repeat_kv = _shared.repeat_kv
compare = _shared.compare


# Each takes (q, k, v, m [2, 4, 5, 7]); heads 4, rows 5, keys 7, width 8.


def soft_cap(q, k, v, m):
    """Gemma 2."""
    return attend(torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0 + m.masked_fill(m > 1, -1e30), v)


def soft_cap_scaled(q, k, v, m):
    """Any numbers inside and outside: a tanh(b s)."""
    return attend(3.0 * torch.tanh((q * 0.5) @ k.mT / 2.0) / 1.5, v)


def soft_cap_filled(q, k, v, m):
    return attend((torch.tanh(q @ k.mT / 5.0) * 5.0).masked_fill(m > 1, -torch.inf), v)


def sink(q, k, v, m):
    """GPT-OSS."""
    s = torch.cat([q @ k.mT * 0.3 + m, v[:1, :, :1, :1].expand(2, -1, 5, -1)], -1)
    return torch.softmax(s - s.max(-1, keepdim=True).values, -1, dtype=s.dtype)[..., :-1] @ v


def sink_first(q, k, v, m):
    s = torch.cat([m[:, :, :, :1], q @ k.mT], 3)
    return torch.softmax(s, -1)[..., 1:] @ v


def sinks_of_several_columns(q, k, v, m):
    return torch.softmax(torch.cat([q @ k.mT, m[..., :3]], -1), -1)[..., :-3] @ v


def sink_and_empty_rows(q, k, v, m):
    s = (q @ k.mT).masked_fill(m[:, :1, :, :1] > 0, -torch.inf)
    return torch.softmax(torch.cat([s, m[..., :1]], -1), -1)[..., :-1] @ v


def sink_beside_causal(q, k, v, m):
    s = (q @ k.mT).masked_fill(torch.ones(5, 7).triu(1).bool(), -torch.inf)
    return torch.softmax(torch.cat([s, m[..., :1]], -1), -1)[..., :-1] @ v


def scale_per_head(q, k, v, m):
    """SwinV2, XCiT."""
    return attend(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * (1 + v[0, :, :1, :1].abs()) + m[:1], v)


def scale_per_row(q, k, v, m):
    return attend(q @ k.mT * m[:, :, :, :1], v)


def scale_per_key(q, k, v, m):
    return attend(q @ k.mT / (m[:, :, :1].abs() + 1), v)


def divided_per_head(q, k, v, m):
    return attend((q @ k.mT + m) / (1 + m[:, :, :1, :1].abs()), v)


def multiplied(q, k, v, m):
    return attend(q @ k.mT * 0.3 * m, v)


def mask_of_zeros_and_ones(q, k, v, m):
    """GPT-1."""
    b = torch.ones(5, 7).tril()
    return attend(q @ k.mT * 0.3 * b + -1e4 * (1 - b) + m[:, :1], v)


def multiplied_and_capped(q, k, v, m):
    return attend(4.0 * torch.tanh(q @ k.mT * m / 4.0), v)


def head_mask(q, k, v, m):
    """BERT."""
    return (torch.softmax(q @ k.mT, -1) * m[0, :, :1, :1]) @ v


def gated_mixture(q, k, v, m):
    """ConViT: two softmaxes, mixed head by head and normalised anew."""
    gate = torch.sigmoid(m[:1, :, :1, :1])
    p = (1.0 - gate) * torch.softmax(q @ k.mT * 0.3, -1) + gate * m.exp().log_softmax(-1).exp()
    p = p / p.sum(-1).unsqueeze(-1)
    return F.dropout(p, 0.1, training=False) @ v


def bias_on_the_weights(q, k, v, m):
    return (torch.softmax(q @ k.mT, -1) + m) @ v


def difference_of_weights(q, k, v, m):
    """Differential attention: both softmaxes are attention."""
    other = torch.softmax(k.new_ones(2, 4, 5, 8) @ k.mT * 0.3, -1)
    return (torch.softmax(q @ k.mT, -1) - 0.7 * other) @ v


def nan_to_num(q, k, v, m):
    return torch.nan_to_num(torch.softmax((q @ k.mT).masked_fill(m[..., :1] > 0, -torch.inf), -1)) @ v


def nan_filled(q, k, v, m):
    p = torch.softmax(torch.where(m[..., :1] > 0, q @ k.mT, -torch.inf), -1)
    return p.masked_fill(p.isnan(), 0.0) @ v


def dead_rows_blanked(q, k, v, m):
    dead = m[..., :1] > 0
    p = torch.softmax((q @ k.mT).masked_fill(dead, -torch.inf), -1)
    return torch.where(dead, 0.0, p) @ v


def weights_masked_as_the_scores(q, k, v, m):
    """CPM-Ant: what was filled with -inf is set to 0 afterwards, so rows without a live key are 0."""
    p = torch.softmax((q @ k.mT + m).masked_fill((m[:, :1, :, :1] > 0).expand(2, 1, 5, 7) | (m > 0), -torch.inf), -1)
    return p.masked_fill((m[:, :1, :, :1] > 0).expand(2, 1, 5, 7) | (m > 0), 0.0) @ v


def scores_from_a_linear_layer(q, k, v, m):
    """VOLO's outlook attention: no q and k."""
    return torch.softmax(F.linear(q, k[0, 0]) * 0.3 + m, -1) @ v


def two_products_as_large(q, k, v, m):
    """SpeechT5: the nearest product is a relative position term."""
    term = (q.transpose(1, 2) @ m[0, 0, :, :, None].expand(5, 7, 8).mT).transpose(1, 2)
    return attend(q @ k.mT + term, v)


def talking_heads(q, k, v, m):
    """CaiT: the heads are mixed before and after the softmax."""
    w = m[0, 0, :4, :4]
    s = F.linear((q @ k.mT * 0.3).permute(0, 2, 3, 1), w, m[0, 1, 0, :4]).permute(0, 3, 1, 2)
    return F.linear(torch.softmax(s, -1).permute(0, 2, 3, 1), w.T, m[0, 2, 0, :4]).permute(0, 3, 1, 2) @ v


def heads_mixed_before(q, k, v, m):
    s = F.linear((q @ k.mT * 0.3).permute(0, 2, 3, 1), m[0, 0, :4, :4]).permute(0, 3, 1, 2)
    return attend(s + m, v)


def heads_mixed_after(q, k, v, m):
    p = F.linear(attend(q @ k.mT, torch.eye(7)).permute(0, 2, 3, 1), m[0, 0, :4, :4]).permute(0, 3, 1, 2)
    return p @ v


def weights_mixed_after(q, k, v, m):
    return F.linear(torch.softmax(q @ k.mT, -1).permute(0, 2, 3, 1), m[0, 0, :4, :4]).permute(0, 3, 1, 2) @ v


FORMS = [
    soft_cap, soft_cap_scaled, soft_cap_filled, sink, sink_first, sinks_of_several_columns, sink_and_empty_rows,
    sink_beside_causal, scale_per_head, scale_per_row, scale_per_key, divided_per_head, multiplied,
    mask_of_zeros_and_ones, multiplied_and_capped, head_mask, gated_mixture, bias_on_the_weights, difference_of_weights,
    nan_to_num, nan_filled, dead_rows_blanked, weights_masked_as_the_scores, scores_from_a_linear_layer,
    two_products_as_large, talking_heads, heads_mixed_before, heads_mixed_after, weights_mixed_after,
]  # fmt: skip
SITES = {difference_of_weights: 2}


def inputs_of(form, dtype=torch.float32):
    inputs = (*qkv(dtype), randn(2, 4, 5, 7, dtype=dtype, seed=4))
    if form is scores_from_a_linear_layer:
        return (randn(2, 4, 5, 8, dtype=dtype, seed=1), *inputs[1:])
    return inputs


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_form_in_float32(fuser, form):
    inputs = inputs_of(form)
    actual = fuser.run(form, *inputs)
    assert fuser.sites == SITES.get(form, 1), fuser.reasons
    compare(actual, form, inputs)
