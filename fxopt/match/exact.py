"""Phase two of matching: the pattern is run on the matched values and compared node by node with the graph.

A structural match leaves open what the ops were told: over which dimension, keeping it or not, in which dtype. Here the
pattern is executed, with the alternatives that were chosen, on the fake values that its variables were bound to, and
each result is compared with the graph node in its place: the same attributes, the same shape for every size the
compiled code will serve, and a dtype at least as wide as the pattern's, but no wider than float32 where the pattern's is
narrower. No guard is added: where a comparison would need one, the match is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.graph.query import is_tensor, val, widens
from fxopt.graph.symbols import same_shape
from fxopt.match.matcher import Found
from fxopt.match.miss import Miss
from fxopt.match.pattern import CAST, ONE_OF, UPCAST, Pattern, at_least_float32
from fxopt.match.spelling import DIMENSIONS, REDUCTIONS, canonical_attribute, read

#: attributes that hold sizes of the model: compared by their number, and taken from the graph when the pattern is run
_SIZES = {"normalized_shape"}

#: attributes without effect on the values
_IGNORED = {"memory_format", "non_blocking", "copy", "cudnn_enable", "layout", "pin_memory", "device"}


def difference(pattern: Pattern, found: Found) -> Miss | None:
    """Where the graph differs from the pattern run on the matched values, or None if nowhere."""
    values: dict[Node, Any] = {}
    for name, variable in pattern.variables.items():
        if name in found.bindings:
            values[variable] = val(found.bindings[name])
    mode = detect_fake_mode([v for v in values.values() if isinstance(v, Tensor)])
    if mode is None:
        return Miss("no tensor is bound, so that the pattern can't be run", None, found.progress)
    guards = _no_new_guards(mode.shape_env)
    with mode, torch.no_grad(), guards:
        for node in _chosen(pattern, found):
            if node.op == "placeholder":
                continue
            graph_node = found.pairs.get(node)
            if graph_node is not None and (reason := _attributes_differ(node, graph_node)):
                return Miss(reason, graph_node, found.progress)
            try:
                values[node] = _run(node, graph_node, values, found)
            except Exception as error:  # ops raise anything on operands that don't fit, and a refused guard raises too
                at = graph_node if graph_node is not None else found.at(pattern.root)
                return Miss(f"the pattern's {node.name} can't be run on these values: {error}", at, found.progress)
            if graph_node is not None and (reason := _values_differ(values[node], graph_node)):
                return Miss(reason, graph_node, found.progress)
    return None


def _chosen(pattern: Pattern, found: Found) -> list[Node]:
    """The pattern's nodes on the way to its outputs through the chosen alternatives, in order."""
    needed: set[Node] = set()
    work = list(pattern.outputs)
    while work:
        node = work.pop()
        if node in needed:
            continue
        needed.add(node)
        work += [_choice(node, found)] if node.target is ONE_OF else node.all_input_nodes
    return [node for node in pattern.graph.nodes if node in needed]


def _choice(node: Node, found: Found) -> Node:
    tag, names, values = node.args
    return values[names.index(found.tags[tag])]  # type: ignore[index,union-attr,return-value]


def _run(node: Node, graph_node: Node | None, values: dict[Node, Any], found: Found) -> Any:
    if node.target is ONE_OF:
        return values[_choice(node, found)]
    if node.target is CAST:
        tag, value = node.args
        dtype = found.tags[tag]  # type: ignore[index]
        return values[value] if dtype is None else values[value].to(dtype)  # type: ignore[index]
    if node.target is UPCAST:
        value = values[node.args[0]]  # type: ignore[index]
        return value.to(at_least_float32(value.dtype))
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and graph_node is not None:
        names = [argument.name for argument in schema.arguments]
        sizes = {k: map_arg(v, val) for k, v in read(graph_node).attributes.items() if k in _SIZES}
        args = [sizes.get(name, value) for name, value in zip(names, args, strict=False)]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _attributes_differ(node: Node, graph_node: Node) -> str | None:
    want, given = read(node), read(graph_node)
    rank = _rank(want.operands)
    graph_rank = _rank(given.operands)
    for name in want.attributes.keys() | given.attributes.keys():
        if name in _IGNORED:
            continue
        a, b = want.attributes.get(name), given.attributes.get(name)
        if name == "dtype" and a is None:
            continue  # what it does is seen in the result's dtype
        if name in _SIZES:
            if len(a) != len(b):
                return f"{given.op} over {len(b)} dimensions, the pattern over {len(a)}"
            continue
        a = canonical_attribute(name, a, rank, want.op)
        b = canonical_attribute(name, b, graph_rank, given.op)
        if a != b:
            if name in DIMENSIONS and given.op in REDUCTIONS:
                return f"{given.op} reduces over {_dims(b, graph_rank)}, the pattern over {_dims(a, graph_rank)}"
            return f"{given.op} has {name}={b}, the pattern {a}"
    return None


def _values_differ(wanted: Any, graph_node: Node) -> str | None:
    given = val(graph_node)
    if not isinstance(wanted, Tensor) or not isinstance(given, Tensor):
        return None if type(wanted) is type(given) or not is_tensor(graph_node) else "not a tensor in the pattern"
    if not same_shape(wanted.shape, given.shape):
        return f"has shape {_shape(given)}, the pattern {_shape(wanted)}"
    if wanted.device != given.device:
        return f"is on {given.device}, the pattern on {wanted.device}"
    if wanted.dtype == given.dtype:
        return None
    here, there = (str(t.dtype).removeprefix("torch.") for t in (given, wanted))
    if not widens(wanted.dtype, given.dtype):
        return f"is computed in {here}, the pattern in {there}"
    if not widens(given.dtype, at_least_float32(wanted.dtype)):
        return f"is computed in {here}, more precisely than the pattern's {there}"
    return None


def _rank(operands: tuple[Any, ...]) -> int:
    for operand in operands:
        first = operand[0] if isinstance(operand, (list, tuple)) and operand else operand
        if is_tensor(first):
            return int(val(first).dim())
    return 0


def _dims(dims: Any, rank: int) -> str:
    dims = dims if isinstance(dims, tuple) else (dims,)
    if dims == (-1,):
        return "the last"
    if rank > 1 and dims == tuple(range(-rank, 0)):
        return "all dims"
    return ("dim " if len(dims) == 1 else "dims ") + ", ".join(str(d + rank) if rank + d >= 0 else str(d) for d in dims)


def _shape(value: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in value.shape) + "]"


def _no_new_guards(shape_env: Any) -> AbstractContextManager[Any]:
    return nullcontext() if shape_env is None else shape_env.error_on_new_guards()
