"""Layouts of packed 4-bit weights: where in `packed` [N, K / P] the value of output n and input k lies.

A packed element holds P values of 4 bits (2 in a byte, 8 in an int32). Layouts are named "ORDER/BLOCK": BLOCK
consecutive inputs lie in BLOCK / P consecutive elements, and ORDER says whether the lowest bits come first. With
run = BLOCK / P, element j of a row holds in its p-th 4 bits (from the low end; for "high" from the high end)

    k = (j // run) * BLOCK + p * run + j % run

    "low/2"      byte j holds inputs 2j (low) and 2j + 1 (high): torch.stack([w & 15, w >> 4], -1)
    "high/2"     the same with the halves of a byte exchanged
    "low/32"     16 bytes hold 32 inputs, the first 16 in the low halves: GGML's Q4_0 and Q4_1 blocks
    "low/row"    the first half of a row in the low halves, the second in the high ones: torch.cat([w & 15, w >> 4], -1)
    "low/8"      8 values of an int32, lowest bits first: GPTQ, whose packed [K / 8, N] is passed transposed

`packed` may have any strides: nothing is repacked, since weights are inputs of compiled code and may change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: values per element of each dtype that can hold packed weights
VALUES = {torch.uint8: 2, torch.int8: 2, torch.int32: 8}


@dataclass(frozen=True)
class Layout:
    """How K values of 4 bits lie in a row of packed elements; see the module's docstring for the formula."""

    high_first: bool
    block: int  # inputs that run // P consecutive elements cover
    values: int  # P, values per element

    @property
    def run(self) -> int:
        """Consecutive elements whose p-th values are consecutive inputs."""
        return self.block // self.values

    @classmethod
    def parse(cls, name: str, packed: torch.dtype, k: int) -> Layout:
        """The layout "ORDER/BLOCK" for rows of `k` inputs packed in elements of dtype `packed`.

        Raises ValueError for an unknown order or dtype, or a block that does not divide the row.
        """
        order, _, size = name.partition("/")
        values = VALUES.get(packed)
        if values is None:
            raise ValueError(f"4-bit weights can't be packed in {packed}; use one of {', '.join(map(str, VALUES))}")
        if order not in ("low", "high") or not (size == "row" or size.isdecimal()):
            raise ValueError(f'layout {name!r} is not known; it is "low/B" or "high/B" with B a number or "row"')
        block = k if size == "row" else int(size)
        if block <= 0 or k % block or block % values:
            raise ValueError(f"layout {name!r}: blocks of {block} inputs, {values} an element, don't tile a row of {k}")
        return cls(order == "high", block, values)


def candidates(packed: torch.dtype, k: int, group_size: int) -> list[str]:
    """The layouts worth trying for a row of `k` inputs, the common ones first."""
    values = VALUES.get(packed)
    if values is None:
        return []
    sizes = dict.fromkeys([str(values), "row", str(group_size), "32", "64", "128"])
    names = [f"{order}/{size}" for size in sizes for order in ("low", "high")]
    return [n for n in names if n.endswith("/row") or (k % int(n.split("/")[1]) == 0 and _tiles(n, values))]


def _tiles(name: str, values: int) -> bool:
    return int(name.split("/")[1]) % values == 0


def unpack(packed: Tensor, layout: str) -> Tensor:
    """The values 0 to 15 in `packed` [N, K / P] as a contiguous uint8 tensor [N, K]."""
    values = VALUES.get(packed.dtype, 2)
    n, k = packed.shape[0], packed.shape[1] * values
    where = Layout.parse(layout, packed.dtype, k)
    blocks = packed.reshape(n, k // where.block, 1, where.run)
    # One expression in k, with no concatenation that a compiler would have to see through.
    shifts = 4 * torch.arange(values, dtype=packed.dtype, device=packed.device)
    if where.high_first:
        shifts = 4 * (values - 1) - shifts
    planes = (blocks >> shifts.reshape(1, 1, -1, 1)) & 15  # an arithmetic shift's sign bits are masked off
    return planes.to(torch.uint8).reshape(n, k)


def pack(values: Tensor, layout: str, dtype: torch.dtype = torch.uint8) -> Tensor:
    """The inverse of `unpack`: `values` [N, K] of 0 to 15 as [N, K / P] elements of `dtype`."""
    n, k = values.shape
    where = Layout.parse(layout, dtype, k)
    planes = values.to(torch.int64).reshape(n, k // where.block, where.values, where.run)
    if where.high_first:
        planes = planes.flip(2)
    shifts = 4 * torch.arange(where.values, device=values.device).reshape(1, 1, -1, 1)
    words = (planes << shifts).sum(2).reshape(n, k // where.values)
    bits = torch.iinfo(dtype).bits
    if torch.iinfo(dtype).min < 0:  # two's complement by hand: narrowing casts of large numbers are not defined
        words = torch.where(words >= 1 << (bits - 1), words - (1 << bits), words)
    return words.to(dtype)
