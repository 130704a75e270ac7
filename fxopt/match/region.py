"""Walks over a region of the graph: who feeds a node through noise, who uses it, and what happens to one value between.

A fusion that spells out its pattern meets dozens of bodies that differ in layout, casts and the order of pointwise ops.
One that reads *roles* anchors on an op, walks to the ops that matter, and interprets what lies between as steps of one
carried value:

    producers(node, wanted)     the nearest `wanted` nodes upstream, through pointwise, cast and layout ops
    consumers(node)             what uses the value, through casts and layout ops
    carried(start, end)         the steps that turn start's value into end's

Nothing here knows what is being fused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.graph.query import arguments, aten, is_cast, is_mutable, is_tensor, users, val, written_arguments
from fxopt.graph.scope import is_barrier, is_random, storages
from fxopt.graph.symbols import known_equal
from fxopt.match.axes import is_layout
from fxopt.match.miss import Miss

#: ops that use an argument after the first for its shape or dtype only
_LIKE = frozenset(
    {aten.expand_as.default, aten.reshape_as.default, aten.view_as.default, aten.type_as.default, aten.to.other}
)
#: pointwise ops, and others that pass a value on, that carry no pointwise tag
_PASSING = frozenset(
    {
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
        aten.masked_fill.Tensor,
        aten.cat.default,
        aten.slice.Tensor,
        aten.constant_pad_nd.default,
        aten.softmax.int,
        aten.dropout.default,
    }
)
_CONSTANTS = frozenset({aten.full.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones.default})


def is_pointwise(node: Any) -> bool:
    """Whether each element of the node's value depends on one element (after broadcasting) of each argument."""
    return isinstance(node, Node) and torch.Tag.pointwise in getattr(node.target, "tags", ())


def passes_on(node: Any) -> bool:
    """Whether a value may be followed through the node: pointwise, cast, layout, select, cat and slice."""
    if not isinstance(node, Node) or node.op != "call_function" or not is_tensor(node):
        return False
    return is_pointwise(node) or is_layout(node) or is_cast(node) or node.target in _PASSING


def is_relabel(node: Any) -> bool:
    """Whether the node shows the values of its first argument unchanged but for layout and precision."""
    return is_layout(node) or is_cast(node)


def data_inputs(node: Node) -> list[Node]:
    """The nodes whose *values* the node reads: without what it only takes a shape or dtype from."""
    if node.target in _LIKE:
        return [a for a in node.args[:1] if isinstance(a, Node)]
    return list(node.all_input_nodes)


def back(node: Node, through: Callable[[Any], bool] = is_relabel) -> Iterator[Node]:
    """`node` and then, for as long as `through` holds, the first argument of the one before: a chain, end first."""
    yield node
    while through(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def producers(node: Node, wanted: Callable[[Node], bool], limit: int = 200) -> list[Node]:
    """The `wanted` nodes that feed `node` through ops that pass a value on, nearest first."""
    found: list[Node] = []
    seen: set[Node] = {node}
    queue = [node]
    for at in queue:
        if len(seen) > limit:
            break
        if wanted(at):
            found.append(at)
        elif passes_on(at) or at is node:
            fresh = [source for source in data_inputs(at) if source not in seen]
            seen.update(fresh)
            queue += fresh
    return found


def consumers(node: Node, through: Callable[[Any], bool] = is_relabel) -> list[tuple[Node, tuple[Node, ...]]]:
    """What uses the node's value, through casts and layout ops: (user, the nodes between, in order)."""
    found: list[tuple[Node, tuple[Node, ...]]] = []
    work: list[tuple[Node, tuple[Node, ...]]] = [(node, ())]
    while work:
        at, path = work.pop(0)
        for user in users(at):
            if through(user) and user.args[0] is at:
                work.append((user, (*path, user)))
            else:
                found.append((user, path))
    return found


@dataclass(frozen=True)
class Step:
    """One step of a carried value: `node` is made from `before` and, where not empty, from `inner` nodes between.

    `inner` holds what hangs off the carried value and enters this step only (a row maximum that is subtracted, say).
    """

    node: Node
    before: Node
    inner: tuple[Node, ...] = ()

    @property
    def others(self) -> list[Node]:
        """The inputs of the step from outside."""
        own = {self.before, *self.inner}
        return [s for node in (*self.inner, self.node) for s in data_inputs(node) if s not in own]


def carried(start: Node, end: Node, limit: int = 200) -> list[Step] | Miss:
    """The steps in which the value of `start` becomes that of `end`; the last step's node is `end`.

    A node that every path from `start` to `end` passes ends a step. Misses where the region is larger than `limit`.
    """
    inside = {end}
    queue = [end]
    for at in queue:
        for source in data_inputs(at):
            if source not in inside and not source < start:
                inside.add(source)
                queue.append(source)
        if len(inside) > limit:
            return Miss(f"more than {limit} nodes lie between {start.name} and {end.name}", at)
    cone = [start]
    members = {start}
    for node in sorted(inside - {start}):
        if any(source in members for source in data_inputs(node)):
            cone.append(node)
            members.add(node)
    if end not in members:
        return Miss(f"{end.name} does not depend on {start.name}", end)

    last_use = {source: node for node in cone[1:] for source in data_inputs(node) if source in members}
    steps: list[Step] = []
    before, inner, open_values = start, [], {start}
    for node in cone[1:]:
        open_values = {v for v in open_values if last_use.get(v, node) > node}
        if open_values:
            inner.append(node)
            open_values.add(node)
        else:
            steps.append(Step(node, before, tuple(inner)))
            before, inner, open_values = node, [], {node}
    return steps


def private(chain: Collection[Node], region: Collection[Node]) -> list[Node]:
    """The first nodes of `chain` (listed from its end) that only each other and `region` use."""
    inside = set(region)
    result: list[Node] = []
    for node in chain:
        if not all(user in inside for user in users(node)):
            break
        inside.add(node)
        result.append(node)
    return result


def number(value: Any) -> Any:
    """A scalar operand: a Python number (constants are folded), or the node of a symbolic number; None for others."""
    if isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, Node):
        return None
    if isinstance(val(value), (torch.SymFloat, torch.SymInt, int, float)):
        return value
    node = value
    while is_layout(node) or is_cast(node):  # the same number, in a coarser dtype at most
        node = node.args[0]  # type: ignore[assignment]
    if node.target not in _CONSTANTS or not all(is_cast(n) or is_layout(n) or n is node for n in back(value)):
        return None
    if node.target is aten.zeros.default or node.target is aten.ones.default:
        constant: Any = 0 if node.target is aten.zeros.default else 1
    else:
        constant = arguments(node)["fill_value" if node.target is aten.full.default else "s"]
    if isinstance(constant, bool) or not isinstance(constant, (int, float)):
        return None
    if any(is_written(n) for n in back(value)):
        return None
    for dtype in [val(n).dtype for n in reversed(list(back(value)))]:
        constant = torch.tensor(constant, dtype=torch.float64).to(dtype).item()
    return constant


def is_written(node: Node) -> bool:
    """Whether the node, or anything that shares memory with it, is written to: its op doesn't tell its value then."""
    if is_mutable(node):
        return True
    home = storages(node)
    seen, queue = {node}, [node]
    for at in queue:
        for user in at.users:
            if user not in seen and (is_mutable(user) or storages(user) & home):
                if any(storages(argument) & home for argument in written_arguments(user)):
                    return True
                seen.add(user)
                queue.append(user)
    return False


def constant_value(node: Node, budget: int = 1 << 22, *, promoted: bool = False) -> Tensor | None:
    """The value of a subgraph that reads no input, has static sizes and at most `budget` elements a node, or None.

    It is computed on the CPU, in float64 throughout if `promoted` (the mathematical value, without the program's own
    rounding). Parameters and buffers are inputs: code compiled once may serve several models.
    """
    needed: list[Node] = []
    seen = {node}
    queue = [node]
    for at in queue:
        value = val(at)
        tensor = isinstance(value, Tensor)
        if at.op != "call_function" or is_written(at) or is_random(at) or is_barrier(at):
            return None
        if not tensor and not isinstance(value, (int, float, bool)):
            return None
        if tensor and (not all(isinstance(n, int) for n in value.shape) or value.numel() > budget):
            return None
        needed.append(at)
        fresh = [source for source in at.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue += fresh
        if len(seen) > 64:
            return None
    values: dict[Node, Any] = {}
    with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
        for at in sorted(needed):
            args, kwargs = map_arg((at.args, at.kwargs), lambda n: values[n])
            args, kwargs = _relocated(args, promoted), _relocated(kwargs, promoted)
            result = at.target(*args, **kwargs)  # type: ignore[operator]
            wide = promoted and isinstance(result, Tensor) and result.is_floating_point()
            values[at] = result.double() if wide else result
    result = values[node]
    return result if isinstance(result, Tensor) else None


def size_source(size: Any, tensors: Collection[Node]) -> tuple[Node, int] | None:
    """A tensor among `tensors` and the dimension of it that is known to have this symbolic size, or None."""
    for node in tensors:
        for d, n in enumerate(val(node).shape):
            if known_equal(n, size):
                return node, d
    return None


def _relocated(value: Any, promoted: bool) -> Any:
    """Arguments with devices replaced by the CPU and, if `promoted`, floating dtypes by float64."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype):
        return torch.float64 if promoted and value.is_floating_point else value
    if isinstance(value, (list, tuple)):
        return type(value)(_relocated(v, promoted) for v in value)
    if isinstance(value, dict):
        return {k: _relocated(v, promoted) for k, v in value.items()}
    return value
