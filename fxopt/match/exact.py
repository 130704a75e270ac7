"""Phase two of matching: the pattern is run on the matched values and compared node by node with the graph.

A structural match leaves open what the ops were told: over which dimension, keeping it or not, in which dtype. Here the
pattern is executed, with the alternatives that were chosen, on the fake values that its variables were bound to, and
each result is compared with the graph node in its place: the same attributes, the same shape for every size the
compiled code will serve, and a dtype at least as wide as the pattern's, but no wider than float32 where the pattern's
is narrower. No guard is added: where a comparison would need one, the match is refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxopt.compat import NewGuardError, no_new_guards
from fxopt.graph.query import faking, is_tensor, val, widens
from fxopt.graph.symbols import is_static, same_shape
from fxopt.match.matcher import Found, last_calls, read_pattern
from fxopt.match.miss import Miss
from fxopt.match.pattern import CAST, ONE_OF, UPCAST, Pattern, alternatives, at_least_float32, optional_cast
from fxopt.match.spelling import DIMENSIONS, REDUCTIONS, canonical_attribute, origin, read

#: attributes that hold sizes of the model: compared by their number, and taken from the graph when the pattern is run
_SIZES = {"normalized_shape"}

#: attributes without effect on the values
_IGNORED = {"memory_format", "non_blocking", "copy", "cudnn_enable", "layout", "pin_memory", "device"}


@dataclass(frozen=True)
class _Run:
    """What running a pattern gave: each node's value as (shape, dtype, device), and where it stopped, if it did."""

    results: dict[Node, Any]
    stopped: tuple[Node, str] | None = None


#: fake mode -> signature of a match -> its run. A model's layers share a signature, and fake ops are slow (1 ms each
#: with symbolic shapes).
_runs: WeakKeyDictionary[Any, dict[Any, _Run]] = WeakKeyDictionary()


def difference(pattern: Pattern, found: Found) -> Miss | None:
    """Where the graph differs from the pattern run on the matched values, or None if nowhere."""
    for node, graph_node in found.pairs.items():
        if reason := _attributes_differ(node, graph_node):
            return Miss(reason, graph_node, found.progress)
    tensors = [v for v in map(val, found.bindings.values()) if isinstance(v, Tensor)]
    mode = detect_fake_mode(tensors) if tensors else None
    if mode is None:
        return Miss("no tensor is bound, so that the pattern can't be run", found.at(pattern.root), found.progress)
    signature = _signature(pattern, found)
    runs = _runs.setdefault(mode, {})
    run = runs.get(signature) if signature is not None else None
    if run is None:
        run = _run_all(pattern, found, mode)
        if signature is not None:
            runs[signature] = run
    for node, result in run.results.items():
        if node in found.pairs and (reason := _values_differ(result, found.pairs[node])):
            return Miss(reason, found.pairs[node], found.progress)
    if run.stopped is not None:
        node, error = run.stopped
        at = found.pairs.get(node) or found.at(pattern.root)
        return Miss(f"the pattern's {node.name} can't be run on these values: {error}", at, found.progress)
    return None


def share(pattern: Pattern, found: Found) -> float:
    """How much of the pattern is there, 0 to 1: nodes with the pattern's attributes, of those of its smallest form.

    What a value is used for says most about it (a sum of squares is a norm where something is divided by its root), so
    the last step to the first output counts twice.
    """
    alike = {node for node, graph_node in found.pairs.items() if not _attributes_differ(node, graph_node)}
    return min(1.0, (len(alike) + bool(alike & last_calls(pattern.root))) / (len(_smallest(pattern.root)) + 1))


@functools.lru_cache(maxsize=4096)
def _smallest(p: Any) -> frozenset[Node]:
    """The calls at and below pattern value `p`, where each alternative is the one of the fewest."""
    p = origin(p)
    if not isinstance(p, Node) or p.op == "placeholder":
        return frozenset()
    if p.target is ONE_OF:
        return min(map(_smallest, alternatives(p)[2]), key=len)
    if p.target is CAST:
        return _smallest(optional_cast(p)[1])
    return frozenset({p}).union(*map(_smallest, filter(is_tensor, tree_leaves(read_pattern(p).operands))))


def _run_all(pattern: Pattern, found: Found, mode: Any) -> _Run:
    values = {v: val(found.bindings[name]) for name, v in pattern.variables.items() if name in found.bindings}
    results: dict[Node, Any] = {}
    try:
        with faking(mode), torch.no_grad(), no_new_guards(mode.shape_env):
            for node in _chosen(pattern, found):
                if node.op == "placeholder":
                    continue
                try:
                    value = values[node] = _run(node, found.pairs.get(node), values, found)
                except Exception as error:  # ops raise anything on operands that don't fit, and a refused guard too
                    return _Run(results, (node, str(error)))
                results[node] = (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else None
    except NewGuardError as error:
        return _Run(results, (pattern.root, str(error)))
    return _Run(results)


def _signature(pattern: Pattern, found: Found) -> Any:
    """All that a run's results depend on; None if that can't be said briefly."""
    if any(name in _SIZES for node in found.pairs for name in read_pattern(node).attributes):
        return None
    bound = []
    for name in pattern.variables:
        value = val(found.bindings.get(name))
        if isinstance(value, Tensor):
            bound.append((tuple(map(_expression, value.shape)), value.dtype, value.device))
        else:
            bound.append(_expression(value))
    return (pattern.root, tuple(bound), tuple(sorted((k, str(v)) for k, v in found.tags.items())))


def _expression(value: Any) -> Any:
    return value if is_static(value) else (type(value), value.node.expr)


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
    tag, names, values = alternatives(node)
    return values[names.index(found.tags[tag])]


def _run(node: Node, graph_node: Node | None, values: dict[Node, Any], found: Found) -> Any:
    if node.target is ONE_OF:
        return values[_choice(node, found)]
    if node.target is CAST:
        tag, value = optional_cast(node)
        dtype = found.tags[tag]
        return values[value] if dtype is None else values[value].to(dtype)
    if node.target is UPCAST:
        wide = values[node.all_input_nodes[0]]
        return wide.to(at_least_float32(wide.dtype))
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and graph_node is not None:
        names = [argument.name for argument in schema.arguments]
        sizes = {k: map_arg(v, val) for k, v in read(graph_node).attributes.items() if k in _SIZES}
        args = [sizes.get(name, value) for name, value in zip(names, args, strict=False)]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _attributes_differ(node: Node, graph_node: Node) -> str | None:
    want, given = read_pattern(node), read(graph_node)
    rank = _rank(want.operands)
    graph_rank = _rank(given.operands)
    for name in dict.fromkeys([*want.attributes, *given.attributes]):
        if name in _IGNORED:
            continue
        a, b = want.attributes.get(name), given.attributes.get(name)
        if name == "dtype" and a is None:
            continue  # what it does is seen in the result's dtype
        if name in _SIZES:
            over, pattern_over = len(b or ()), len(a or ())
            if over != pattern_over:
                return f"{given.op} over {over} dimensions, the pattern over {pattern_over}"
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
    if wanted is None or not isinstance(given, Tensor):
        return None if wanted is None and not isinstance(given, Tensor) else "one is a tensor, the other is not"
    shape, dtype, device = wanted
    if not same_shape(shape, given.shape):
        return f"has shape {_shape(given.shape)}, the pattern {_shape(shape)}"
    if device != given.device:
        return f"is on {given.device}, the pattern on {device}"
    if dtype == given.dtype:
        return None
    here, there = (str(d).removeprefix("torch.") for d in (given.dtype, dtype))
    if not widens(dtype, given.dtype):
        return f"is computed in {here}, the pattern in {there}"
    if not widens(given.dtype, at_least_float32(dtype)):
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


def _shape(shape: Any) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
