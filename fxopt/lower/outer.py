"""A product over one element is an outer product: a [.., M, 1] @ b [.., 1, N] is a · b, each result one multiplication.

That is how rotary embeddings make their angles, frequencies times positions. A matrix product is a launch of its own
that nothing fuses with; a multiplication is computed where its result is read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxopt.graph.query import faking, val
from fxopt.graph.symbols import known_equal
from fxopt.lower.strides import restore_strides

aten = torch.ops.aten


def multiply_outer(module: GraphModule) -> int:
    """Turn matrix products over one element into multiplications, in place; how many there were.

    For graphs without gradients: theirs would be sums of whole results, which matrix products compute better.
    """
    found = [n for n in module.graph.find_nodes(op="call_function", target=aten.matmul.default) if _is_outer(n)]
    for node in found:
        a, b = node.args
        with module.graph.inserting_before(node):
            product = module.graph.call_function(aten.mul.Tensor, (a, b))
        product.meta = dict(node.meta)
        with faking(val(node).fake_mode):
            product.meta["val"] = aten.mul.Tensor(val(a), val(b))
        node.replace_all_uses_with(restore_strides(module.graph, node, product))
        module.graph.erase_node(node)
    if found:
        module.recompile()
    return len(found)


def _is_outer(node: Node) -> bool:
    """Whether the node multiplies a column by a row, of real numbers of one dtype."""
    a, b = (val(x) for x in node.args)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype or not a.is_floating_point():
        return False
    return a.dim() >= 2 and b.dim() >= 2 and known_equal(a.shape[-1], 1) and known_equal(b.shape[-2], 1)
