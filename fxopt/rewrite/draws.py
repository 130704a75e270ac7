"""Values to compare two functions on: random ones, and the hostile ones that random ones never hit.

This file depends on torch alone: repro scripts carry a copy of it, so that they make the very same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: what the numbers of hostile rows are multiplied by: exp overflows for their products
LARGE = 1e3
#: in float16, where products of numbers that large are no numbers: what a model does beside them (fills scores with
#: finfo.min, which is -65504) would mean something else in the float64 that is compared in
LARGE_HALF = 30.0


@dataclass(frozen=True)
class Draw:
    """How one input is made; equal draws from equally seeded generators are equal.

    order  dimensions from the farthest apart in memory to the nearest
    kind   "normal" | "rows" (a quarter of the rows times LARGE) | "zeros" | "mask" (0 and -inf, some rows
           all -inf, some all at the dtype's lowest finite value) | "bool" | "dead" (bool, some rows all False) | "int"
    low, high  for "int": drawn from low to high - 1
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    kind: str = "normal"
    low: int = 0
    high: int = 2

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor, on the generator's device."""
        shape = tuple(self.shape[d] for d in self.order)
        back = [self.order.index(d) for d in range(len(shape))]
        return self._dense(shape, generator).permute(back)

    def _dense(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        device = generator.device

        def uniform(size: tuple[int, ...]) -> Tensor:
            return torch.rand(size, generator=generator, device=device, dtype=torch.float64)

        def normal() -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

        rows = (*shape[:-1], 1) if shape else ()
        if self.kind in ("bool", "dead"):
            drawn = uniform(shape) < 0.7
            if self.kind == "dead":
                drawn &= uniform(rows) < 0.7
            return drawn
        if self.kind == "int":
            high = max(self.high, self.low + 1)
            return torch.randint(self.low, high, shape, generator=generator, device=device).to(self.dtype)
        if self.kind == "zeros":
            return torch.zeros(shape, dtype=self.dtype, device=device)
        if self.kind == "mask":
            fill = torch.zeros(shape, dtype=torch.float64, device=device)
            fill[uniform(shape) < 0.3] = -math.inf
            fate = uniform(rows)
            fill = torch.where(fate < 0.2, -math.inf, fill)
            return torch.where(fate > 0.8, torch.finfo(self.dtype).min, fill).to(self.dtype)
        drawn = normal()
        if self.dtype.is_complex:
            drawn = torch.complex(drawn, normal())
        if self.kind == "rows":
            large = LARGE_HALF if self.dtype == torch.float16 else LARGE
            drawn = drawn * torch.where(uniform(rows) < 0.25, large, 1.0)
        return drawn.to(self.dtype)
