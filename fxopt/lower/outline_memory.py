"""The one thing that must hold for a shared body to be right: each of its results is memory of its own.

Inductor does not know that two results of an `invoke_subgraph` call, or a result and an operand, can be one piece of
memory: it would overwrite one while the other is still needed. Bodies are made so that this can't be (see outline.py),
but AOTAutograd works on them afterwards: it removes what does nothing, and merges equal expressions. So what reaches
Inductor is looked at again, and refused if it came to that.

In training it always comes to that: a forward body returns operands that it saves for the backward. There Inductor must
overwrite nothing that has a name (`NO_REUSE`). Nor may inputs of the backward be donated: Inductor takes the outer
graph's list of those for the body's. (torch 2.13: without these gradients are wrong by orders of magnitude.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt.lower.outline_labels import may_alias

#: bodies are named so, followed by a number
PREFIX = "fxopt_repeated_"
#: inputs of a body that are sizes, not tensors, come last and are named so, followed by the symbol
SIZE = "size_"


#: Inductor's configuration under which results that share memory do no harm: a dead buffer is freed, never written over
NO_REUSE = {"inplace_buffers": False, "allow_buffer_reuse": False}


class SharedMemoryError(Exception):
    """A body that reached Inductor returns memory that is not its own; the message says which."""


def has_bodies(module: GraphModule) -> bool:
    """Whether the graph calls bodies that fxopt made."""
    return bool(_bodies(module))


def check_bodies(graph: GraphModule) -> None:
    """Look at the bodies of a graph that AOTAutograd made. Raises SharedMemoryError where results could be wrong."""
    for body in _bodies(graph):
        reason = shared_memory(body)
        if reason is not None:
            raise SharedMemoryError(reason)


def _bodies(module: GraphModule) -> list[GraphModule]:
    found: dict[str, GraphModule] = {}
    for node in module.graph.nodes:
        calls = node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)
        if calls and any(isinstance(a, str) and PREFIX in a for a in node.args):
            graphs = [a for a in node.args if isinstance(a, Node) and a.op == "get_attr"]
            found |= {str(a.target): getattr(module, str(a.target)) for a in graphs}
    return [body for body in found.values() if isinstance(body, GraphModule)]


def shared_memory(body: GraphModule) -> str | None:
    """Which result of a traced body may share memory with an operand or another result, or None."""
    results: Any = body.graph.output_node().args[0]
    seen: set[Node] = set()
    for result in results:
        if not isinstance(result, Node) or not isinstance(result.meta.get("val"), Tensor):
            continue
        base = result
        while base.op == "call_function" and may_alias(base) and base.all_input_nodes:
            base = base.all_input_nodes[0]
        if base.op == "placeholder" or base in seen:
            return f"the body returns {result.name}, which may be memory of {base.name}"
        seen.add(base)
    return None
