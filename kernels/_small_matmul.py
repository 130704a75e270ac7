"""What the kernels for few rows share: the product of x with some rows of a weight, and how to launch it.

    one row           a matrix-vector product: BLOCK_N rows of the weight at a time, no tensor cores
    up to 64 rows     one tile of tensor-core products; SWAP puts the weight on the left, where Hopper's instruction
                      takes 64 rows, and x on the right, where it takes 8 or more

An RMSNorm before the product is taken in for one row. Of several rows every program would compute it anew, which costs
more than its launch: on an H200, gate and up of Llama 3 8B with 16 rows took 90 µs so, Inductor with the norm apart 66.

The weight is read once and from far away: its loads are pipelined (`tl.range(num_stages=)` does that for loads which
feed no dot too) and evicted first. x is read by every program and stays in the L2 cache.

They are launched programmatically dependent (PDL), which hides a part of the gap between launches. Weights are not
loaded before the predecessor is done: that is safe only where the kernel that stands before in the *stream* writes no
weight, and an op can't know that. Inductor orders the launches, and the first one of a graph may follow an optimiser's.
To prefetch them to the L2 cache is safe, and cost more than it brought (docs/measurements.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.graph.symbols import hint, is_static
from fxopt.kernels import _triton
from fxopt.kernels._triton import jit, tl
from fxopt.ops import Target

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: rows that one tile holds
TILE_ROWS = 64


@jit
def product(  # type: ignore[no-untyped-def]
    x, w, norm, rows, n, k, first, last, x_row, stride, output, eps, offset,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, DOT: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: all rows of x, columns `first` to `last`, times the rows `output` of w, in float32.

    With NORM, x, which is one row then, is RMS-normed first, by `offset + norm` if WEIGHTED; the norm's factor is taken
    out of the sum, so that x is read once.
    """
    row = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    kept = (output < n)[:, None]
    weight = w + output.to(tl.int64)[:, None] * stride + inner[None, :]
    if DOT:
        source = x + row[:, None] * x_row + inner[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
            inside = start + inner < last
            part = tl.load(weight + start, mask=kept & inside[None, :], other=0.0, eviction_policy="evict_first")
            given = tl.load(source + start, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            if SWAP:
                total = tl.dot(part, tl.trans(given), total, input_precision="ieee")
            else:
                total = tl.dot(given, tl.trans(part), total, input_precision="ieee")
        result = tl.trans(total) if SWAP else total
    else:
        products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
            inside = start + inner < last
            part = tl.load(weight + start, mask=kept & inside[None, :], other=0.0, eviction_policy="evict_first")
            given = tl.load(x + start + inner, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares += given * given
                if WEIGHTED:
                    given = given * (tl.load(norm + start + inner, mask=inside, other=0.0).to(tl.float32) + offset)
            products += part.to(tl.float32) * given[None, :]
        result = tl.sum(products, 1)[None, :]
        if NORM:
            scale = tl.rsqrt(tl.sum(squares, 0) / tl.cast(k, tl.float32) + eps)
            # A mean that overflowed makes the factor 0, and 0 of a sum that did too is 0.
            result = tl.where(scale == 0.0, 0.0, result * scale)
    return result


def objection(target: Target, x: Tensor, weights: tuple[Tensor, ...], normed: bool) -> str | None:
    """Why kernels for few rows can't serve x [..., K], RMS-normed first or not, with these weights [N, K], or None."""
    rows = rows_of(x)
    if rows > TILE_ROWS:
        return f"the Triton kernel takes up to {TILE_ROWS} rows; there are {rows}"
    if normed and rows > 1:
        return f"the Triton kernel norms one row; there are {rows}"
    if found := _triton.needs_gpu(target):
        return found
    if x.dtype not in DTYPES or any(w.dtype != x.dtype for w in weights):
        return f"the Triton kernel takes one dtype of {', '.join(map(str, DTYPES))}"
    if not all(is_static(size) for w in weights for size in w.shape):
        return "the Triton kernel is specialised on the weights' shapes, which are dynamic here"
    if any(w.stride(-1) != 1 for w in weights):
        return "the Triton kernel reads weights row by row, and these are transposed in memory"
    return None


def pays(target: Target, x: Tensor, *rest: Any) -> str | None:
    """Why one launch is not believed to pay for layers of x, or None; `most_rows` is the op's last argument."""
    rows, most = rows_of(x), rest[-1]
    if most:
        return None if rows <= most else f"the Triton kernel was asked for up to {most} rows; there are {rows}"
    if not target.cuda_graphs:
        return "outside of CUDA graphs its launch from Python costs the host more than the GPU is believed to save"
    if rows > 1 and x.dtype.itemsize > 2:
        return "several rows of float32 are multiplied without tensor cores, which was not measured to pay"
    return None


def rows_of(x: Tensor) -> int:
    """The rows of x [..., K]; an example of them where they are symbolic."""
    return int(hint(math.prod(x.shape[:-1])))


def flat(x: Tensor) -> Tensor:
    """The rows of `x`, their elements side by side."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def served(x: Tensor, normed: bool) -> bool:
    """Whether the kernels take these rows as they are at run time: a dynamic number of them can be anything."""
    return 0 < x.numel() <= (1 if normed else TILE_ROWS) * x.shape[-1]


def guess(rows: int, n: int, k: int, itemsize: int, *, split: bool = True) -> dict[str, int]:
    """How to launch for so many rows, and weights of `n` rows in all, where nothing was measured.

    What did best, or nearly, on an H200 for the layers of Llama 3 8B, Llama 3.2 1B and Qwen 2.5 0.5B
    (docs/measurements.md): enough programs for all multiprocessors, and as much in flight as fits beside them.
    """
    if rows == 1:
        if n > 1 << 16:
            return _config(16, min(256, columns(k)), 1, 0, 3, 4)
        if n > 2048:
            return _config(8, min(512, columns(k)), 1, 0, 3, 4)
        return _config(4 if n > 1024 else 2, min(1024, columns(k)), 1, 0, 3 if k > 2048 else 1, 4)
    block_k = min(128, columns(k))
    if itemsize > 2:
        return _config(32, block_k, 1, 0, 3, 4)
    tiles = _triton.ceil_div(n, 64)
    if rows > 32 and tiles <= 64:
        return _config(32, block_k, 1, 0, 5, 4)
    if rows > 32:
        return _config(64, block_k, 1, 1, 5 if tiles <= 132 else 3, 4)
    parts = min(8, _triton.next_power_of_2(_triton.ceil_div(128, tiles))) if split and k >= 4096 else 1
    return _config(64, block_k, parts, 1, 5, 4)


def configs(rows: int, n: int, k: int, *, split: bool = True) -> Iterator[dict[str, int]]:
    """What is worth a measurement for `rows` rows of x and weights of `n` rows in all.

    One row: programs of 2 to 16 outputs, so that there are enough of them, with 256 to 1024 columns a step. More rows:
    tiles of 16 to 64 outputs either way round, cut along k where they would be fewer than the processors.
    """
    if rows == 1:
        for block_n, block_k, warps in (
            (2, 1024, 4),
            (4, 512, 2),
            (4, 1024, 4),
            (8, 512, 4),
            (16, 256, 4),
            (8, 1024, 8),
        ):
            for stages in (1, 3):
                yield _config(block_n, min(block_k, columns(k)), 1, 0, stages, warps)
        return
    narrow = 256 if rows <= 16 else 128  # with more rows of x a wider step spills
    for block_n, block_k, swap, warps in ((16, narrow, 0, 4), (32, 128, 0, 4), (64, 128, 1, 4), (64, 64, 1, 4)):
        tiles = _triton.ceil_div(n, block_n)
        wanted = {1, min(8, _triton.next_power_of_2(_triton.ceil_div(128, tiles)))} if split else {1}
        for splits in sorted(wanted):
            for stages in (3, 5) if k > 4 * block_k else (2,):
                yield _config(block_n, min(block_k, columns(k)), splits, swap, stages, warps)


def _config(block_n: int, block_k: int, split: int, swap: int, stages: int, warps: int) -> dict[str, int]:
    return {
        "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split, "SWAP": swap, "STAGES": stages, "num_warps": warps
    }  # fmt: skip


def columns(k: int) -> int:
    """The most columns that a step is worth for rows of `k`."""
    return max(16, _triton.next_power_of_2(k))


def launch(x: Tensor, programs: int, rows: int) -> dict[str, Any]:
    """How programs for `rows` rows of x are launched, beside the grid and the warps."""
    return _triton.dependent_launch(x, programs, 6 if rows == 1 else 2)


def constants(rows: int, config: dict[str, int]) -> dict[str, Any]:
    """The constants of `product` for a configuration; SPLIT and num_warps are the launch's."""
    dot = rows > 1
    values = {name: config[name] for name in ("BLOCK_N", "BLOCK_K", "STAGES")}
    block_m = max(16, _triton.next_power_of_2(rows)) if dot else 1
    return {"DOT": dot, "SWAP": bool(config["SWAP"]), "BLOCK_M": block_m, **values}
