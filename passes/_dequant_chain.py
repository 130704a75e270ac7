"""The chain of ops that makes a weight [N, K] out of packed integers, and running it on a few rows of numbers.

A chain is everything between one integer tensor, the root, and the weight operand of a matmul, made of ops that are
listed below. It treats the N outputs alike: `Chain.trace` follows the output dimension backwards through every
op, and gives up where an op mixes outputs. So what is true of a few rows is true of all, and a chain can be evaluated
at its real K with few rows, whatever sizes are baked into its views. Floats are computed in float64, whatever their
dtype: what is compared is the algebra; integers in their own dtype, since their wrap-around is part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import COPIES, arguments, is_call, is_cast, is_permute, is_reshape, is_tensor, permutation, val
from fxopt.graph.symbols import is_static

aten = torch.ops.aten

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

#: each result element from the elements at the same place, exactly in integers
POINTWISE = frozenset(
    {
        *(getattr(aten, f"__{op}__") for op in ("and", "or", "xor", "rshift", "lshift")),
        *(getattr(aten, f"bitwise_{op}") for op in ("and", "or", "xor", "right_shift", "left_shift", "not")),
        *(aten.add, aten.sub, aten.mul, aten.neg, aten.remainder, aten.floor_divide, aten.div.Tensor),
    }
)
#: tensors that are the same in every run
CREATION = frozenset({aten.arange, aten.full, aten.zeros, aten.ones, aten.scalar_tensor})

Axis = tuple[int, int]  # dimension d has size N * c, output-major: (d, c)


class Unsupported(Exception):
    """An op or a value that the chain can't contain; `reason` in words, at `node`."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def in_chain(node: Node) -> bool:
    """Whether a chain may contain the op of `node` (a creation op is a leaf, like a placeholder)."""
    if not is_tensor(node) or val(node).dtype not in (*FLOATS, *INTEGERS):
        return False
    if is_cast(node):
        return not (val(node.args[0]).dtype.is_floating_point and val(node).dtype in INTEGERS)
    if is_call(node, aten.slice.Tensor):
        return _shape(node) == _shape(node.args[0])
    if is_call(node, aten.view.dtype):
        return val(node).dtype in INTEGERS and val(node.args[0]).dtype in INTEGERS
    if is_call(node, aten.remainder, aten.floor_divide) and val(node).dtype not in INTEGERS:
        return False  # their steps are elsewhere in float64
    return (
        is_reshape(node)
        or is_permute(node)
        or is_call(node, *POINTWISE, *COPIES, aten.expand, aten.stack, aten.cat, aten.repeat_interleave.self_int)
    )


def constant(node: Node) -> bool:
    """Whether the value of `node` is the same in every run: made of creation ops and numbers only."""
    return is_call(node, *CREATION) or (in_chain(node) and all(map(constant, node.all_input_nodes)))


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(val(node).shape)


@dataclass
class Chain:
    """The ops from `leaves` to `weight` in graph order, and for each node which dimension is the outputs'."""

    weight: Node
    nodes: list[Node]
    leaves: list[Node]
    axes: dict[Node, Axis | None]
    outputs: int  # N

    @classmethod
    def collect(cls, weight: Node, stops: Iterable[Node] = ()) -> tuple[list[Node], list[Node]]:
        """(nodes, leaves) reached backwards from `weight` through chain ops, not beyond `stops`; in graph order."""
        nodes: dict[Node, None] = {}
        leaves: dict[Node, None] = {}
        work, stop = [weight], set(stops)
        while work:
            node = work.pop()
            if node in nodes or node in leaves:
                continue
            if node in stop or not in_chain(node):
                leaves[node] = None
            else:
                nodes[node] = None
                work += node.all_input_nodes
        return sorted(nodes), sorted(leaves)

    @classmethod
    def trace(cls, weight: Node, axis: int, stops: Iterable[Node]) -> Chain:
        """The chain that ends in `weight`, whose outputs lie along dimension `axis`.

        Raises Unsupported where sizes are dynamic or an op mixes outputs.
        """
        nodes, leaves = cls.collect(weight, stops)
        for node in (*nodes, *leaves):
            if is_tensor(node) and not all(map(is_static, _shape(node))):
                raise Unsupported("the quantised weight has a dynamic shape", node)
        if _shape(weight)[axis] < 2:
            raise Unsupported("the quantised weight has a single output", weight)
        chain = cls(weight, nodes, leaves, {weight: (axis, 1)}, _shape(weight)[axis])
        for node in reversed(nodes):
            for source, wanted in chain._sources(node, chain.axes.get(node)):
                if source in chain.axes and chain.axes[source] != wanted:
                    raise Unsupported("one value is used with its outputs along two dimensions", source)
                chain.axes[source] = wanted
        for leaf in leaves:
            if is_call(leaf, *CREATION) and chain.axes.get(leaf) is not None:
                raise Unsupported("a constant differs from output to output", leaf)
        return chain

    def _sources(self, node: Node, axis: Axis | None) -> list[tuple[Node, Axis | None]]:
        """Where the output dimension of each argument of `node` is, given where that of its result is."""
        tensors = node.all_input_nodes
        if axis is None:
            return [(source, None) for source in tensors]
        dim, inner = axis
        if is_permute(node):
            order = permutation(node)
            assert order is not None
            return [(tensors[0], (order[dim], inner))]
        if is_call(node, aten.stack):
            along = arguments(node)["dim"] % len(_shape(node))
            if along == dim:
                raise Unsupported("outputs are stacked", node)
            return [(source, (dim - (along < dim), inner)) for source in tensors]
        if is_call(node, aten.cat, aten.repeat_interleave.self_int):
            along = arguments(node)["dim"]
            if along is None or along % len(_shape(node)) == dim:
                raise Unsupported("the unpacked values of several outputs are joined", node)
            return [(source, axis) for source in tensors]
        if is_call(node, aten.view.dtype) and dim == len(_shape(node)) - 1 and _shape(node) != _shape(tensors[0]):
            raise Unsupported("bytes of several outputs are read as one number", node)
        if is_reshape(node):
            return [(tensors[0], self._through_reshape(node, dim))]
        found = []
        for source in tensors:
            place = dim - (len(_shape(node)) - len(_shape(source)))
            broadcast = place < 0 or (_shape(source)[place] == 1 and _shape(node)[dim] != 1)
            found.append((source, None if broadcast else (place, inner)))
        return found

    def _through_reshape(self, node: Node, dim: int) -> Axis:
        """A dimension of outputs stays one if as many elements follow it, or if what follows is moved into it."""
        before, after = _shape(node.args[0]), _shape(node)
        lead = math.prod(after[:dim])
        for d, size in enumerate(before):
            if math.prod(before[:d]) == lead and size % self.outputs == 0 and size > 0:
                return d, size // self.outputs
        raise Unsupported("a view mixes the outputs of the weight", node)

    def shape(self, node: Node, rows: int) -> tuple[int, ...]:
        """The shape that `node` has when the weight has `rows` outputs."""
        axis = self.axes.get(node)
        sizes = list(_shape(node))
        if axis is not None:
            sizes[axis[0]] = rows * axis[1]
        return tuple(sizes)

    def evaluate(self, given: dict[Node, Tensor], rows: int) -> Tensor:
        """The weight with `rows` outputs, for these values of the leaves (constants are made here)."""
        values = dict(given)
        for leaf in self.leaves:
            if leaf not in values:
                values[leaf] = _call(leaf, {})
        for node in self.nodes:
            source = values[node.all_input_nodes[0]]
            if is_cast(node):
                dtype = val(node).dtype
                values[node] = source.to(torch.float64 if dtype.is_floating_point else dtype)
            elif is_reshape(node):
                values[node] = source.reshape(self.shape(node, rows))
            elif is_call(node, aten.expand):
                values[node] = source.expand(self.shape(node, rows))
            elif is_call(node, aten.slice.Tensor, *COPIES):
                values[node] = source
            else:
                values[node] = _call(node, values)
            if tuple(values[node].shape) != self.shape(node, rows):
                raise Unsupported("the op's shape does not follow the number of outputs", node)
        return values[self.weight]

    def signature(self, given: Iterable[Node]) -> tuple[Any, ...]:
        """What evaluation depends on: ops, literals, shapes, dtypes and wiring, not the nodes' names."""
        index = {node: i for i, node in enumerate((*self.leaves, *self.nodes))}

        def plain(value: Any) -> Any:
            if isinstance(value, Node):
                return ("node", index[value])
            if isinstance(value, (list, tuple)):
                return tuple(map(plain, value))
            return str(value) if isinstance(value, (torch.device, torch.layout)) else value

        def described(node: Node) -> tuple[Any, ...]:
            call = () if node in self.leaves and not is_call(node, *CREATION) else (str(node.target), plain(node.args))
            return (*call, tuple(sorted((k, plain(v)) for k, v in node.kwargs.items())) if call else (),
                    _shape(node), val(node).dtype, self.axes.get(node))  # fmt: skip

        return (*(described(node) for node in index), *(index[node] for node in given), index[self.weight])


def _call(node: Node, values: dict[Node, Tensor]) -> Tensor:
    """Run the op of `node` on the CPU, floats in float64."""

    def computed(argument: Any) -> Any:
        return torch.float64 if argument in FLOATS else argument

    args = torch.fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = {k: computed(v) for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
    kwargs = torch.fx.node.map_arg(kwargs, lambda n: values[n])
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.to(torch.float64) if result.dtype.is_floating_point else result


def integer_range(node: Node) -> tuple[int, int]:
    """Bounds on an integer node's values for any input, by interval arithmetic over the ops that made it."""
    info = torch.iinfo(val(node).dtype)
    full = (info.min, info.max)
    if is_reshape(node) or is_permute(node) or is_cast(node) or is_call(node, aten.expand, *COPIES):
        source = node.args[0]
        if isinstance(source, Node) and val(source).dtype in INTEGERS:
            return _clip(integer_range(source), full)
    numbers = [a for a in node.args if isinstance(a, int)]
    if len(node.args) == 2 and len(numbers) == 1 and isinstance(node.args[0], Node) and not node.kwargs:
        number = numbers[0]
        if is_call(node, aten.bitwise_and, aten.__and__) and number >= 0:
            return 0, number
        if is_call(node, aten.add, aten.sub):
            low, high = integer_range(node.args[0])
            step = number if is_call(node, aten.add) else -number
            return _clip((low + step, high + step), full)
        if is_call(node, aten.remainder) and number > 0:
            return 0, number - 1
    return full


def _clip(found: tuple[int, int], full: tuple[int, int]) -> tuple[int, int]:
    """Bounds that overflow the dtype say nothing: the value may have wrapped around."""
    return found if full[0] <= found[0] and found[1] <= full[1] else full
