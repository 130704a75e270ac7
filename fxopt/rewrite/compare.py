"""How far two results are apart: relative to the largest element of the row, so that small rows count as large ones do.

A row is the last dimension, together with those before it for as long as it has fewer than ROW elements: in a row of
one element (a head of width 1, a stand-in size of 3) a sum that happens to cancel has no digits left, in eager mode
neither. Elements that are NaN or infinite have to be so on both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROW = 16


@dataclass(frozen=True)
class Distance:
    """The largest relative difference and where it is; infinite where NaN, inf, integer or shape disagree."""

    error: float
    words: str = ""


def distance(truth: Any, found: Any, excused: Tensor | None = None) -> Distance:
    """How far `found` is from `truth`. Elements where `excused` (bool) holds are not compared."""
    if not isinstance(truth, Tensor) or not isinstance(found, Tensor):
        return Distance(0.0) if truth == found else Distance(math.inf, f"{found} for {truth}")
    if truth.shape != found.shape:
        return Distance(math.inf, f"shape {tuple(found.shape)} for {tuple(truth.shape)}")
    if truth.numel() == 0:
        return Distance(0.0)
    if not (truth.is_floating_point() or truth.is_complex()):
        wrong = int((truth.cpu() != found.cpu()).sum())
        return Distance(math.inf, f"{wrong} of {truth.numel()} elements differ") if wrong else Distance(0.0)
    truth = _real(truth)
    found = _real(found).to(truth.device)
    both = torch.isfinite(truth) & torch.isfinite(found)
    same = both | (truth == found) | (truth.isnan() & found.isnan())
    scale = torch.where(torch.isfinite(truth), truth.abs(), 0.0)
    dims = [d for d in range(scale.dim()) if math.prod(scale.shape[d + 1 :]) < ROW]
    rows = scale.amax(dims, keepdim=True) if dims else scale
    rows = rows.clamp(min=max(float(scale.max()) * 1e-6, torch.finfo(torch.float64).tiny))
    error = torch.where(both, (truth - found).abs() / rows, torch.where(same, 0.0, torch.inf))
    if excused is not None:
        error = torch.where(excused, 0.0, error)
    worst = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    value = float(error.reshape(-1)[worst])
    got, wanted = float(found.reshape(-1)[worst]), float(truth.reshape(-1)[worst])
    return Distance(value, f"at {place}: {got:.6g} instead of {wanted:.6g}")


def non_finite(value: Any) -> Tensor:
    """Which elements are NaN or infinite, shaped as `distance` sees the value."""
    return ~torch.isfinite(_real(value))


def _real(value: Tensor) -> Tensor:
    value = value.detach()
    if value.is_complex():
        return torch.view_as_real(value.to(torch.complex128))
    return value.to(torch.float64)
