"""Counters that count together.

Every layer of a static cache counts its tokens in a tensor of its own, `length.add_(1)`: in a decode step a launch for
one number, layer by layer. What nothing in the graph touches any more can as well be counted at its end, all at once:

    ...  length0.add_(1)  ...  length1.add_(1)  ...    ->    ...  _foreach_add_([length0, length1], 1)
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt.graph.query import val
from fxopt.graph.scope import StorageId, storages

aten = torch.ops.aten

#: more elements are no counter: what they cost is not the launch
MOST_ELEMENTS = 1024


def count_together(module: GraphModule) -> int:
    """Move updates `x.add_(number)` of small tensors that come last on their memory to the end, one op for those alike.

    Works in place; returns how many updates share an op now. For graphs without gradients, on devices where a launch
    costs more than an addition.
    """
    graph = module.graph
    alike: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    touched: set[StorageId] = set()  # by what comes later
    output = graph.output_node()
    for node in reversed(graph.nodes):
        if node is output:
            continue
        if _is_update(node) and not storages(node.args[0]) & touched:
            x, number = val(node.args[0]), node.args[1]
            alike[x.device, x.dtype, type(number), number].append(node)
        touched.update(*(storages(n) for n in node.all_input_nodes))
    together = [list(reversed(nodes)) for nodes in alike.values() if len(nodes) > 1]
    for nodes in together:
        with graph.inserting_before(output):
            made = graph.call_function(aten._foreach_add_.Scalar, ([n.args[0] for n in nodes], nodes[0].args[1]))
        made.meta = {**nodes[-1].meta, "val": None}
        for node in nodes:
            graph.erase_node(node)
    if together:
        module.recompile()
    return sum(map(len, together))


def _is_update(node: Node) -> bool:
    """Whether the node adds a number to a small tensor in place, and nothing uses what it returns."""
    if node.op != "call_function" or node.target is not aten.add_.Tensor or node.kwargs or node.users:
        return False
    x, number = val(node.args[0]), node.args[1]
    return (
        isinstance(x, Tensor)
        and not x.requires_grad
        and type(number) in (int, float)
        and all(type(n) is int for n in x.shape)
        and x.numel() <= MOST_ELEMENTS
    )
