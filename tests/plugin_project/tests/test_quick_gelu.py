"""FuseQuickGelu does what is asked of every fusion, is installed, and finds its site in a model."""

from __future__ import annotations

import torch
from fxopt_quick_gelu.fusion import FuseQuickGelu

import fxopt
from fxopt.testing import conformance, without_inductor

test_conformance = conformance(FuseQuickGelu())


def test_it_is_found_through_its_entry_point() -> None:
    assert fxopt.fusions()["quick_gelu"] == FuseQuickGelu()


def test_in_a_model() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.up(x)
            return self.down(h * torch.sigmoid(1.702 * h))

    model, x = Block(), torch.randn(3, 8)
    with without_inductor(), torch.no_grad(), fxopt.record() as rec:
        torch.testing.assert_close(torch.compile(model, backend="fxopt")(x), model(x))
    assert rec.counts()["quick_gelu"] == 1
