"""Casts before permutations: `x.transpose(1, 2).to(bf16)` becomes `x.to(bf16).transpose(1, 2)`.

A cast keeps its argument's strides (where the argument is dense), so both are the same tensor. Written this way round,
permutations on both sides of a cast meet and cancel: autocast casts every K of a spelled-out attention after it was
transposed. A permuted tensor that is also read as it is (a norm scales x by what it makes of x in float32) stays the
one value that both come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from fxopt.graph.query import arguments, faking, is_cast, is_permute, users, val
from fxopt.graph.scope import storages

_META = ("stack_trace", "nn_module_stack", "from_node", "seq_nr")


def casts_first(graph: Graph, written: frozenset[int], cut: frozenset[Node] = frozenset()) -> int:
    """Move casts before the permutations they are made of, in place; how many.

    `written` are storages written to, `cut` the nodes that run without gradients in a graph that has them elsewhere.
    """
    moved = 0
    returned = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if not is_cast(node) or node in returned or arguments(node).get("copy") or storages(node) & written:
            continue
        chain: list[Node] = []
        source = node.args[0]
        while is_permute(source) and (source in cut) == (node in cut) and all(map(_moves, users(source))):
            chain.append(source)
            source = source.args[0]
        if chain and _move(graph, node, source, chain):
            moved += 1
    return moved


def _moves(user: Node) -> bool:
    return is_cast(user) or is_permute(user)


def _move(graph: Graph, node: Node, source: Node, chain: list[Node]) -> bool:
    made = []
    with graph.inserting_before(node), faking(val(node).fake_mode):
        last = source
        for step in (node, *reversed(chain)):
            call: Callable[..., Any] = step.target  # type: ignore[assignment]
            last = graph.call_function(call, (last, *step.args[1:]), dict(step.kwargs))
            last.meta = {key: step.meta[key] for key in _META if key in step.meta}
            last.meta["val"] = call(*map(val, last.args), **last.kwargs)
            made.append(last)
    if val(last).stride() != val(node).stride():  # an expanded tensor, say: the cast would have packed it
        for step in reversed(made):
            graph.erase_node(step)
        return False
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    return True
