"""A rewrite as two functions of the same inputs: what was matched, and what would stand in its place.

Both are cut out of the graph at the values that they read. Where the two read different values (one reads a transposed
key, the other the key; one reads a mask, the other knows that it is causal), the values in between are computed on both
sides, back to what they have in common: compared on unrelated inputs, a right rewrite would look wrong.

A program writes in place, a function doesn't. So a value in between is computed only where all that read it see what
its op computed; one that was overwritten before it is read becomes an input, related to nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import is_mutable, val
from fxopt.graph.scope import Scope, StorageId, is_barrier, is_random, storages

#: values searched backwards from one input for what it has in common with the others (the longest mask chain
#: of transformers' models is 55 nodes)
SEARCH = 128


@dataclass(frozen=True)
class Pair:
    """The two functions: run `old` (or `new`) in order on values of `inputs`, and read `outputs` (`replacements`)."""

    inputs: tuple[Node, ...]
    old: tuple[Node, ...]
    new: tuple[Node, ...]
    outputs: tuple[Node, ...]
    replacements: tuple[Node, ...]

    @property
    def nodes(self) -> list[Node]:
        """All nodes of both functions, each once, inputs first."""
        return list(dict.fromkeys([*self.inputs, *self.old, *self.new]))


def extract(
    outputs: Sequence[Node],
    replacements: Sequence[Node],
    region: Collection[Node],
    made: Collection[Node],
    *,
    scope: Scope,
    place: Node,
    widen: bool = False,
) -> Pair:
    """Cut the two functions out of their graph. `widen`: relate all inputs to each other, not only unshared ones.

    `scope` knows the graph's writes; at `place` both functions read their inputs.
    """
    inside = set(region)
    old, old_inputs = _cone(outputs, inside)
    new, new_inputs = _cone(replacements, inside | set(made))
    apart = old_inputs | new_inputs if widen else old_inputs ^ new_inputs
    # A replacement can read a value that it also replaces; that value is computed on both sides.
    apart = {n for n in apart if n not in old and n not in new}
    if apart:
        between = _between(apart, old_inputs, new_inputs)
        between = _unwritten(between, old_inputs | new_inputs, scope, place)
        old, old_inputs = _cone(outputs, inside | between)
        new, new_inputs = _cone(replacements, inside | set(made) | between)
    return Pair(
        tuple(sorted(old_inputs | new_inputs)), tuple(sorted(old)), tuple(sorted(new)), tuple(outputs),
        tuple(replacements),
    )  # fmt: skip


def obstacle(pair: Pair) -> str | None:
    """Why the two functions can't be run on made-up values, or None."""
    for node in (*pair.old, *pair.new):
        if is_random(node):
            return f"{node.name} draws random numbers"
        if is_mutable(node):
            return f"{node.name} writes to its arguments"
        if is_barrier(node) or node.op != "call_function":
            return f"{node.name} ({node.op} {node.target}) is not a plain op"
    for node in pair.inputs:
        value = val(node)
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized:
                return f"{node.name} is a {value.layout} tensor"
        elif not isinstance(value, (SymInt, SymFloat, SymBool, int, float, bool)):
            return f"{node.name} is a {type(value).__name__}, not a tensor or number"
    return None


def _cone(ends: Iterable[Node], inside: Collection[Node]) -> tuple[set[Node], set[Node]]:
    """The nodes of `inside` that `ends` depend on, and the nodes outside that those read."""
    within: set[Node] = set()
    inputs: set[Node] = set()
    work = list(ends)
    while work:
        node = work.pop()
        if node not in inside and not isinstance(val(node), (list, tuple)):  # the parts of a split are no input
            inputs.add(node)
        elif node not in within:
            within.add(node)
            work.extend(node.all_input_nodes)
    return within, inputs


def _between(apart: set[Node], old_inputs: set[Node], new_inputs: set[Node]) -> set[Node]:
    """The nodes to compute so that the inputs in `apart` depend on the other inputs as they do in the graph."""
    known = old_inputs | new_inputs
    seen_old = _ancestors([n for n in apart if n in old_inputs], known)
    seen_new = _ancestors([n for n in apart if n in new_inputs], known)
    seen = seen_old | seen_new
    related: set[Node] = set()  # depend on another input, or on no tensor at all (arange, full)
    for node in sorted(seen):
        parents = node.all_input_nodes
        if not any(isinstance(val(p), Tensor) for p in parents) or any(p in related or p in known for p in parents):
            related.add(node)
    # What both sides read at the end of the search (an argument of the graph, say) relates them too.
    common = (seen_old & seen_new) - related | (_sources(seen_old, known) & _sources(seen_new, known))
    between = set(related)
    for node in sorted(seen - common):
        if any(p in between or p in common for p in node.all_input_nodes):
            between.add(node)
    return between


def _sources(nodes: set[Node], known: set[Node]) -> set[Node]:
    """The tensors that `nodes` read from outside of them, but for those that are inputs anyway."""
    parents = {parent for node in nodes for parent in node.all_input_nodes if isinstance(val(parent), Tensor)}
    return parents - nodes - known


def _unwritten(between: set[Node], read: set[Node], scope: Scope, place: Node) -> set[Node]:
    """The part of `between` that is a function: no value of it is overwritten before, or between, its being read.

    `read` are the values that both functions read, at `place`.
    """
    writes = [(node, written) for node, written in scope.writes if node < place]
    while between:
        readers: dict[Node, list[Node]] = {}
        for node in between:
            for parent in node.all_input_nodes:
                readers.setdefault(parent, []).append(node)
        memory = {node: storages(node) for node in {*readers, *between, *read}}
        touched = frozenset().union(*memory.values())
        writes = [(node, written) for node, written in writes if written & touched]
        wrong: set[Node] = set()
        for value, memory_of in memory.items() if writes else ():
            by = readers.get(value, [])
            last = place if value in read else max(by, default=value)
            wrong.update(at for at in by if _overwritten(memory_of, at, last, writes))
            if value in between and _overwritten(memory_of, value, last, writes):
                wrong.add(value)
        if not wrong:
            break
        between = between - wrong
    return between


def _overwritten(
    memory: frozenset[StorageId], first: Node, last: Node, writes: list[tuple[Node, frozenset[StorageId]]]
) -> bool:
    return any(first < node < last and written & memory for node, written in writes)


def _ancestors(starts: Iterable[Node], known: set[Node]) -> set[Node]:
    """Up to SEARCH pure nodes behind each of `starts`, nearest first, itself included, not going past `known`."""
    found: set[Node] = set()
    for start in starts:
        queue, seen = [start], {start}
        for at in queue:  # grows as it is walked
            if at.op != "call_function" or is_mutable(at) or is_random(at) or is_barrier(at):
                continue
            found.add(at)
            for parent in at.all_input_nodes:
                if parent not in seen and parent not in known and len(seen) < SEARCH:
                    seen.add(parent)
                    queue.append(parent)
    return found


def structure(pair: Pair, extra: Iterable[object] = ()) -> str:
    """A hash of everything that a comparison of the two functions depends on, the same for equal layers.

    Node names and the names of symbolic dims are replaced by numbers; sizes, dtypes, device types, the order of
    strides and the contents of constants take part. `extra` is hashed with it.
    """
    numbers: dict[Node, int] = {}
    symbols: dict[str, str] = {}
    parts: list[str] = [repr(item) for item in extra]
    for node in pair.inputs:
        numbers[node] = len(numbers)
        parts.append(_value(val(node), symbols))
        if node.op == "get_attr":
            parts.append(_contents(constant(node)))
    for side in (pair.old, pair.new):
        parts.append("side")
        for node in side:
            if node not in numbers:
                numbers[node] = len(numbers)
                parts.append(str(node.target))
                parts.append(_argument(node.args, numbers, symbols))
                if node.kwargs:
                    parts.append(_argument(node.kwargs, numbers, symbols))
            else:
                parts.append(f"again %{numbers[node]}")
    for ends in (pair.outputs, pair.replacements):
        parts.append(_argument(tuple(ends), numbers, symbols))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def constant(node: Node) -> Any:
    """The value of a get_attr node, or None where it isn't to be had."""
    at: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        at = getattr(at, name, None)
    return at


def _argument(argument: Any, numbers: dict[Node, int], symbols: dict[str, str]) -> str:
    if isinstance(argument, Node):
        return f"%{numbers[argument]}"
    if isinstance(argument, (tuple, list)):
        return f"({','.join([_argument(a, numbers, symbols) for a in argument])})"
    if isinstance(argument, dict):
        return f"{{{','.join([f'{k}={_argument(a, numbers, symbols)}' for k, a in argument.items()])}}}"
    if isinstance(argument, SymInt):
        return _size(argument, symbols)
    if isinstance(argument, torch.device):
        return argument.type
    return repr(argument)


def _value(value: Any, symbols: dict[str, str]) -> str:
    if not isinstance(value, Tensor):
        return _size(value, symbols) if isinstance(value, SymInt) else type(value).__name__
    sizes = ",".join([_size(s, symbols) if isinstance(s, SymInt) else str(s) for s in value.shape])
    return f"{value.dtype}[{sizes}]{value.device.type}{stride_order(value)}"


def stride_order(value: Tensor) -> tuple[int, ...]:
    """The dimensions of a strided tensor from the farthest apart in memory to the nearest, by example sizes."""
    from fxopt.graph.symbols import hint

    strides = value.stride()
    if not any(isinstance(s, SymInt) for s in strides) and value.is_contiguous():
        return tuple(range(value.dim()))
    return tuple(sorted(range(value.dim()), key=lambda d: -hint(strides[d])))


_SYMBOL = re.compile(r"\b[A-Za-z_]\w*\b(?!\()")


def _size(value: SymInt, symbols: dict[str, str]) -> str:
    """A symbolic size as text, its symbols numbered in order of appearance."""
    return _SYMBOL.sub(lambda m: symbols.setdefault(m[0], f"d{len(symbols)}"), _text(value.node.expr))


@lru_cache(maxsize=4096)
def _text(expression: Any) -> str:
    return str(expression)


def _contents(value: Any) -> str:
    if isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter) and value.numel() <= 1 << 20:
        with torch.no_grad():
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(raw).hexdigest()
    return f"{type(value).__name__} {id(value)}"
