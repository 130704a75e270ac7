"""Attention whose scores are capped, multiplied, given sinks or mixed, and whose weights are changed afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fxopt
from attending import attend, compare, qkv, randn

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
    b = torch.ones(5, 7, dtype=q.dtype).tril()
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


def softmax_over_the_rows(q, k, v, m):
    """k comes first, and the weights are turned round after the softmax."""
    return torch.softmax(k @ q.mT * 0.3 + m.mT, -2).mT @ v


def softmax_of_keys_alone(q, k, v, m):
    """CoaT, linear attention: a softmax over positions, its result turned and multiplied by v."""
    return torch.softmax(F.linear(k, q[0, 0]), -2).mT @ v


FORMS = [
    softmax_over_the_rows, softmax_of_keys_alone,
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


HALF = [soft_cap, soft_cap_scaled, sink, sink_first, scale_per_head, divided_per_head, mask_of_zeros_and_ones,
        head_mask, gated_mixture, scores_from_a_linear_layer, talking_heads]  # fmt: skip


# soft_cap's mask of -1e30 does not fit into float16.
@pytest.mark.parametrize(
    "form, dtype",
    [(form, dtype) for form in HALF for dtype in (torch.bfloat16, torch.float16)[: 1 if form is soft_cap else 2]],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_form_in_half_precision(fuser, form, dtype):
    inputs = inputs_of(form, dtype)
    actual = fuser.run(form, *inputs)
    assert fuser.sites == SITES.get(form, 1), fuser.reasons
    compare(actual, form, inputs)


SYMBOLIC = [soft_cap, sink_first, scale_per_head, scale_per_row, scale_per_key, multiplied, head_mask, gated_mixture,
            nan_filled, dead_rows_blanked, scores_from_a_linear_layer, talking_heads]  # fmt: skip


@pytest.mark.parametrize("form", SYMBOLIC, ids=lambda f: f.__name__)
def test_symbolic_sizes_are_not_specialised(fuser, form):
    torch._dynamo.reset()

    def program(q, k, v, m, w):
        if form is talking_heads:
            return talk(q, k, v, w)
        return form(q, k, v + 0 * k, m)  # says that k and v are equally long

    compiled = torch.compile(program, backend=fuser, fullgraph=True)
    for rows, keys in ((5, 7), (9, 4), (33, 20)):
        m = randn(2, 4, rows, keys, seed=4)
        q, k, v = qkv(rows=rows, keys=keys)
        if form is scores_from_a_linear_layer:
            k, v, m = (t.contiguous() for t in (k[:, :, :3], v[:, :, :3], m[..., :3]))
        inputs = (q, k, v, m, randn(4, 4, seed=5))
        for i, tensor in enumerate(inputs[:4]):
            sizes = () if form is scores_from_a_linear_layer and i > 0 else (2, 3) if i == 3 else (2,)
            for dim in sizes:
                torch._dynamo.mark_dynamic(tensor, dim)
        if form is scores_from_a_linear_layer:
            torch._dynamo.mark_dynamic(m, 2)
        with torch.no_grad():
            compare(compiled(*inputs), program, inputs)
    assert fuser.sites == 1, fuser.reasons
    assert len(fuser.graphs) == 1


def talk(q, k, v, w):
    s = F.linear((q @ k.mT * 0.3).permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)
    return F.linear(torch.softmax(s, -1).permute(0, 2, 3, 1), w.T).permute(0, 3, 1, 2) @ v


class Capped(torch.nn.Module):
    """A soft cap that is a float attribute: symbolic under dynamic=True."""

    cap, scale = 5.0, 0.3

    def forward(self, q, k, v, m):
        return attend(torch.tanh(q @ k.mT * self.scale / self.cap) * self.cap + m, v)


def test_a_symbolic_soft_cap(fuser):
    torch._dynamo.reset()
    module = Capped()
    compiled = torch.compile(module, backend=fuser, dynamic=True, fullgraph=True)
    for module.cap, module.scale, rows in ((5.0, 0.3, 5), (2.5, 0.7, 9)):
        inputs = (*qkv(rows=rows), randn(2, 4, rows, 7, seed=4))
        with torch.no_grad():
            compare(compiled(*inputs), module, inputs)
    assert fuser.sites == 1, fuser.reasons


TRAINED = [softmax_over_the_rows, softmax_of_keys_alone,
           soft_cap, soft_cap_scaled, soft_cap_filled, sink, sink_first, sinks_of_several_columns, sink_beside_causal,
           scale_per_head, scale_per_row, scale_per_key, divided_per_head, multiplied, mask_of_zeros_and_ones,
           multiplied_and_capped, head_mask, gated_mixture, bias_on_the_weights, difference_of_weights,
           scores_from_a_linear_layer, two_products_as_large, talking_heads]  # fmt: skip


@pytest.mark.parametrize("form", TRAINED, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("without_inductor")
def test_gradients(form, monkeypatch, tmp_path):
    """Results and gradients are no farther from float64 than twice eager's, and an ulp or two of the largest."""
    inputs = inputs_of(form)

    def gradients(program, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = program(*leaves)
        found = torch.autograd.grad(out, leaves, randn(*out.shape, seed=9).to(dtype), allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    torch._dynamo.reset()
    with fxopt.record() as rec:
        ours = gradients(torch.compile(form, backend="fxopt", fullgraph=True), torch.float32)
    assert rec.counts().get("attention") == SITES.get(form, 1), rec
    assert all(site.implementation != "reference" for site in rec.sites)
    eager, exact = gradients(form, torch.float32), gradients(form, torch.float64)
    assert len(ours) == len(eager)
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs.double() - right).abs().max() + 4 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("form", [soft_cap, sink, gated_mixture], ids=lambda f: f.__name__)
def test_after_a_graph_break(fuser, form):
    def program(q, k, v, m):
        q = q * 2
        torch._dynamo.graph_break()
        return form(q, k, v, m) + 1

    torch._dynamo.reset()
    inputs = inputs_of(form)
    with torch.no_grad():
        actual = torch.compile(program, backend=fuser)(*inputs)
    assert fuser.sites == 1
    assert len(fuser.graphs) == 2
    compare(actual, program, inputs)
