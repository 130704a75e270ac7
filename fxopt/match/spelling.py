"""One reading for many spellings: x*x, x.square() and x.pow(2) are all square(x).

`read` gives a node's op, tensor and scalar operands, and remaining attributes in one canonical form. Patterns and model
graphs are read by the same function, so a pattern is written once and matches every spelling. The equivalences:

    pow(x, 2)  x * x                       square(x)
    pow(x, 0.5)                            sqrt(x)
    pow(x, -0.5)  1 / sqrt(x)              rsqrt(x)
    pow(x, -1)  1 / x                      reciprocal(x)
    sum(x, d) / n  sum(x, d) * (1 / n)     mean(x, d), where n is the number of elements summed
    x / c                                  x * (1 / c), for a number c
    mean(x, d).unsqueeze(d)                mean(x, d, keepdim=True)
    rsub(x, y)                             sub(y, x)
    var(x, d, unbiased=False)              var(x, d, correction=0)
    t, mT, transpose, movedim, permute     permute, as an order of dimensions counted from the end

`source` sees through what changes no value: widening casts, copies, reshapes to the same shape, multiplication by 1.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import (
    CASTS,
    COPIES,
    PERMUTES,
    RESHAPES,
    arguments,
    from_end,
    is_cast,
    is_copy,
    is_reshape,
    is_widening_cast,
    permutation,
    users,
    val,
)
from fxopt.graph.symbols import known_equal, same_shape

#: other names of the same op
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "absolute": "abs",
    "negative": "neg",
}

_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne"} | {
    f"{kind}_{op}" for kind in ("bitwise", "logical") for op in ("and", "or", "xor")
}

#: ops that take rows or columns together
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "all", "any"}

#: attributes that are dimensions
DIMENSIONS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "source", "destination"}

_POWERS = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}

#: which raw ops a canonical op can begin with, where that is more than its own name
_BEGINNINGS = {
    "square": ("square", "pow", "mul"),
    "sqrt": ("sqrt", "pow"),
    "rsqrt": ("rsqrt", "pow", "sqrt"),
    "reciprocal": ("reciprocal", "pow", "div"),
    "mean": ("mean", "sum"),
    "sub": ("sub", "rsub"),
    "permute": tuple(sorted({str(target._schema.name).split("::")[-1] for target in PERMUTES})),
    "cast": tuple(sorted({str(target._schema.name).split("::")[-1] for target in CASTS})),
    "maximum": ("maximum", "max"),
    "minimum": ("minimum", "min"),
}


@dataclass(frozen=True)
class Call:
    """A node in canonical form. `inner` are further nodes that this one reading takes in (the sqrt in 1/sqrt)."""

    op: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    node: Node | None = None
    inner: tuple[Node, ...] = ()

    @property
    def commutative(self) -> bool:
        """Whether the first two operands can be exchanged."""
        return self.op in _COMMUTATIVE and self.attributes.get("alpha", 1) == 1


def source(node: Any) -> Node | None:
    """What `node` is the same value as, one step back; None if it computes something."""
    if not isinstance(node, Node) or node.op != "call_function" or not _may_be_seen_through(node.target):
        return None
    before = node.args[0] if node.args else None
    if not isinstance(before, Node) or not isinstance(val(node), Tensor) or not isinstance(val(before), Tensor):
        return None
    if getattr(node.target, "namespace", "") == PRIVATE:
        return before if _name(node.target) == f"{PRIVATE}::upcast" else None
    if is_copy(node) or is_widening_cast(node):
        return before
    name = _name(node.target)
    if name == "mul" and _is_number(node.args[1]) and node.args[1] == 1 and val(node).dtype == val(before).dtype:
        return before
    if (is_reshape(node) or name in ("expand", "expand_as")) and same_shape(val(before).shape, val(node).shape):
        return before
    return None


@functools.lru_cache(maxsize=4096)
def _may_be_seen_through(target: Any) -> bool:
    """Whether a call of `target` can be the same value as its first argument."""
    named = _name(target) in ("mul", "expand", "expand_as")
    return named or getattr(target, "namespace", "") == PRIVATE or target in COPIES | CASTS | RESHAPES


def sources(node: Any) -> list[Any]:
    """`node` and all that it is the same value as, the last one computed or given."""
    chain = [node]
    while (before := source(chain[-1])) is not None:
        chain.append(before)
    return chain


def origin(node: Any) -> Any:
    """The value behind `node`: see-through nodes stripped."""
    while (before := source(node)) is not None:
        node = before
    return node


#: namespace of the ops that patterns are written with
PRIVATE = "fxopt_pattern"


def read(node: Node) -> Call:
    """The canonical form of a call. Nodes that call no ATen op read as their target's name with their arguments."""
    if is_cast(node):
        return Call("cast", (node.args[0],), {"dtype": val(node).dtype}, node)
    if node.target is operator.getitem:
        return Call("getitem", (node.args[0],), {"index": node.args[1]}, node)
    if not isinstance(node.target, torch._ops.OpOverload):
        name = f"python {getattr(node.target, '__name__', node.target)}"  # size arithmetic: operator.mul is no aten.mul
        return Call(name, tuple(node.args), dict(node.kwargs), node)
    order = permutation(node)
    if order is not None:
        return Call("permute", (node.args[0],), {"order": _moved(order)}, node)
    given = arguments(node)
    kinds = _kinds(node.target)
    operands = tuple(given[name] for name, operand in kinds if operand)
    attributes = {name: given[name] for name, operand in kinds if not operand}
    if _name(node.target) in REDUCTIONS:
        attributes = {"dim": None, "keepdim": False} | attributes
    if _name(node.target) in ("var", "std"):
        attributes["correction"] = _correction(given)
        attributes.pop("unbiased", None)
        operands = operands[:1]
    return _respell(Call(_name(node.target), operands, attributes, node))


def _correction(given: dict[str, Any]) -> Any:
    if "unbiased" in given:
        return int(given["unbiased"])
    return 1 if given.get("correction") is None else given["correction"]


def _respell(call: Call) -> Call:
    op, operands, node = call.op, call.operands, call.node
    assert node is not None
    if op == "pow" and _is_number(operands[1]) and operands[1] in _POWERS:
        call = Call(_POWERS[operands[1]], operands[:1], {}, node)
    elif op == "rsub" and call.attributes.get("alpha", 1) == 1:
        call = Call("sub", (operands[1], operands[0]), call.attributes, node)
    elif op == "mul":
        call = _respell_mul(call)
    elif op == "div" and call.attributes.get("rounding_mode") is None:
        call = _respell_div(Call("div", operands, {}, node))
    elif op == "unsqueeze":
        call = _respell_unsqueeze(call)
    if call.op == "reciprocal":
        root = origin(call.operands[0])
        if isinstance(root, Node) and root.op == "call_function" and (inner := read(root)).op == "sqrt":
            return Call("rsqrt", inner.operands, {}, node, (root, *inner.inner, *_between(call.operands[0])))
    return call


def _respell_mul(call: Call) -> Call:
    a, b = call.operands[:2]
    if isinstance(a, Node) and isinstance(b, Node):
        if origin(a) is origin(b):
            return Call("square", (a,), {}, call.node, (*_between(a), *_between(b)))
        return call
    if _is_number(a):
        a, b = b, a
    mean = _mean(a, lambda n: isinstance(n, int) and b == 1.0 / n) if _is_number(b) else None
    return mean(call.node) if mean is not None else Call("mul", (a, b), {}, call.node)


def _respell_div(call: Call) -> Call:
    a, b = call.operands[:2]
    if _is_number(a) and a == 1:
        return Call("reciprocal", (b,), {}, call.node)
    if isinstance(a, Node) and not isinstance(val(b), Tensor):
        mean = _mean(a, lambda n: known_equal(n, val(b)))
        if mean is not None:
            return mean(call.node)
        if _is_number(b) and b != 0 and val(a).dtype.is_floating_point:
            return Call("mul", (a, 1.0 / b), {}, call.node)
    return call


def _respell_unsqueeze(call: Call) -> Call:
    reduced = origin(call.operands[0])
    if not isinstance(reduced, Node) or reduced.op != "call_function" or not isinstance(val(reduced), Tensor):
        return call
    inner = read(reduced)
    dims = inner.attributes.get("dim")
    if inner.op in REDUCTIONS and inner.attributes.get("keepdim") is False and isinstance(dims, (int, list, tuple)):
        rank = val(inner.operands[0]).dim()
        wanted = [dims] if isinstance(dims, int) else list(dims)
        if len(wanted) == 1 and from_end(wanted[0], rank) == from_end(call.attributes["dim"], rank):
            attributes = inner.attributes | {"keepdim": True}
            return Call(inner.op, inner.operands, attributes, call.node, (reduced, *_between(call.operands[0])))
    return call


def _mean(total: Any, divides: Any) -> Any:
    """If `total` is a sum and `divides(number of elements summed)`: what makes the mean's Call from its node."""
    summed = origin(total)
    if not isinstance(summed, Node) or summed.op != "call_function" or _name(summed.target) not in ("sum", "unsqueeze"):
        return None
    call = read(summed)
    if call.op != "sum" or not val(summed).dtype.is_floating_point:
        return None
    shape = val(call.operands[0]).shape
    dims = call.attributes.get("dim")
    dims = range(len(shape)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    if not divides(math.prod(shape[d] for d in dims)):
        return None
    inner = (summed, *call.inner, *_between(total))
    return lambda node: Call("mean", call.operands, call.attributes, node, inner)


def _between(node: Any) -> list[Node]:
    """The see-through nodes from `node` to its origin, the origin left out."""
    return sources(node)[:-1]


def consumers(node: Node) -> Iterator[Call]:
    """The calls that use `node`'s value, seen through casts and copies, each in every reading that takes it in."""
    for user in users(node):
        if user.op != "call_function":
            continue
        if source(user) is node:
            yield from consumers(user)
            if _name(user.target) != "unsqueeze":
                continue
        yield read(user)
        for outer in user.users:
            if outer.op == "call_function" and user in (call := read(outer)).inner:
                yield call
                for last in outer.users:
                    if last.op == "call_function" and outer in (further := read(last)).inner:
                        yield further


def beginnings(op: str) -> tuple[str, ...]:
    """Names of the raw ATen ops that a canonical op can begin with."""
    names = _BEGINNINGS.get(op, (op,))
    return (*names, *(alias for alias, name in _ALIASES.items() if name in names))


def canonical_attribute(name: str, value: Any, rank: int, op: str) -> Any:
    """An attribute in comparable form: dimensions counted from the end, a reduction's in ascending order."""
    if name not in DIMENSIONS or rank == 0:
        return tuple(value) if isinstance(value, list) else value
    if op == "unsqueeze":
        rank += 1
    if isinstance(value, int):
        value = from_end(value, rank)
        return (value,) if op in REDUCTIONS else value
    if op in REDUCTIONS and value in (None, [], ()):
        return tuple(range(-rank, 0))
    if isinstance(value, (list, tuple)):
        dims = [from_end(d, rank) for d in value]
        return tuple(sorted(dims)) if op in REDUCTIONS else tuple(dims)
    return value


def _moved(order: tuple[int, ...]) -> tuple[int, ...]:
    """A permutation without its leading identity, counted from the end, so that rank does not matter."""
    rank = len(order)
    start = next((i for i, d in enumerate(order) if i != d), rank)
    return tuple(d - rank for d in order[start:])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.lru_cache(maxsize=4096)
def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        return getattr(target, "__name__", str(target))
    namespace, name = str(schema.name).split("::")
    if namespace != "aten":
        return str(schema.name)
    if name in ("max", "min") and schema.overload_name == "other":
        return name + "imum"
    return _ALIASES.get(name, name)


@functools.cache
def _kinds(target: torch._ops.OpOverload) -> tuple[tuple[str, bool], ...]:
    """(argument name, whether it is an operand: a tensor, tensors or a real scalar) for each argument of an op."""
    found = []
    for argument in target._schema.arguments:
        kind = str(argument.type)
        operand = "Tensor" in kind or kind in ("number", "float", "Optional[number]", "Optional[float]")
        found.append((argument.name, operand and argument.name != "alpha"))
    return tuple(found)
