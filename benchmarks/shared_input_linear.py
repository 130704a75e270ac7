"""Linear layers of one input: separate matmuls against one launch, microseconds a call; decides `most_rows`.

    python benchmarks/shared_input_linear.py [--hidden 4096] [--rows 1 2 4 8 16 32 64]

Every number is from a CUDA graph in which calls follow each other, each with weights of its own: 160 MB of them, more
than the L2 cache holds. "separate" is what Inductor makes of the layers as the model has them, with coordinate descent
where it is asked for; "one launch" is the Triton kernel. The limit is the weights' bytes over 4.3 TB/s (an H200's).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.shared_input_linear import TILE_ROWS, gated_linear, linear_triple
from timing import graph_milliseconds


def qkv(hidden: int) -> tuple[int, ...]:
    """Outputs of q, k and v with 4 query heads a key-value head."""
    return hidden, hidden // 4, hidden // 4


def mlp(hidden: int) -> tuple[int, ...]:
    """Outputs of gate and up in the proportions of Llama 3."""
    return hidden * 7 // 2, hidden * 7 // 2


def call(op: Any, run: Callable[..., Any], x: Tensor, weights: list[Tensor]) -> Callable[[], Any]:
    """One call of `run`, an implementation of `op`, on these tensors."""
    given = (*weights, "silu") if op is gated_linear else weights
    arguments = op.bind(x, *given, most_rows=TILE_ROWS)
    return lambda: run(*arguments)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--coordinate-descent", action="store_true")
    chosen = parser.parse_args()
    torch._inductor.config.coordinate_descent_tuning = chosen.coordinate_descent
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "bfloat16, hidden size", chosen.hidden)
    print(f"{'layers':>10} {'rows':>5} {'separate':>9} {'one launch':>11} {'limit':>6}")
    for op, widths in ((linear_triple, qkv(chosen.hidden)), (gated_linear, mlp(chosen.hidden))):
        size = 2 * sum(widths) * chosen.hidden
        copies = max(4, 160_000_000 // size)
        weights = [[torch.randn(n, chosen.hidden, device="cuda").bfloat16() for n in widths] for _ in range(copies)]
        for rows in chosen.rows:
            x = torch.randn(rows, chosen.hidden, device="cuda").bfloat16()
            torch._dynamo.reset()
            separate = torch.compile(op.reference, dynamic=False)
            ours = next(i.run for i in op.implementations if i.name == "triton")
            times = [
                graph_milliseconds([call(op, run, x, given) for given in weights]) * 1e3 for run in (separate, ours)
            ]
            print(
                f"{'q, k, v' if op is linear_triple else 'gate, up':>10} {rows:>5} {times[0]:>9.1f} {times[1]:>11.1f}"
                f" {size / 4.3e6:>6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
