"""Integers that differ from call to call, as tensors, so that one CUDA graph serves them all.

A CUDA graph holds the numbers that its kernels were launched with. A Python integer that a program counts up (how many
tokens a sliding-window cache has seen) is a number like that, so Inductor records a graph for each of its values: with
every token anew. Where the integer is no size but only enters values,

    position = arange + max(0, length - 63);  return length + 1, ...

the numbers that tensors are computed with are computed on the host, before the graph, and written to memory that it
reads, and those that are returned are computed on the host too. The graph has no integers left.

Only where that is exact: integer tensors, to which a tensor without dimensions does what a number does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import faking, val
from fxopt.graph.symbols import same_shape

aten = torch.ops.aten

#: ops on a tensor and a number, and what does the same with two tensors
_WITH_TENSOR = {op: op for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)} | {
    getattr(aten, name).Scalar: getattr(aten, name).Tensor for name in ("lt", "le", "gt", "ge", "eq", "ne")
}
#: arithmetic of integers, as it is traced
_ARITHMETIC = frozenset(
    {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, torch.sym_max,
     torch.sym_min}
)  # fmt: skip

INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class WithoutIntegers:
    """A graph whose integers are tensors: `inputs` are what it is compiled for, `wrapped` makes of the compiled code
    what the graph with integers was called like."""

    module: GraphModule
    inputs: list[Any]
    wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]


def without_integers(module: GraphModule, example_inputs: Sequence[Any]) -> WithoutIntegers | str | None:
    """`module` (which is left as it is) without integer inputs; why it needs one as it is; None where it has none."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = [i for i, node in enumerate(placeholders) if isinstance(val(node), SymInt)]
    if not given:
        return None
    numbers = _numbers(module.graph)
    if numbers is None:
        return "a size, or a number other than an integer, depends on one"
    devices = {x.device for x in example_inputs if isinstance(x, Tensor)}
    read = list(dict.fromkeys(n for node in module.graph.nodes for n in _read(node, numbers)))
    if len(devices) != 1:
        return "the inputs are on several devices"
    needing = next((node for node in module.graph.nodes if not _serves(node, numbers)), None)
    if needing is not None:
        return f"{needing.name} ({needing.target}) would not compute the same with a tensor"
    mode = detect_fake_mode(list(example_inputs)) or detect_fake_mode([val(p) for p in placeholders])
    (device,) = devices
    made = _copy(module, numbers, read, lambda: _empty(mode, device))
    if made is None:
        return "a result would have another dtype or shape"
    outputs = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    host = _host_program(module, numbers, [*read, *(o for o in outputs if o in numbers)])
    kept = [i for i in range(len(placeholders)) if i not in given]
    returned = [o in numbers for o in outputs]
    boxes = _boxes(len(read), device)

    def wrapped(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> list[Any]:
            values = host(*(args[i] for i in given))
            for box, value in zip(boxes, values, strict=False):
                box.fill_(value)
            tensors, rest = iter(run(*(args[i] for i in kept), *boxes)), iter(values[len(boxes) :])
            return [next(rest) if number else next(tensors) for number in returned]

        return call

    inputs = [example_inputs[i] for i in kept] + [_empty(mode, device) for _ in boxes]
    return WithoutIntegers(made, inputs, wrapped)


def _numbers(graph: Graph) -> frozenset[Node] | None:
    """The integer inputs and what is computed from them alone; None where a size or anything else depends on one."""
    found: set[Node] = set()
    for node in graph.nodes:
        value = val(node)
        if isinstance(value, SymInt):
            computed = node.op != "placeholder"
            if computed and (node.target not in _ARITHMETIC or not found.issuperset(node.all_input_nodes)):
                return None
            found.add(node)
        elif any(_symbolic(leaf) for leaf in tree_leaves(value)) and node.op != "output":
            return None
    return frozenset(found)


def _symbolic(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return any(isinstance(size, SymInt) for size in (*leaf.shape, *leaf.stride(), leaf.storage_offset()))
    return isinstance(leaf, (SymInt, torch.SymFloat, torch.SymBool))


def _read(node: Node, numbers: frozenset[Node]) -> list[Node]:
    """The numbers that a tensor is computed with."""
    return [] if node.op == "output" or node in numbers else [n for n in node.all_input_nodes if n in numbers]


def _serves(node: Node, numbers: frozenset[Node]) -> bool:
    """Whether a node that reads a number can read a tensor in its place."""
    if not _read(node, numbers):
        return True
    if node.target not in _WITH_TENSOR or node.kwargs or len(node.args) != 2:
        return False
    tensor, number = node.args
    return number in numbers and isinstance(val(tensor), Tensor) and val(tensor).dtype in INTEGERS


def _copy(
    module: GraphModule, numbers: frozenset[Node], read: Sequence[Node], empty: Callable[[], Tensor]
) -> GraphModule | None:
    """The graph with the numbers in `read` as further inputs, and without all others; None where a result changes."""
    graph, copies = Graph(), dict[Node, Any]()
    nodes = [node for node in module.graph.nodes if node not in numbers]
    first = next(i for i, node in enumerate(nodes) if node.op != "placeholder")
    for node in nodes[:first]:
        copies[node] = _copied(graph, node, copies)
    for node in read:
        copies[node] = graph.placeholder(f"{node.name}_value")
        copies[node].meta = {"val": empty(), "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        copies[node]._dynamo_source = None
    for node in nodes[first:]:
        if node.op == "output":
            kept = [o for o in node.args[0] if o not in numbers]
            graph.output(tuple(copies.get(o, o) for o in kept)).meta = dict(node.meta)
            continue
        copies[node] = _copied(graph, node, copies)
        if _read(node, numbers):
            copies[node].target = _WITH_TENSOR[node.target]
            value = _computed(copies[node])
            if value.dtype != val(node).dtype or not same_shape(value.shape, val(node).shape):
                return None
    result = GraphModule(module, graph)
    result.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        result._param_name_to_source = module._param_name_to_source
    return result


def _copied(graph: Graph, node: Node, copies: dict[Node, Any]) -> Node:
    copy = graph.node_copy(node, copies.__getitem__)
    if hasattr(node, "_dynamo_source"):
        copy._dynamo_source = node._dynamo_source
    return copy


def _computed(node: Node) -> Tensor:
    values = [val(a) for a in node.args]
    with faking(detect_fake_mode(values)):
        result: Tensor = node.target(*values)  # type: ignore[operator]
    return result


def _empty(mode: Any, device: torch.device) -> Tensor:
    if mode is None:
        return torch.empty((), dtype=torch.int64, device=device)
    with mode:
        return torch.empty((), dtype=torch.int64, device=device)


def _boxes(count: int, device: torch.device) -> list[Tensor]:
    """The memory that the graph reads its numbers from, in all calls."""
    with unset_fake_temporarily(), torch.inference_mode(False):
        return [torch.zeros((), dtype=torch.int64, device=device) for _ in range(count)]


def _host_program(module: GraphModule, numbers: frozenset[Node], wanted: Sequence[Node]) -> Callable[..., Any]:
    """What computes `wanted` from the integer inputs."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node in numbers:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in wanted))
    host: Callable[..., Any] = GraphModule(torch.nn.Module(), graph).forward
    return host
