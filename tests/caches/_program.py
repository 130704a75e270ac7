"""Run in a process of its own: compile a program for each place of the plugin, and print what came out as JSON."""

from __future__ import annotations

import importlib
import json
import sys

import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

import fxopt

inductor.cpp_cache_precompile_headers = False  # they take longer than the one kernel that is compiled


def run(place: str, aten: str) -> dict:
    """The result, the gradient and what the caches of AOTAutograd and Inductor did."""
    module = importlib.import_module(f"cached_{place}")
    if place == "elsewhere":
        importlib.import_module("cached_extension")
    counters.clear()
    x = torch.arange(6.0).reshape(2, 3).requires_grad_(place == "backward")
    square = torch.eye(3) if place != "decomposition" else None
    if place == "decomposition":
        x = torch.eye(3)

    def program(x):
        y = getattr(torch.ops.aten, aten).default(x)
        return y if square is None else y @ square

    with fxopt.record() as rec:
        y = torch.compile(program, backend="fxopt", options={"verify": "off"})(x)
    if place == "backward":
        y.backward(torch.ones_like(y))
    return {
        "result": y.tolist(),
        "gradient": x.grad.tolist() if x.grad is not None else None,
        "sites": rec.counts(),
        "version": getattr(module, f"cached_{place}").overload._overloadname,
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "bypassed": counters["aot_autograd"]["autograd_cache_bypass"],
    }


if __name__ == "__main__":
    places = json.loads(sys.argv[1])
    print(json.dumps({place: run(place, aten) for place, aten in places.items()}))
