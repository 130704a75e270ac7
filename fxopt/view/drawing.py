"""A graph as data that can be drawn: nodes with their values, source lines and modules, each string stored once.

Beside what is drawn, every node has a cost (`cost.py`). What a rewrite saves is the difference: values that the fused
op keeps to itself need not be written and read back, and now and then arithmetic is saved too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import module_path, source_line, val
from fxopt.rewrite.fusion import Step
from fxopt.view.cost import Flops, traffic


@dataclass(frozen=True)
class DrawnNode:
    """One node: its op, the indices of the nodes that it reads, its value in words, and where it comes from."""

    name: str
    op: str
    inputs: tuple[int, ...]
    value: str  # "bf16[2, s0, 64]"; "" where it is no tensor and no number
    module: str
    source: str


@dataclass(frozen=True)
class Drawing:
    """A graph in columns, in program order; `ops`, `values`, `modules` and `sources` are indices into `strings`."""

    names: tuple[str, ...] = ()
    inputs: tuple[tuple[int, ...], ...] = ()
    ops: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    modules: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[DrawnNode]:
        for i, name in enumerate(self.names):
            columns = (self.ops, self.values, self.modules, self.sources)
            op, value, module, source = (self.strings[column[i]] for column in columns)
            yield DrawnNode(name, op, self.inputs[i], value, module, source)


@dataclass(frozen=True)
class Saving:
    """What a rewrite saves, as expressions of the symbolic dimensions ("4*s0 + 64")."""

    bytes_before: str  # read and written by the nodes replaced, each by itself
    bytes_after: str
    bytes_saved: str
    flops_before: str
    flops_after: str  # of the fused op's reference: an implementation may do less (tiles that a mask leaves out)
    flops_saved: str
    example: int | None = None  # bytes saved at the sizes of the first call, where they are all known
    example_before: int | None = None  # bytes moved before, at those sizes


@dataclass
class Sketch:
    """A drawing in the making: what is drawn, and the cost of each node as an expression."""

    drawing: Drawing
    bytes: dict[str, sympy.Expr] = field(default_factory=dict)
    flops: dict[str, sympy.Expr] = field(default_factory=dict)
    dims: dict[str, str] = field(default_factory=dict)
    hints: dict[sympy.Symbol, int] = field(default_factory=dict)

    def saving(self, after: Sketch, step: Step) -> Saving | None:
        """What `step`, between this graph and `after`, saves; None where its nodes are not in both."""
        if not step.applied or not all(name in self.bytes for name in step.replaced):
            return None
        if not all(name in after.bytes for name in step.made):
            return None  # another rewrite took what this one made
        old = sympy.expand(sympy.Add(*(self.bytes[name] for name in step.replaced)))
        new = sympy.expand(sympy.Add(*(after.bytes[name] for name in step.made)))
        work = sympy.expand(sympy.Add(*(self.flops[name] for name in step.replaced)))
        less = sympy.expand(sympy.Add(*(after.flops[name] for name in step.made)))
        saved = sympy.expand(old - new)
        example, example_before = saved.subs(self.hints), old.subs(self.hints)
        return Saving(
            *(str(old), str(new), str(saved), str(work), str(less), str(sympy.expand(work - less))),
            example=int(example) if example.is_Integer else None,
            example_before=int(example_before) if example_before.is_Integer else None,
        )


def sketch(module: GraphModule) -> Sketch:
    """The graph of `module`, to be drawn."""
    nodes = list(module.graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    strings: dict[str, int] = {"": 0}

    def kept(words: str | None) -> int:
        return strings.setdefault(words or "", len(strings))

    drawing = Drawing(
        names=tuple(node.name for node in nodes),
        inputs=tuple(tuple(index[source] for source in node.all_input_nodes) for node in nodes),
        ops=tuple(kept(_op(node)) for node in nodes),
        values=tuple(kept(describe(val(node))) for node in nodes),
        modules=tuple(kept(module_path(node)) for node in nodes),
        sources=tuple(kept(source_line(node)) for node in nodes),
        strings=tuple(strings),
    )
    made = Sketch(drawing)
    work = Flops()
    for node in nodes:
        made.bytes[node.name] = traffic(node)
        made.flops[node.name] = work.of(node)
    for size in sorted(_symbols(nodes), key=str):
        made.dims[str(size)] = _meaning(size)
        if size.node.has_hint():
            made.hints[size.node.expr] = int(size.node.hint)
    return made


def _op(node: Node) -> str:
    if node.op != "call_function":
        return node.op if node.op in ("placeholder", "output") else f"{node.op} {node.target}"
    if node.target is operator.getitem:
        return f"item {node.args[1]}"
    return str(node.target).removeprefix("aten.")


def describe(value: Any) -> str:
    """A value in words: dtype and shape of a tensor, the expression of a symbolic number."""
    if isinstance(value, Tensor):
        dtype = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(describe, value))})"
    return str(value) if isinstance(value, (bool, int, float, SymInt, SymFloat, SymBool)) else ""


_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def _symbols(nodes: Sequence[Node]) -> list[SymInt]:
    """The symbolic dimensions of the nodes' values, each once."""
    found: dict[sympy.Symbol, SymInt] = {}
    for node in nodes:
        for leaf in tree_leaves(val(node)):
            for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, size)
    return list(found.values())


def _meaning(size: SymInt) -> str:
    """What a symbolic dimension is: where Dynamo read it from, and its size at the first call."""
    environment, symbol = size.node.shape_env, size.node.expr
    known = getattr(environment, "var_to_sources", {}).get(symbol, ())
    names = [n() if callable(n := source.name) else str(n) for source in known[:1]]
    hint = size.node.hint if size.node.has_hint() else None
    return ", ".join([*names, f"{hint} at the first call"] if hint is not None else [*names, "known only at run time"])
