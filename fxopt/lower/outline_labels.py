"""What makes two nodes, and two stretches of a graph, the same.

A node's *label* is all that can be said of it alone: its target, its arguments that aren't nodes, and shape, strides,
dtype, device and requires_grad of what it returns. A stretch's *form* adds how its nodes are wired: each tensor that it
reads is either the i-th node of the stretch or the j-th tensor from outside, in order of first use. Two stretches of
equal form are isomorphic, and corresponding tensors from outside may be handed to the same code. That comparison is
linear, because both stretches come in one order; no search for an isomorphism is needed.

Sizes are not wired but compared as expressions: a stretch that needs s0 * 64 computes it from s0 again.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import is_mutable, val
from fxopt.graph.scope import is_barrier, is_random
from fxopt.graph.symbols import is_static, known_true

#: in bytes, what kernels assume of a pointer: a body made for aligned operands must not be given others
ALIGNMENT = 16


def is_size(node: Node) -> bool:
    """Whether the node's value is a number: a size, or arithmetic on sizes."""
    return isinstance(val(node), (int, float, SymInt, SymFloat, SymBool))


def stays_outside(node: Node) -> str | None:
    """Why a node can't be part of a shared body, or None.

    A body may neither write to what it is given nor switch global state: AOTAutograd would copy what is written.
    Random numbers stay outside so that their order, and with it every seed's result, stays as it is.
    """
    if is_mutable(node):
        return "it writes to a tensor"
    if is_random(node):
        return "it draws random numbers"
    if is_barrier(node):
        return "it is a higher-order op or switches global state"
    leaves = tree_leaves(val(node))
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.layout == torch.strided for leaf in leaves):
        return "it returns something other than strided tensors"
    if any(free_unbacked_symbols(leaf) for leaf in leaves):
        return "its shape depends on data"
    return None


def may_alias(node: Node) -> bool:
    """Whether the node's result may be a view of an argument, by its schema; one of several results as they are."""
    if node.target is operator.getitem:
        return not isinstance(node.args[0], Node) or may_alias(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


class Labels:
    """Labels of a graph's nodes as small integers, each computed once, and what each node reads.

    `differentiable` are the nodes with gradients.
    """

    def __init__(self, nodes: Sequence[Node], differentiable: frozenset[Node]) -> None:
        self._differentiable = differentiable
        self._values: dict[Node, Hashable] = {}
        self._described: dict[int, Hashable] = {}
        self.reads: dict[Node, tuple[Node, ...]] = {}  # in the order of the arguments, repetitions included
        numbers: dict[Hashable, int] = {}
        self.numbers = {node: numbers.setdefault(self._label(node), len(numbers)) for node in nodes}

    def _label(self, node: Node) -> Hashable:
        reads: list[Node] = []

        def mark(argument: Node) -> str:
            reads.append(argument)
            return "size" if is_size(argument) else "tensor"

        # A repr tells 1, 1.0, True and -0.0 apart.
        given = repr(map_arg((node.args, node.kwargs), mark))
        self.reads[node] = tuple(reads)
        return (node.target, given, self.value(node))

    def value(self, node: Node) -> Hashable:
        """What a node's value looks like to compiled code."""
        found = self._values.get(node)
        if found is None:
            value = val(node)
            leaves = (value,) if isinstance(value, Tensor) else tree_leaves(value)
            found = self._values[node] = (tuple(map(self._leaf, leaves)), node in self._differentiable)
        return found

    def _leaf(self, leaf: Any) -> Hashable:
        # Copies of one traced implementation share their values, so this saves most of the work.
        found = self._described.get(id(leaf))
        if found is None:
            found = self._described[id(leaf)] = _described(leaf)
        return found


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        offset = leaf.storage_offset() * leaf.element_size()
        sizes = tuple(map(expression, (*leaf.shape, *leaf.stride())))
        return (leaf.dtype, leaf.device, leaf.layout, sizes, known_true(offset % ALIGNMENT == 0))
    return (type(leaf), str(leaf))


def expression(size: Any) -> Hashable:
    """A size as something to compare: a number, or its sympy expression."""
    return size if is_static(size) else size.node.expr


@dataclass(frozen=True)
class Form:
    """A stretch of nodes up to isomorphism; equal forms can share one body."""

    nodes: tuple[Hashable, ...]  # label and wiring of each
    outside: tuple[Hashable, ...]  # what the tensors from outside look like
    results: tuple[int, ...]  # which nodes are read after the stretch


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes of a graph, the tensors they read from outside, and their form."""

    nodes: tuple[Node, ...]
    operands: tuple[Node, ...]
    sizes: tuple[Node, ...]  # numbers that they read
    form: Form


def stretch(nodes: Sequence[Node], labels: Labels) -> Stretch:
    """The stretch made of `nodes`."""
    inside = {node: i for i, node in enumerate(nodes)}
    outside: dict[Node, int] = {}
    sizes: dict[Node, None] = {}
    wired: list[Hashable] = []
    for node in nodes:
        reads: list[Hashable] = []
        for leaf in labels.reads[node]:
            if leaf in inside:
                reads.append(inside[leaf])
            elif is_size(leaf):
                sizes[leaf] = None
                reads.append(("size", expression(val(leaf))))
            else:
                reads.append(("outside", outside.setdefault(leaf, len(outside))))
        wired.append((labels.numbers[node], tuple(reads)))
    results = tuple(i for node, i in inside.items() if any(_reads_later(user, inside) for user in node.users))
    form = Form(tuple(wired), tuple(labels.value(n) for n in outside), results)
    return Stretch(tuple(nodes), tuple(outside), tuple(sizes), form)


def _reads_later(user: Node, inside: dict[Node, int]) -> bool:
    # A size taken of an inner tensor is an expression; it is computed from its symbols wherever it is needed.
    return user not in inside and not is_size(user)


def differentiable(graph: Graph) -> frozenset[Node]:
    """The nodes whose values carry gradients, by propagation from the inputs.

    A node's fake value can't be asked: implementations are traced into the graph without gradients.
    """
    found: set[Node] = set()
    enabled = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            carries = _asks_for_gradients(tree_leaves(val(node)))
        elif node.target is torch._C._set_grad_enabled:
            enabled, carries = bool(node.args[0]), False
        else:
            carries = enabled and node.target is not torch.ops.aten.detach.default
            carries = carries and any(n in found for n in node.all_input_nodes) and _is_real(tree_leaves(val(node)))
        if carries:
            found.add(node)
    return frozenset(found)


def _asks_for_gradients(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _is_real(leaves: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves)
