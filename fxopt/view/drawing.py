"""A graph as data that can be drawn: nodes with their values, source lines and modules, each string stored once.

Beside what is drawn, every node has a cost as an expression of the graph's symbolic dimensions:

    bytes   what it reads and writes when it runs by itself; a view of another value moves nothing
    FLOPs   2 M N K for a product; one an element for pointwise ops, one an element read for reductions

What a rewrite saves is the difference of the bytes: values that the fused op keeps to itself need not be written and
read back. Its arithmetic stays what it was, so FLOPs are told once, for the nodes replaced.
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

from fxopt.graph.query import is_mutable, module_path, source_line, storage, val
from fxopt.rewrite.fusion import Step


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
    flops: str  # of the nodes replaced
    example: int | None = None  # bytes saved at the sizes of the first call, where they are all known


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
        flops = sympy.expand(sympy.Add(*(self.flops[name] for name in step.replaced)))
        saved = sympy.expand(old - new)
        example = saved.subs(self.hints)
        return Saving(str(old), str(new), str(saved), str(flops), int(example) if example.is_Integer else None)


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
    for node in nodes:
        made.bytes[node.name] = traffic(node)
        made.flops[node.name] = flops(node)
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


def _size(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(int(size))


def _elements(value: Any) -> sympy.Expr:
    return sympy.Mul(*(_size(size) for size in value.shape)) if isinstance(value, Tensor) else sympy.Integer(0)


def _bytes(value: Any) -> sympy.Expr:
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sympy.Add(*(_elements(leaf) * leaf.element_size() for leaf in found))


def traffic(node: Node) -> sympy.Expr:
    """The bytes that a node reads and writes if it runs by itself."""
    if node.op != "call_function" or node.target is operator.getitem:
        return sympy.Integer(0)
    sources = [val(source) for source in node.all_input_nodes]
    read = {key for value in sources if (key := storage(value)) is not None}
    if not is_mutable(node) and storage(val(node)) in read:
        return sympy.Integer(0)
    return sympy.Add(_bytes(val(node)), *map(_bytes, sources))


#: products, and the dimension of their first (for addmm and its like: second) tensor that is summed over
_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "_int_mm": 0, "_scaled_mm": 0}

_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "var", "std", "logsumexp", "prod", "argmax", "cumsum"}

#: FLOPs an element of what has more than one
_ELEMENTWISE = {"softmax": 5, "_softmax": 5, "log_softmax": 5, "layer_norm": 8, "rms_norm": 4, "group_norm": 8}


def flops(node: Node) -> sympy.Expr:
    """The floating-point operations of a node, as far as they can be told from shapes."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    operands = [value for source in node.all_input_nodes if isinstance(value := val(source), Tensor)]
    out = val(node)
    if name in _PRODUCTS and len(operands) > _PRODUCTS[name]:
        return 2 * _elements(out) * _size(operands[_PRODUCTS[name]].shape[-1])
    if name == "scaled_dot_product_attention" and len(operands) >= 3:
        q, k = operands[:2]
        return 2 * _elements(q) * _size(k.shape[-2]) + 2 * _elements(out) * _size(k.shape[-2])
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name] * _elements(out)
    if name in _REDUCTIONS:
        return sympy.Add(*map(_elements, operands))
    if isinstance(out, Tensor) and out.is_floating_point() and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _elements(out)
    return sympy.Integer(0)


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
