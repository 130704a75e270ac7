"""Repeated layers, compiled once: each repetition becomes a call of one shared body (`invoke_subgraph`).

    x = norm(x); x = x + mlp(x, w0)            x = body(x, w0)
    x = norm(x); x = x + mlp(x, w1)     ->     x = body(x, w1)      body(x, w) = x + mlp(norm(x), w)
    ...                                        ...

Inductor compiles the body once, whatever the depth. Weights and caches are handed in as arguments, as inputs of the
graph, so that which inputs are static stays as it was. What a body may not contain (writes to a cache, random numbers)
stays in the outer graph and cuts the layer there. The graph given is left alone: where anything goes wrong it is still
there to be compiled as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node, Proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from fxopt.graph.query import is_tensor, module_path, storage, val
from fxopt.graph.symbols import hint
from fxopt.lower.outline_cut import best_cut
from fxopt.lower.outline_labels import (
    Form,
    Labels,
    Stretch,
    differentiable,
    is_size,
    may_alias,
    stays_outside,
    stretch,
)
from fxopt.lower.outline_memory import PREFIX, SIZE
from fxopt.lower.outline_periods import Run, periodic_runs

#: fewer repetitions are not worth a body: plain Inductor is as fast to compile
REPEATS = 4
#: shorter stretches are not worth a call
NODES = 8

_KEPT = ("stack_trace", "nn_module_stack")


@dataclass(frozen=True)
class Outlined:
    """One body that several layers share."""

    name: str
    calls: int  # how many stretches of the graph it stands for
    nodes: int  # in the body
    operands: int  # tensors and sizes that a call hands in
    results: int
    module: str | None  # where the first of the stretches comes from: "model.layers.0"


@dataclass(frozen=True)
class Outline:
    """A graph with its repetitions outlined: what was, and why what repeats was not."""

    module: GraphModule
    bodies: tuple[Outlined, ...] = ()
    objections: tuple[str, ...] = ()


def outline(module: GraphModule, *, at_least: int = REPEATS) -> Outline:
    """A graph in which stretches that repeat `at_least` times are calls of one body.

    `module` is not changed, but for the order of its nodes; it is the outline's own where nothing repeats. Every node
    that calls a function must have its value in `meta["val"]`.
    """
    _gather_items(module.graph)
    bodies: list[tuple[_Body, list[Stretch]]] = []
    objections: list[str] = []
    symbols = _symbol_values(module.graph)
    for group in _groups(module.graph, at_least):
        body = _Body(group[0], f"{PREFIX}{len(bodies)}", symbols)
        objection = body.objection()
        if objection is None:
            bodies.append((body, group))
        else:
            objections.append(f"{len(group)} repetitions of {len(group[0].nodes)} nodes: {objection}")
    if not bodies:
        return Outline(module, objections=tuple(objections))
    outlined = tuple(body.summary(len(group)) for body, group in bodies)
    return Outline(_Builder(module, bodies).build(), outlined, tuple(objections))


def _gather_items(graph: Graph) -> None:
    """Put what is taken out of several results right behind the call: nothing is cut in between then."""
    last: dict[Node, Node] = {}  # call -> the last of its items so far
    for item in graph.find_nodes(op="call_function", target=operator.getitem):
        call = item.args[0]
        if isinstance(call, Node):
            behind = last.get(call, call)
            if item.prev is not behind:
                behind.append(item)
            last[call] = item


def _groups(graph: Graph, at_least: int) -> Iterator[list[Stretch]]:
    """Groups of disjoint stretches of one form, each group `at_least` long."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and not is_size(n)]
    labels = Labels(nodes, differentiable(graph))
    for run in periodic_runs([labels.numbers[n] for n in nodes], at_least=at_least, shortest=NODES):
        for pieces in _pieces(nodes, run, at_least):
            stretches = [stretch(piece, labels) for piece in pieces]
            yield from _isomorphic(stretches, at_least)


def _pieces(nodes: Sequence[Node], run: Run, at_least: int) -> Iterator[list[Sequence[Node]]]:
    """The run cut into pieces that should be isomorphic; one list of pieces for each part of a period."""
    within = nodes[run.start : run.stop]
    walls = [i for i in range(run.period) if stays_outside(within[i])]
    if not walls:
        offset = best_cut(within, run.period, at_least)
        starts = range(offset, len(within) - run.period + 1, run.period)
        yield [within[s : s + run.period] for s in starts]
        return
    for wall, after in zip(walls, [*walls[1:], walls[0] + run.period], strict=True):
        if after - wall - 1 >= NODES:
            starts = range(wall + 1 - run.period, len(within), run.period)
            pieces = [within[max(s, 0) : s + after - wall - 1] for s in starts if s + after - wall - 1 > 0]
            yield [piece for piece in pieces if len(piece) == after - wall - 1]


def _isomorphic(stretches: Sequence[Stretch], at_least: int) -> Iterator[list[Stretch]]:
    counts: Counter[Form] = Counter(s.form for s in stretches)
    for form, count in counts.items():
        if count >= at_least:
            yield [s for s in stretches if s.form == form]


class _Builder:
    """Builds the outlined copy of a graph."""

    def __init__(self, module: GraphModule, bodies: Sequence[tuple[_Body, list[Stretch]]]) -> None:
        self.module = module
        self.bodies = bodies
        self.graph = Graph()
        self.made: dict[Node, Node] = {}  # node of the given graph -> node of the new one
        self.symbols: dict[sympy.Symbol, Node] = {}  # size symbol -> node of the new graph that is its value
        self.homes = _homes(module.graph)

    def build(self) -> GraphModule:
        ends: dict[Node, tuple[_Body, Stretch]] = {}
        inside: set[Node] = set()
        for body, group in self.bodies:
            for one in group:
                ends[one.nodes[-1]] = (body, one)
                inside.update(one.nodes)
        for node in self.module.graph.nodes:
            if node not in inside:
                self._copy(node)
            elif node in ends:
                self._call(*ends[node])
        named = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        root: dict[str, Any] = {body.name: body.module for body, _ in self.bodies}
        root |= {name: getattr(self.module, name) for name in named - set(root)}
        built = GraphModule(root, self.graph)
        built.meta.update(self.module.meta)
        if hasattr(self.module, "_param_name_to_source"):
            built._param_name_to_source = self.module._param_name_to_source
        self.graph.lint()
        return built

    def _copy(self, node: Node) -> None:
        if is_size(node) and any(n not in self.made for n in node.all_input_nodes):
            # the size of a tensor that is now within a body: computed from its symbols
            for symbol in _symbols(val(node)):
                self._size(symbol)
            self.made[node] = _from_symbols(self.graph, val(node), self.symbols)
            return
        copy = self.graph.node_copy(node, self.made.__getitem__)
        copy.meta.pop("from_node", None)  # AOTAutograd copies the whole chain for every node, twice
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        self.made[node] = copy
        value = val(node)
        if isinstance(value, SymInt) and isinstance(value.node.expr, sympy.Symbol):
            self.symbols.setdefault(value.node.expr, copy)

    def _call(self, body: _Body, one: Stretch) -> None:
        sizes = [self._size(s) for s in body.symbols]
        operands = [self.made[n] for n in one.operands]
        attribute = self.graph.get_attr(body.name)
        invoke = torch.ops.higher_order.invoke_subgraph
        call = self.graph.call_function(invoke, (attribute, body.name, *operands, *sizes))
        fresh = [one.nodes[i] for i in body.results]
        for i, node in enumerate(fresh):
            self.made[node] = self.graph.call_function(operator.getitem, (call, i))
        for i in body.views:
            self.made[one.nodes[i]] = self.graph.node_copy(one.nodes[i], self.made.__getitem__)

    def _size(self, symbol: sympy.Symbol) -> Node:
        """The node that is the symbol's value; where the graph has none yet, it is read off an input's shape."""
        if symbol not in self.symbols:
            placeholder, dim = self.homes[symbol]
            made = self.graph.call_function(torch.ops.aten.sym_size.int, (self.made[placeholder], dim))
            made.meta["val"] = val(placeholder).shape[dim]
            self.symbols[symbol] = made
        return self.symbols[symbol]


def _homes(graph: Graph) -> dict[sympy.Symbol, tuple[Node, int]]:
    """For each size symbol that is a dimension of an input: the input and the dimension."""
    homes: dict[sympy.Symbol, tuple[Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dim, size in enumerate(val(node).shape if isinstance(val(node), Tensor) else ()):
            if isinstance(size, SymInt) and isinstance(size.node.expr, sympy.Symbol):
                homes.setdefault(size.node.expr, (node, dim))
    return homes


class _Body:
    """The shared body of a group of stretches, made from one of them."""

    def __init__(self, one: Stretch, name: str, symbol_values: Mapping[sympy.Symbol, SymInt]) -> None:
        self.one, self.name, self.symbol_values = one, name, symbol_values
        inside = {node: i for i, node in enumerate(one.nodes)}
        self.results, self.views = self._split_results(inside)
        self.symbols = sorted({s for node in one.sizes for s in _symbols(val(node))}, key=str)
        self.module = self._build()

    def summary(self, calls: int) -> Outlined:
        operands = len(self.one.operands) + len(self.symbols)
        return Outlined(
            self.name, calls, len(self.one.nodes), operands, len(self.results), module_path(self.one.nodes[0])
        )

    def objection(self) -> str | None:
        """Why the stretches can't share this body, or None: what schemas don't say is seen in a run on fake tensors."""
        several = next((n for i in self.results if not is_tensor(n := self.one.nodes[i])), None)
        if several is not None:
            return f"the results of {several.name} are read one by one behind it"
        unknown = [s for s in self.symbols if s not in self.symbol_values]
        if unknown:
            return f"no node of the graph has the size {unknown[0]} as its value"
        if any(free_unbacked_symbols(val(n)) for n in self.one.operands):
            return "the size of an operand depends on data"
        # At the sizes of the first call, and apart from the graph's own: a guard that an op adds there, on the way to
        # its kernel, would make the compiled code serve fewer sizes.
        with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
            given = [_fresh(val(n)) for n in self.one.operands]
            sizes = [hint(self.symbol_values[s]) for s in self.symbols]
            results = Interpreter(self.module).run(*given, *sizes)
        seen = {storage(t) for t in given}
        for i, result in zip(self.results, results, strict=True):
            if storage(result) in seen:
                return f"{self.one.nodes[i].name} shares memory with an operand or another result"
            seen.add(storage(result))
        written = next((n for n, t in zip(self.one.operands, given, strict=True) if t._version), None)
        return f"{written.name} is written to" if written is not None else None

    def _split_results(self, inside: dict[Node, int]) -> tuple[list[int], list[int]]:
        """Which nodes the body returns, and which views of those are made anew behind the call, in order.

        A body may return neither its operands nor two views of one tensor.
        """
        returned: set[int] = set()
        views: set[int] = set()
        work = list(self.one.form.results)
        while work:
            i = work.pop()
            if i in returned or i in views:
                continue
            node = self.one.nodes[i]
            if may_alias(node):
                views.add(i)
                work += [inside[a] for a in node.all_input_nodes if a in inside]
            else:
                returned.add(i)
        return sorted(returned), sorted(views)

    def _build(self) -> GraphModule:
        graph = Graph()
        made: dict[Node, Node] = {}
        for i, operand in enumerate(self.one.operands):
            made[operand] = graph.placeholder(f"operand_{i}")
        symbols = {s: graph.placeholder(f"{SIZE}{s}") for s in self.symbols}

        def argument(node: Node) -> Node:
            if node not in made:
                made[node] = _from_symbols(graph, val(node), symbols)
            return made[node]

        for node in self.one.nodes:
            copy = graph.node_copy(node, argument)
            # No values: they are asked for requires_grad, and those of traced implementations don't know.
            copy.meta = {k: v for k, v in node.meta.items() if k in _KEPT}
            made[node] = copy
        graph.output(tuple(made[self.one.nodes[i]] for i in self.results))
        graph.lint()
        return GraphModule(torch.nn.Module(), graph)


def _symbols(value: Any) -> frozenset[sympy.Symbol]:
    return frozenset(value.node.expr.free_symbols) if isinstance(value, (SymInt, SymFloat, SymBool)) else frozenset()


def _symbol_values(graph: Graph) -> dict[sympy.Symbol, SymInt]:
    """The size symbols that some node has as its value."""
    values = (val(n) for n in graph.nodes if isinstance(val(n), SymInt))
    return {v.node.expr: v for v in values if isinstance(v.node.expr, sympy.Symbol)}


def _from_symbols(graph: Graph, value: Any, symbols: Mapping[sympy.Symbol, Node]) -> Any:
    """`value`, a number or a SymInt, computed in `graph` from the nodes that hold its symbols."""
    if not isinstance(value, SymInt):
        return value
    proxies = {s: Proxy(symbols[s]) for s in _symbols(value)}
    made = sympy_interp(PythonReferenceAnalysis, proxies, value.node.expr)
    return made.node if isinstance(made, Proxy) else made


def _fresh(value: Tensor) -> Tensor:
    shape, strides = ([hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
