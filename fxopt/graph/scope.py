"""A graph prepared for matching: which nodes write, what aliases what, and where nothing may be moved across.

Everything here is asked once a match and must not grow with the graph: writes and barriers are few and kept sorted, and
the order of two nodes is read off the nodes themselves, so inserting a node invalidates nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import arguments, is_mutable, storage, users, val, written_arguments

StorageId = int


def storages(node: Any) -> frozenset[StorageId]:
    """The storages that a node's value lives in. Views share the storage of their base, also among fake tensors."""
    value = val(node)
    leaves = (value,) if isinstance(value, Tensor) else tree_leaves(value)
    return frozenset(found for leaf in leaves if (found := storage(leaf)) is not None)


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers (attention with a drop probability of zero doesn't)."""
    if not _may_draw(node.target):
        return False
    return arguments(node).get("dropout_p") != 0


@functools.lru_cache(maxsize=4096)
def _may_draw(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def is_barrier(node: Node) -> bool:
    """Whether nothing may be moved across the node: grad-mode switches, higher-order ops, unknown functions."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op != "call_function":
        return True
    if isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
        return False
    # Arithmetic on sizes is plain Python and pure; torch._C functions switch global state.
    makes_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(val(node)))
    return makes_tensors or getattr(node.target, "__module__", "") == "torch._C"


def gradients_on(graph: Graph) -> bool:
    """Whether anything in the graph runs with gradients on: they are on around it, or it switches them on itself."""
    return torch.is_grad_enabled() or any(
        bool(n.args[0]) for n in graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled, sort=False)
    )


def without_gradients(graph: Graph) -> frozenset[Node]:
    """The nodes that run with gradients switched off in a graph that has them elsewhere.

    What they return is cut off from what they read, were it the very same tensor.
    """
    if not gradients_on(graph):
        return frozenset()
    enabled, off = torch.is_grad_enabled(), set()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled and node.op == "call_function":
            off.add(node)
    return frozenset(off)


def needs_gradient(node: Node) -> bool:
    """Whether autograd will ask for the gradient of the node's value: an input of the graph that it depends on does."""
    work = [node]
    while work:
        at = work[-1]
        if _NEEDS_GRADIENT in at.meta:
            work.pop()
        elif at.op != "call_function" or at.target is torch.ops.aten.detach.default or not _is_differentiable(at):
            example = at.meta.get("example_value", val(at)) if at.op == "placeholder" else None
            at.meta[_NEEDS_GRADIENT] = isinstance(example, Tensor) and example.requires_grad
        elif unknown := [source for source in at.all_input_nodes if _NEEDS_GRADIENT not in source.meta]:
            work += unknown
        else:
            at.meta[_NEEDS_GRADIENT] = any(source.meta[_NEEDS_GRADIENT] for source in at.all_input_nodes)
    return bool(node.meta[_NEEDS_GRADIENT])


#: meta key: what `needs_gradient` found
_NEEDS_GRADIENT = "fxopt_needs_gradient"


def _is_differentiable(node: Node) -> bool:
    values = [leaf for leaf in tree_leaves(val(node)) if isinstance(leaf, Tensor)]
    return any(value.is_floating_point() or value.is_complex() for value in values)


class Scope:
    """A graph with its writes and barriers, as fusions and the legality check see it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.writes: list[tuple[Node, frozenset[StorageId]]] = []
        self.barriers: list[Node] = []
        self.without_gradients = without_gradients(graph)
        for node in graph.nodes:
            written = written_arguments(node)
            if written:
                self.writes.append((node, frozenset().union(*(storages(w) for w in written))))
            if is_barrier(node):
                self.barriers.append(node)

    def users(self, node: Node) -> list[Node]:
        """The nodes that use `node`, without those kept only to undo a raised form."""
        return users(node)

    def find(self, targets: Iterable[Any]) -> Iterator[Node]:
        """The nodes that call one of `targets` (overloads or packets), in graph order."""
        overloads: list[Any] = []
        for target in targets:
            if isinstance(target, torch._ops.OpOverloadPacket):
                overloads += [getattr(target, name) for name in target.overloads()]
            else:
                overloads.append(target)
        found = [n for o in overloads for n in self.graph.find_nodes(op="call_function", target=o, sort=False)]
        return iter(sorted(set(found)))

    def write_between(self, first: Node, last: Node, touched: frozenset[StorageId]) -> Node | None:
        """A node strictly between the two that writes to one of the storages, or None."""
        for node, written in self.writes:
            if first < node < last and written & touched:
                return node
        return None

    def barrier_between(self, first: Node, last: Node) -> Node | None:
        """A node strictly between the two across which nothing may be moved, or None."""
        for node in self.barriers:
            if first < node < last:
                return node
        return None

    def is_pure(self, node: Node) -> bool:
        """Whether running the node once, at any place, is all that can be observed of it."""
        return not (is_mutable(node) or is_random(node) or is_barrier(node)) and node.op in (
            "call_function",
            "get_attr",
        )
