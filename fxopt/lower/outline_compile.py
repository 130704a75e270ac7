"""Where an outlined graph may be compiled, and what the report says of it.

By default only where it was measured to cost nothing at run time: inference that writes no cache, on a GPU in CUDA
graphs. Training takes an Inductor that reuses no memory (see outline_memory.py).
"""

from __future__ import annotations

import torch
import torch._inductor.config
from torch import Tensor
from torch.fx import GraphModule

from fxopt.graph.query import val
from fxopt.lower.compile import patches, uses_cuda_graphs
from fxopt.lower.outline import Outline, outline
from fxopt.options import Options


def outlined(module: GraphModule, options: Options, *, training: bool) -> Outline:
    """`module` with its repeated layers outlined where `options` and torch allow it; otherwise itself, and why not."""
    if options.outline == "off":
        return Outline(module)
    found = outline(module)
    if not found.bodies:
        return found
    objection = _objection(options, training)
    if objection is None and options.outline == "auto":
        objection = _costly(found, module, options)
    return found if objection is None else Outline(module, objections=(objection,))


def _costly(found: Outline, module: GraphModule, options: Options) -> str | None:
    """What calls of shared bodies cost when they run, where that is something, or not known."""
    inputs = [val(n) for n in module.graph.find_nodes(op="placeholder")]
    device = next((x.device.type for x in inputs if isinstance(x, Tensor) and x.device.type != "cpu"), "cpu")
    # A layer that writes a cache hands over more than the residual stream: that is decoding.
    decodes = any(body.results > 2 for body in found.bodies)
    if device == "cuda":
        # H200, 8 layers of an 8B model: prefill of 64 tokens 2.61 ms instead of 2.43, in CUDA graphs 1.87 and 1.92;
        # a step of decoding 4.13 and 3.82.
        if not uses_cuda_graphs(options):
            return _COSTS_TIME
        # The rotary embedding and the write of a key are one kernel in the same graph, two with a border in between:
        # 5 small launches a layer instead of 3, of 1.5 us each.
        return _COSTS_LAUNCHES if decodes else None
    if device != "cpu":
        return f'what shared bodies cost when they run is not measured on {device} (outline="always")'
    # There a call of a body costs the host about 70 us (8 layers of width 256: 2.56 ms a token instead of 2.00).
    return _COSTS_TIME if decodes else None


_COSTS_LAUNCHES = 'caches would be written between shared bodies, by launches of their own (outline="always")'
_COSTS_TIME = 'calls of shared bodies cost the host time at every step (outline="always")'


def _objection(options: Options, training: bool) -> str | None:
    if training and options.outline != "always":
        return 'layers that repeat are compiled one by one in training, unless with outline="always"'
    if not hasattr(torch.ops.higher_order, "invoke_subgraph"):
        return f"torch {torch.__version__} has no invoke_subgraph"
    config = torch._inductor.config
    for name in ("cpp_wrapper", "freezing"):
        if patches(options).get(name, getattr(config, name, False)):
            return f"layers that repeat are compiled one by one: Inductor's {name} can't share code among them"
    return None


def describe(found: Outline) -> dict[str, int]:
    """What was outlined, for a report: the body in words -> how many times it is called."""
    return {f"{b.name}, {b.nodes} nodes, the first in {b.module or 'the graph'}": b.calls for b in found.bodies}
