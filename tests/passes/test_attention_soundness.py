"""Programs that are almost attention: whatever is fused of them computes what eager computes.

Each is put together from steps that fuse and from steps that look like them: another dimension, another transpose, a
scale or shift where it does not commute, a mask that is almost causal, a write to what was read. No program here has to
be fused; none may be fused wrongly.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from attending import Fuser, randn
from fxopt import cachedir

N = 4  # every dimension: what is mixed up has the right shape
almost_causal = torch.ones(N, N).tril().bool()
almost_causal[0, 1] = True


def flip_one(m):
    m = m.clone()
    m[..., 2, 1] = -torch.inf
    return m


SCORES = {
    "scaled": lambda s, m, q: s * 0.3,
    "scaled by rows": lambda s, m, q: s * m[:, :, :, :1],
    "scaled by keys": lambda s, m, q: s / (1 + m[:, :, :1].abs()),
    "scaled by scores' own": lambda s, m, q: s * s.sigmoid(),
    "multiplied": lambda s, m, q: s * m,
    "biased": lambda s, m, q: s + m,
    "biased by the transpose": lambda s, m, q: s + m.mT,
    "biased across heads": lambda s, m, q: s + m.transpose(1, 2),
    "shifted": lambda s, m, q: s + 1.5,
    "maximum of rows": lambda s, m, q: s - s.amax(-1, keepdim=True),
    "maximum of columns": lambda s, m, q: s - s.amax(-2, keepdim=True),
    "maximum of all": lambda s, m, q: s - s.amax(),
    "capped": lambda s, m, q: 3.0 * torch.tanh(s / 3.0),
    "capped otherwise": lambda s, m, q: 2.0 * torch.tanh(s / 3.0 + 0.1),
    "causal": lambda s, m, q: s.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf),
    "almost causal": lambda s, m, q: s.masked_fill(~almost_causal.to(s.device), -torch.inf),
    "the other way": lambda s, m, q: s.masked_fill(torch.ones(N, N).tril(-1).bool(), -torch.inf),
    "one position": lambda s, m, q: s + flip_one(m),
    "filled finitely": lambda s, m, q: s.masked_fill(m > 0, -1e4),
    "filled a little": lambda s, m, q: s.masked_fill(m > 0, -4.0),
    "clamped": lambda s, m, q: s.clamp(min=-2.0),
    "transposed": lambda s, m, q: s.mT.contiguous(),
    "heads moved": lambda s, m, q: s.transpose(0, 1),
    "mixed heads": lambda s, m, q: F.linear(s.permute(0, 2, 3, 1), m[0, 0]).permute(0, 3, 1, 2),
    "mixed rows": lambda s, m, q: F.linear(s.mT, m[0, 0]).mT,
    "in place": lambda s, m, q: s.mul_(0.5).add_(m),
    "negated": lambda s, m, q: -s,
}
SOFTMAX = {
    "keys": lambda s, m: torch.softmax(s, -1),
    "rows": lambda s, m: torch.softmax(s, -2),
    "heads": lambda s, m: torch.softmax(s, 1),
    "sink": lambda s, m: torch.softmax(torch.cat([s, m[..., :1]], -1), -1)[..., :-1],
    "sink, first key dropped": lambda s, m: torch.softmax(torch.cat([s, m[..., :1]], -1), -1)[..., 1:],
    "sink first": lambda s, m: torch.softmax(torch.cat([m[..., :2], s], -1), -1)[..., 2:],
    "sink below": lambda s, m: torch.softmax(torch.cat([s, m[:, :, :1]], -2), -1)[..., :-1, :],
    "by hand": lambda s, m: (s - s.logsumexp(-1, keepdim=True)).exp(),
}
WEIGHTS = {
    "scaled": lambda p, m: p * 0.5,
    "by head": lambda p, m: p * m[0, :, :1, :1],
    "by row": lambda p, m: p / (2 + m[..., :1]),
    "by key": lambda p, m: p * m[:, :, :1],
    "added": lambda p, m: p + m,
    "another softmax": lambda p, m: 0.4 * p + m[..., :1].sigmoid() * torch.softmax(m, -1),
    "another, of columns": lambda p, m: p + torch.softmax(m, -2),
    "normalised": lambda p, m: (p + m.abs()) / (p + m.abs()).sum(-1, keepdim=True),
    "normalised over rows": lambda p, m: p / p.sum(-2, keepdim=True),
    "blanked": lambda p, m: p.masked_fill(m[..., :1] > 0, 0.0),
    "blanked key by key": lambda p, m: p.masked_fill(m > 0, 0.0),
    "filled with one": lambda p, m: p.masked_fill(m[..., :1] > 0, 1.0),
    "NaN cleared": lambda p, m: torch.nan_to_num(p),
    "transposed": lambda p, m: p.mT,
    "mixed heads": lambda p, m: F.linear(p.permute(0, 2, 3, 1), m[0, 0]).permute(0, 3, 1, 2),
    "squared": lambda p, m: p * p,
}
PRODUCTS = {
    "plain": lambda p, v: p @ v,
    "transposed values": lambda p, v: p @ v.mT,
    "from the left": lambda p, v: v @ p,
    "from the left, transposed": lambda p, v: v @ p.mT,
    "heads moved": lambda p, v: p.transpose(1, 2) @ v,
    "twice": lambda p, v: p @ (p @ v),
}
ORDERS = [(0, 1, 3, 2), (0, 1, 2, 3), (1, 0, 3, 2), (0, 3, 1, 2), (0, 2, 3, 1)]

programs = st.tuples(
    st.sampled_from(ORDERS),
    st.lists(st.sampled_from(sorted(SCORES)), max_size=3),
    st.sampled_from(sorted(SOFTMAX)),
    st.lists(st.sampled_from(sorted(WEIGHTS)), max_size=2),
    st.sampled_from(sorted(PRODUCTS)),
    st.sampled_from(["nothing", "the mask", "v", "k"]),
)


def make(order, scores, softmax, weights, product, written):
    def program(q, k, v, m):
        v, m, k = v + 0, m + 0, k + 0
        s = q @ k.permute(order)
        if written == "k":
            k.mul_(2)
        for name in scores:
            s = SCORES[name](s, m, q)
        if written == "the mask":
            m.add_(1)
        p = SOFTMAX[softmax](s, m)
        for name in weights:
            p = WEIGHTS[name](p, m)
        if written == "v":
            v.mul_(2)
        return PRODUCTS[product](p, v) + k.sum()

    return program


def check(choice, fuser):
    program, inputs = make(*choice), tuple(randn(N, N, N, N, seed=i) for i in range(4))
    actual, expected = fuser.run(program, *inputs), program(*inputs)
    exact = program(*(x.double() for x in inputs))
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), expected.isfinite()), choice
    if finite.any():
        own = (expected.double() - exact)[finite].abs().max() + 4e-6 * exact[finite].abs().max()
        assert (actual.double() - exact)[finite].abs().max() <= 2 * own, choice


@pytest.mark.parametrize("examples", [20, pytest.param(150, marks=pytest.mark.slow)])
def test_what_is_almost_attention_is_not_mistaken(examples, tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path))

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs)
    def run(choice):
        check(choice, Fuser())

    run()


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("weights", [None, *WEIGHTS])
@pytest.mark.slow
def test_every_softmax_with_every_change_of_weights(fuser_of, softmax, weights):
    check(((0, 1, 3, 2), ["biased"], softmax, [weights] if weights else [], "plain", "nothing"), fuser_of())


@pytest.fixture
def fuser_of(tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path))
    return Fuser
