"""In training a rewrite must have the original's gradients, not just its values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sites
from fxopt.graph.scope import needs_gradient
from fxopt.ops import ANYWHERE

pytestmark = pytest.mark.usefixtures("_fresh_verdicts")


@pytest.fixture
def _fresh_verdicts(tmp_path, monkeypatch):
    from fxopt import cachedir
    from fxopt.rewrite import verdicts

    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path / "cache"))
    verdicts.clear()
    yield
    verdicts.clear()


TRAINING = replace(ANYWHERE, training=True)


def verify(original, replacement, *inputs, training=True):
    return sites.verify(original, replacement, *inputs, target=TRAINING if training else ANYWHERE)


def x(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


def detached(x, y):
    return x.sin() * y.detach()


def test_a_lost_detach_fails_in_training_only():
    verdict = verify(detached, lambda x, y: x.sin() * y, x(4, 8), x(4, 8))
    assert verdict.status == "failed"
    assert "other gradients in float64: the gradient of arg1" in verdict.detail
    assert verify(detached, lambda x, y: x.sin() * y, x(4, 8), x(4, 8), training=False).status == "equal"


def test_what_needs_no_gradient_is_not_asked_for_one():
    assert verify(detached, lambda x, y: x.sin() * y, x(4, 8), x(4, 8, grad=False)).status == "equal"


@pytest.mark.parametrize(
    "original, replacement",
    [
        (lambda x, y: torch.softmax(x @ y.mT, -1) @ y, lambda x, y: F.scaled_dot_product_attention(x, y, y, scale=1.0)),
        (lambda x, y: x.to(torch.bfloat16).float() * y, lambda x, y: x.to(torch.bfloat16) * y),
        (lambda x, y: torch.softmax(x + y.sum(), -1), lambda x, y: torch.softmax(x + y.sum() * 1.0, -1)),
        (lambda x, y: (x * y, x + y), lambda x, y: (y * x, y + x)),
        (lambda x, y: x.square() / y.square().mean().sqrt(), lambda x, y: x * x * torch.rsqrt((y * y).mean())),
        (lambda x, y: (x > y).float() * x, lambda x, y: torch.where(x > y, x, 0.0)),
    ],
)
def test_equal_gradients_pass(original, replacement):
    verdict = verify(original, replacement, x(2, 4, 8), x(2, 4, 8))
    assert verdict.status == "equal", verdict


@pytest.mark.parametrize(
    "original, replacement",
    [
        (lambda x, y: x * y, lambda x, y: (x * y).detach()),
        (lambda x, y: torch.softmax(x, -1) + y, lambda x, y: torch.softmax(x.detach(), -1) + y),
        (lambda x, y: x.abs() * y, lambda x, y: torch.where(x > 0, x, -x.detach()) * y),
    ],
)
def test_other_gradients_fail(original, replacement):
    assert "other gradients" in verify(original, replacement, x(2, 4, 8), x(2, 4, 8)).detail


def test_a_filled_mask_is_no_added_one():
    """Equal values; but a fill stops the gradient of a row that is masked throughout, and a sum does not."""
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)

    def filled(q, k, m):
        return torch.softmax((q @ k.mT).masked_fill(~m, -1e30), -1)

    def added(q, k, m):
        return torch.softmax(q @ k.mT + torch.zeros(m.shape, dtype=q.dtype).masked_fill(~m, -1e30), -1)

    inputs = (x(2, 3, 8, 4), x(2, 3, 8, 4), mask)
    assert verify(filled, added, *inputs, training=False).status == "equal"
    assert "other gradients" in verify(filled, added, *inputs).detail


def test_which_values_need_gradients():
    match, _ = sites.site(
        lambda a, b, c: (a * b, b + 1, (a > 0) & (c > 0), a.detach() * b), lambda a, b, c: (a, a, a, a),
        x(4), x(4, grad=False), x(4, grad=False),
    )  # fmt: skip
    assert [needs_gradient(node) for node in match.outputs] == [True, False, False, False]
