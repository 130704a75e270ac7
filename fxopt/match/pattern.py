"""Patterns: a plain PyTorch function, traced once into a graph with alternatives.

    def pattern(x, w, eps: float):
        h = upcast(x)
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        n = cast("round_to", n)
        return OneOf("weight", plain=n * w, none=n)

Parameters are variables. One annotated `float` or `int` stands for a number (a Python number, a symbolic one or a 0-d
tensor); any other stands for a tensor. A parameter whose name begins with an underscore is a wildcard: it must be the
same tensor wherever it is used, and is left out of the bindings.

Alternatives become nodes of private ops, so that the function is traced once, not once a combination:

    OneOf(tag, a=u, b=v)    u or v, all computed beforehand and of one shape; tag -> "a" or "b"
    Opt(tag, u, v)          u if it is there, else v; tag -> "yes" or "no"
    cast(tag, u)            u, possibly cast to a floating dtype; tag -> that dtype, or None
    upcast(u)               u in at least float32

Number variables are recognised by their value in the trace. To be proof against collisions the function is traced twice
with different values, and a literal is a variable only if it has the variable's value both times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.graph.query import arguments, from_end, val
from fxopt.match.spelling import DIMENSIONS, PRIVATE


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `upcast` casts to."""
    return torch.promote_types(dtype, torch.float32)


_library = torch.library.Library(PRIVATE, "DEF")
_library.define("one_of(str tag, str[] names, Tensor[] values) -> Tensor")
_library.define("cast(str tag, Tensor value) -> Tensor")
_library.define("upcast(Tensor value) -> Tensor")
_library.impl("one_of", lambda tag, names, values: values[0].clone(), "CompositeExplicitAutograd")
_library.impl("cast", lambda tag, value: value.clone(), "CompositeExplicitAutograd")
_library.impl("upcast", lambda value: value.to(at_least_float32(value.dtype), copy=True), "CompositeExplicitAutograd")
_ops = getattr(torch.ops, PRIVATE)

ONE_OF = _ops.one_of.default
CAST = _ops.cast.default
UPCAST = _ops.upcast.default

#: a tensor variable's shape while a pattern is traced, unless the pattern's author gives another
SHAPE = (2, 3, 8)

_FLOATS = (0.7310585786, 0.2689414214)
_INTS = (7919, 6091)

#: arguments that hold sizes; a size traced into a pattern means nothing on another model's shapes
_SIZES = {"size", "shape", "sizes", "repeats"}


class PatternError(ValueError):
    """A pattern can't be used; the message says what to write instead."""


def OneOf(tag: str, **alternatives: Tensor) -> Tensor:
    """Any of the alternatives (already computed, of one shape), tried in order; `tag` -> the name of the one found.

    `match.tags[tag]` is where a fusion reads it. Raises PatternError for fewer than two, or where their shapes differ.
    """
    shapes = {tuple(v.shape) for v in alternatives.values()}
    if len(alternatives) < 2 or len(shapes) > 1:
        raise PatternError(f"OneOf({tag!r}, ...) needs two or more alternatives of one shape, not {sorted(shapes)}")
    return ONE_OF(tag, list(alternatives), list(alternatives.values()))


def Opt(tag: str, present: Tensor, absent: Tensor) -> Tensor:
    """`present` if the graph has it (`tag` -> "yes"), else `absent` (`tag` -> "no").

    Both are of one shape; raises PatternError where they are not.
    """
    return OneOf(tag, yes=present, no=absent)


def cast(tag: str, value: Tensor) -> Tensor:
    """`value`, cast to any floating dtype that can't hold it exactly (`tag` -> the dtype) or not (`tag` -> None).

    A cast that loses nothing is seen through anyway, and needs no `cast` in the pattern.
    """
    return CAST(tag, value)


def upcast(value: Tensor) -> Tensor:
    """`value` in float32, or float64 if it is that; the graph must compute what follows in that dtype."""
    return UPCAST(value)


def alternatives(node: Node) -> tuple[str, list[str], list[Node]]:
    """Of a OneOf node: its tag, the alternatives' names and values."""
    tag, names, values = node.args
    return tag, names, values  # type: ignore[return-value]


def optional_cast(node: Node) -> tuple[str, Node]:
    """Of a `cast` node: its tag and what is cast."""
    tag, value = node.args
    return tag, value  # type: ignore[return-value]


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its graph, its variables by name, and the nodes it returns."""

    graph: Graph
    variables: dict[str, Node]
    outputs: tuple[Node, ...]

    @property
    def root(self) -> Node:
        """The first output."""
        return self.outputs[0]


def trace(function: Callable[..., Any], shapes: Mapping[str, Sequence[int]] | None = None) -> Pattern:
    """Trace a pattern function. `shapes` gives tensor variables another shape than (2, 3, 8) for the trace.

    Raises PatternError where a number variable is used other than directly, where a size is traced in, where a tensor
    is created, or where an output does not lie on the way to the first one.
    """
    parameters = inspect.signature(function).parameters
    scalars = {name: _scalar_type(p) for name, p in parameters.items()}
    traced = [_trace(function, scalars, dict(shapes or {}), attempt) for attempt in (0, 1)]
    first, second = (list(t.graph.nodes) for t in traced)
    if [n.target for n in first if n.op != "output"] != [n.target for n in second if n.op != "output"]:
        raise PatternError("the pattern takes another path for another number; write each path as an alternative")
    variables = dict(zip(parameters, (n for n in first if n.op == "placeholder"), strict=True))
    for name, kind in scalars.items():
        if kind is not None:
            variables[name].meta["val"] = _magic(kind, name, scalars, 0)
    for a, b in zip(first, second, strict=True):
        if a.op == "get_attr":
            raise PatternError("the pattern creates a tensor; make it a variable, or use a Python number")
        if a.op == "call_function":
            a.args = tuple(_variable(x, y, a, variables, scalars) for x, y in zip(a.args, b.args, strict=True))
            a.kwargs = {k: _variable(x, b.kwargs[k], a, variables, scalars) for k, x in a.kwargs.items()}
            _count_from_end(a)
    returned = traced[0].graph.output_node().args[0]
    outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    _check_outputs(outputs)
    return Pattern(traced[0].graph, variables, outputs)


def _trace(
    function: Callable[..., Any],
    scalars: Mapping[str, type | None],
    shapes: Mapping[str, Sequence[int]],
    attempt: int,
) -> GraphModule:
    with _disable_current_modes(), torch.no_grad():
        mode = FakeTensorMode()
        with mode:
            args = [
                torch.empty(tuple(shapes.get(name, SHAPE)), device="cpu", dtype=torch.float32)
                if kind is None
                else _magic(kind, name, scalars, attempt)
                for name, kind in scalars.items()
            ]

        def unbound(*values: Any) -> Any:  # the tracer counts the `self` of a method as an argument
            return function(*values)

        return make_fx(unbound, tracing_mode="fake", pre_dispatch=True)(*args)


def _scalar_type(parameter: inspect.Parameter) -> type | None:
    annotation = parameter.annotation
    return {"float": float, "int": int, float: float, int: int}.get(annotation)


def _magic(kind: type, name: str, scalars: Mapping[str, type | None], attempt: int) -> Any:
    place = list(scalars).index(name)
    return _INTS[attempt] + 2 * place if kind is int else _FLOATS[attempt] * (1 + 0.01 * place)


def _variable(a: Any, b: Any, node: Node, variables: Mapping[str, Node], scalars: Mapping[str, type | None]) -> Any:
    """Argument `a` of the first trace (`b` in the second), with number variables put in place of their values."""
    if isinstance(a, (list, tuple)):
        return type(a)(_variable(x, y, node, variables, scalars) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or not isinstance(a, (int, float)):
        return a
    for name, kind in scalars.items():
        if kind is not None and a == _magic(kind, name, scalars, 0) and b == _magic(kind, name, scalars, 1):
            return variables[name]
    if a != b:
        raise PatternError(f"{node.name} uses a number computed from a variable; use the variable itself")
    return a


def _count_from_end(node: Node) -> None:
    """Count the dimensions among the arguments from the end, so that they mean the same at any rank."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target.namespace == PRIVATE:  # type: ignore[union-attr]
        return
    given = arguments(node)
    if not node.all_input_nodes:
        raise PatternError(f"{node.name} creates a tensor; make it a variable, or use a Python number")
    for name, value in given.items():
        if name in _SIZES and value:
            raise PatternError(
                f"{node.name} has sizes of the trace in it ({name}={value}); use unsqueeze, transpose or flatten"
            )
    tensor = next((val(v) for v in given.values() if isinstance(val(v), Tensor)), None)
    rank = tensor.dim() + (node.target is torch.ops.aten.unsqueeze.default) if tensor is not None else 0
    names = [argument.name for argument in schema.arguments]

    def counted(name: str, value: Any) -> Any:
        if name not in DIMENSIONS or rank == 0:
            return value
        if isinstance(value, (list, tuple)):
            return [from_end(d, rank) for d in value]
        return from_end(value, rank) if isinstance(value, int) else value

    node.args = tuple(counted(name, value) for name, value in zip(names, node.args, strict=False))
    node.kwargs = {name: counted(name, value) for name, value in node.kwargs.items()}


def _check_outputs(outputs: tuple[Any, ...]) -> None:
    reached: set[Node] = set()
    work = [outputs[0]]
    while work:
        node = work.pop()
        if isinstance(node, Node) and node not in reached:
            reached.add(node)
            work += node.all_input_nodes
    for output in outputs:
        if output not in reached or output.op == "placeholder":
            raise PatternError("a pattern must return computed values that lie on the way to the first one")
