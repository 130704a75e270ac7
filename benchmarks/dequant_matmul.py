"""Dequantise + matmul written in plain PyTorch: bfloat16 cuBLAS, Inductor, fxopt; microseconds a call.

Every number is from a CUDA graph in which calls follow each other, each with weights of its own: 160 MB of them, more
than the L2 cache holds. The limit is the quantised weight's bytes over 4.3 TB/s (an H200's).

    python benchmarks/dequant_matmul.py [M,N,K ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.backend import fxopt
from timing import graph_milliseconds

GROUP = 128
SHAPES = [
    (1, 4096, 4096),
    (1, 14336, 4096),
    (1, 4096, 14336),
    (16, 4096, 4096),
    (16, 14336, 4096),
    (64, 4096, 4096),
    (256, 4096, 4096),
]


def int8(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """int8 weights, one scale an output."""
    return F.linear(x, w.to(x.dtype) * s[:, None])


def int4(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """4-bit weights, two to a byte, in groups."""
    q = torch.stack([w & 15, w >> 4], -1).reshape(w.shape[0], -1, GROUP).to(x.dtype) - 8
    return F.linear(x, (q * s[:, :, None]).flatten(1))


def dense(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """What the same layer costs without quantisation."""
    return F.linear(x, w)


def weights(kind: Callable[..., Tensor], n: int, k: int) -> tuple[Tensor, Tensor]:
    """A random weight and its scales."""
    if kind is dense:
        return torch.randn(n, k, device="cuda").bfloat16(), torch.ones(1, device="cuda")
    width, scales, dtype = (k, (n,), torch.int8) if kind is int8 else (k // 2, (n, k // GROUP), torch.uint8)
    w = torch.randint(-128 if kind is int8 else 0, 128, (n, width), device="cuda", dtype=dtype)
    return w, torch.rand(scales, device="cuda").bfloat16() / 64


def microseconds(fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> float:
    """Time of one call of `fn` among `calls` in a CUDA graph."""
    return graph_milliseconds([lambda args=args: fn(*args) for args in calls]) * 1e3


def main(shapes: Sequence[tuple[int, int, int]]) -> None:
    """Print the table."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'M, N, K':>18} {'weight':>6} {'cuBLAS bf16':>11} {'Inductor':>9} {'fxopt':>7} {'limit':>6}")
    for m, n, k in shapes:
        for kind in (int8, int4):
            x = torch.randn(m, k, device="cuda").bfloat16()
            size = n * k if kind is int8 else n * k // 2
            calls = [(x, *weights(kind, n, k)) for _ in range(max(4, 160_000_000 // size))]
            row = [microseconds(dense, [(x, *weights(dense, n, k)) for _ in range(max(4, 80_000_000 // (n * k)))])]
            for backend in ("inductor", fxopt):
                torch._dynamo.reset()
                row.append(microseconds(torch.compile(kind, backend=backend, dynamic=False), calls))
            shape, name = f"{m}, {n}, {k}", kind.__name__
            print(
                f"{shape:>18} {name:>6} {row[0]:>11.1f} {row[1]:>9.1f} {row[2]:>7.1f} {size / 4.3e6:>6.1f}", flush=True
            )


if __name__ == "__main__":
    with torch.no_grad():
        main([tuple(map(int, a.split(","))) for a in sys.argv[1:]] or SHAPES)  # type: ignore[misc]
