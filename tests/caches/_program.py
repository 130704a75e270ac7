"""Run in a process of its own: compile a program for each place of the plugin, and print what came out as JSON."""

from __future__ import annotations

import importlib
import json
import sys

import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

import fxopt
import fxopt.backend

inductor.cpp_cache_precompile_headers = False  # they take longer than the one kernel that is compiled


def run(place: str, aten: str, entry: str) -> dict:
    """The result, the gradient and what the caches of AOTAutograd and Inductor did."""
    module = importlib.import_module(f"cached_{place}")
    if place == "elsewhere":
        importlib.import_module("cached_extension")
    torch._dynamo.reset()
    counters.clear()
    differentiated = place == "backward" and entry == "first"
    x = torch.eye(3) if place == "decomposition" else torch.arange(6.0).reshape(2, 3).requires_grad_(differentiated)

    def program(x):
        y = getattr(torch.ops.aten, aten).default(x)
        return y if place == "decomposition" else y @ torch.eye(3)

    # Of the fusions only the one: an edit of another must not be what makes the difference.
    options = {"verify": "off", "fusions": [f"cached_{place}"]}
    with fxopt.record() as rec, torch.set_grad_enabled(differentiated):
        y = torch.compile(program, backend="fxopt", options=options)(x)
    if differentiated:
        y.backward(torch.ones_like(y))
    return {
        "result": y.tolist(),
        "gradient": x.grad.tolist() if differentiated else None,
        "sites": rec.counts(),
        "entry": rec.graphs[0].entry,
        "version": getattr(module, f"cached_{place}").overload._overloadname,
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "bypassed": counters["aot_autograd"]["autograd_cache_bypass"],
    }


if __name__ == "__main__":
    places = json.loads(sys.argv[1])
    found = {f"{place}, first entry": run(place, aten, "first") for place, aten in places.items()}
    fxopt.backend.refusal = lambda *_: "the test says so"
    found |= {f"{place}, second entry": run(place, aten, "second") for place, aten in places.items()}
    print(json.dumps(found))
