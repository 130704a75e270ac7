"""Where an outlined graph may be compiled, and what the report says of it.

Training is outlined only when asked for (outline="always"): it takes an Inductor that reuses no memory, see
outline_memory.py, and what that costs was not measured on a GPU.
"""

from __future__ import annotations

import torch
import torch._inductor.config
from torch.fx import GraphModule

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
    costly = options.outline == "auto" and not uses_cuda_graphs(options) and any(b.results > 2 for b in found.bodies)
    if objection is None and costly:
        # A layer that writes a cache hands over more than the residual stream: that is decoding, where a call of a
        # body costs the host about 70 us (8 layers of width 256 on the CPU: 2.56 ms a token instead of 2.00).
        objection = 'calls of shared bodies cost a decoding step time, unless in CUDA graphs (outline="always")'
    return found if objection is None else Outline(module, objections=(objection,))


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
