"""From the node that makes a mask back to an index function: what is its element at (b, h, i, j)?

Lifting asks for a node's element at an index of linear forms, and follows the program backwards: a view moves the
index, `arange` is the index, a gather reads its indices first, arithmetic and comparisons are done on forms. Where it
ends, at inputs and ops that it can't follow, the value is an element read from that node.

What a tensor holds depends on when it is read. A node is followed only if nothing writes to its memory between it and
its reader; an element carries an epoch, the number of writes that came before. `stale` names a write that would come
between the mask and a later place that reads the same elements; `refreshed` then looks for a node that has kept them.

Each (node, index, epoch) is lifted once, so layers that share a mask share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils._sympy.value_ranges import bound_sympy

from fxopt.graph.query import val
from fxopt.graph.scope import Scope, is_barrier, is_random, storages
from fxopt.graph.symbols import known_equal
from fxopt.match.masks.forms import Apply, Atom, Form, Limit, Read, Size, integer, single
from fxopt.match.masks.values import Opaque, Value, atoms, of_atom, replaced

Index = tuple[Form, ...]
Handler = Callable[["Lifter", Node, Index], Value]

#: how each op is followed; the modules `views`, `arithmetic`, `logic` and `reads` fill it in
HANDLERS: dict[Any, Handler] = {}
#: how an op is followed that is not in the table
FALLBACKS: list[tuple[Callable[[Node], bool], Handler]] = []

#: nodes and indices followed for one mask before the rest is read as it is
BUDGET = 2000
#: ops above an element within which two nodes are compared for computing the same
MAX_TWIN_DEPTH = 6
#: ops followed on the way from the mask to an input
MAX_DEPTH = 120


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Register a handler for overloads (or for all overloads of a packet)."""

    def register(handler: Handler) -> Handler:
        for target in targets:
            if isinstance(target, torch._ops.OpOverloadPacket):
                HANDLERS.update((getattr(target, name), handler) for name in target.overloads())
            else:
                HANDLERS[target] = handler
        return handler

    return register


class Lifter:
    """Lifts the nodes of one graph."""

    def __init__(self, scope: Scope) -> None:
        self._writes = scope.writes  # not the scope: what is kept for it must not keep it
        self.lifted: dict[tuple[Node, Index, int], Value] = {}
        self._written = frozenset().union(*(written for _, written in scope.writes))
        self._sizes: dict[Any, Form] = {}
        self._alone: dict[Node, tuple[bool, ...]] = {}  # the dimensions of one element
        self._same: dict[tuple[Form, Form], bool] = {}
        self._firsts: dict[Node, Node] = {}
        self._twins: dict[Any, Node] = {}
        self._depth = 0
        self._followed = 0
        self._homes: dict[Node, frozenset[int]] = {}

    # values

    def value(self, node: Any, index: Index, reader: Node | None) -> Value:
        """The element of `node` at `index` as `reader` sees it (None: at the end of the graph)."""
        alone = self._alone.get(node)
        if alone is None:
            alone = self._alone[node] = tuple(self.same(n, 1) for n in val(node).shape)
        if True in alone:
            index = tuple(integer(0) if one else i for one, i in zip(alone, index, strict=True))
        key = (node, index, self.epoch(node, reader))
        found = self.lifted.get(key)
        if found is None:
            found = self._follow(node, index, reader)
            self.lifted[key] = found
        return found

    def read(self, node: Node, index: Index, reader: Node | None) -> Value:
        """The element as one that nothing more is known of."""
        dtype = val(node).dtype
        if dtype.is_complex:
            raise Opaque(f"{node.name} is complex")
        return of_atom(Read.of(self._first(node), index, self.epoch(node, reader)))

    def _first(self, node: Node, depth: int = 0) -> Node:
        """The first node met that computes just what `node` does: `x.cumsum(1)` written twice is one tensor."""
        found = self._firsts.get(node)
        if found is None:
            found = node
            parts = (node, *node.all_input_nodes)
            plain = node.op == "call_function" and not is_random(node) and not is_barrier(node)
            if plain and depth < MAX_TWIN_DEPTH and not any(self.is_written(part) for part in parts):
                try:
                    given = self._key((node.args, node.kwargs), depth + 1)
                    found = self._twins.setdefault((node.target, given), node)
                except TypeError:  # an argument that has no hash
                    pass
            self._firsts[node] = found
        return found

    def _key(self, argument: Any, depth: int) -> Any:
        if isinstance(argument, Node):
            return self._first(argument, depth)
        if isinstance(argument, (list, tuple)):
            return (list, *(self._key(a, depth) for a in argument))
        if isinstance(argument, dict):
            return (dict, *((k, self._key(v, depth)) for k, v in sorted(argument.items())))
        return type(argument), argument

    def form(self, node: Any, index: Index, reader: Node) -> Form:
        """The same as a linear form. Raises Opaque if it is none."""
        found = self.value(node, index, reader)
        form = getattr(found, "form", None)
        if not isinstance(form, Form) or val(node).dtype.is_floating_point:
            raise Opaque(f"{getattr(node, 'name', node)} is no linear form")
        return form

    def broadcast(self, node: Node, argument: Any, index: Index) -> Index:
        """The index into `argument` that broadcasting gives for `index` into the result of `node`."""
        return self.into(val(argument).shape, val(node).shape, index)

    def into(self, shape: Sequence[Any], result: Sequence[Any], index: Index) -> Index:
        """The index into a tensor of `shape` for an index into a result of the shape that it is broadcast to."""
        own = []
        missing = len(result) - len(shape)
        for n, m, form in zip(shape, result[missing:], index[missing:], strict=True):
            if self.same(n, 1):
                own.append(integer(0))
            elif self.same(n, m):
                own.append(form)
            else:
                raise Opaque(f"a dimension of {n} is not known to broadcast to {m}")
        return tuple(own)

    def joined(self, shapes: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
        """The shape that tensors of these shapes are broadcast to."""
        result: tuple[Any, ...] = ()
        for shape in shapes:
            rank = max(len(result), len(shape))
            a, b = ((*(1,) * (rank - len(s)), *s) for s in (result, shape))
            result = tuple(m if self.same(n, 1) else n for n, m in zip(a, b, strict=True))
        return result

    def same(self, a: Any, b: Any) -> bool:
        """Whether two sizes are known to be equal: `symbols.known_equal`, but asked of forms first."""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        key = (self.size(a), self.size(b))
        found = self._same.get(key)
        if found is None:
            difference = key[0] - key[1]
            if difference.is_number or difference.least > 0 or difference.most < 0:
                found = difference is integer(0)
            else:
                found = known_equal(a, b)
            self._same[key] = found
        return found

    def size(self, size: Any) -> Form:
        """A size (int, SymInt or a node that holds one) as a form. Raises Opaque if it is none."""
        size = val(size)
        if not isinstance(size, SymInt):
            return size_form(size)
        expression = size.node.expr
        found = self._sizes.get(expression)
        if found is None:
            found = self._sizes[expression] = size_form(size)
        return found

    # writes

    def is_written(self, node: Node) -> bool:
        """Whether anything in the graph writes to the memory of `node`."""
        return bool(self._home(node))

    def _home(self, node: Node) -> frozenset[int]:
        """The storages of `node` that are written to."""
        if not self._written:
            return frozenset()
        home = self._homes.get(node)
        if home is None:
            home = self._homes[node] = storages(node) & self._written
        return home

    def epoch(self, node: Node, reader: Node | None) -> int:
        """The number of writes to the memory of `node` before `reader` reads it."""
        home = self._home(node)
        if not home:
            return 0
        return sum(1 for write, written in self._writes if written & home and (reader is None or write < reader))

    def stale(self, leaves: Iterable[Read], at: Node | None) -> list[Read]:
        """Those of the elements that are written to before `at` reads them."""
        return [leaf for leaf in leaves if self.epoch(leaf.node, at) != leaf.epoch]

    def refreshed(self, value: Value, at: Node | None, leaves: Iterable[Read]) -> Value | None:
        """The value with elements that nothing has written to when `at` reads them; None if that can't be had.

        A StaticCache makes its mask from `arange(q) + length` and then advances `length` in place: the sum has kept
        what the length was.
        """
        old = self.stale(leaves, at)
        replacements: dict[Atom, Form] = {}
        for leaf in old:
            fresh = self._kept(leaf, at)
            if fresh is None:
                return None
            replacements[leaf] = fresh
        return replaced(value, replacements) if replacements else value

    def _kept(self, leaf: Read, at: Node | None) -> Form | None:
        """The element as what is left of it in a linear form that another node holds."""
        if any(form.atoms for form in leaf.index):
            return None
        home = storages(leaf.node)
        holders = {key[0] for key, value in self.lifted.items() if leaf in atoms(value)}
        for node in sorted(n for n in holders if n.op == "call_function" and not storages(n) & home):
            made = self.epoch(node, node)
            shape = [self.size(n) for n in val(node).shape]
            if val(node).dtype.is_floating_point or any(n.least < 1 for n in shape) or self.epoch(node, at) != made:
                continue
            first = (integer(0),) * len(shape)
            form = getattr(self.value(node, first, at), "form", None)
            if not isinstance(form, Form) or abs(form.coefficient(leaf)) != 1:
                continue
            k = form.coefficient(leaf)
            rest = form + single(leaf) * -k
            if not any(isinstance(atom, (Read, Apply)) for atom in rest.atoms):
                return (single(Read.of(node, first, made)) - rest) * k
        return None

    # following

    def _follow(self, node: Node, index: Index, reader: Node | None) -> Value:
        if (
            node.op != "call_function"
            or self._followed > BUDGET
            or self._depth > MAX_DEPTH
            or self.epoch(node, reader) != self.epoch(node, node)
            or is_random(node)
            or is_barrier(node)
        ):
            return self.read(node, index, reader)
        handler = HANDLERS.get(node.target) or next((h for applies, h in FALLBACKS if applies(node)), None)
        if handler is None:
            return self.read(node, index, reader)
        self._followed = self._followed + 1 if self._depth else 0
        self._depth += 1
        try:
            return handler(self, node, index)
        except Opaque:
            return self.read(node, index, reader)
        finally:
            self._depth -= 1


def tensor(argument: Any) -> Node:
    """The argument, which must be a tensor's node."""
    if not isinstance(argument, Node) or not isinstance(val(argument), Tensor):
        raise Opaque(f"{argument} is no tensor")
    return argument


def size_form(size: Any) -> Form:
    """A size (int or SymInt) as a form. Raises Opaque if it is none."""
    if isinstance(size, SymInt):
        return _form_of(size.node.expr, size.node.shape_env)
    if isinstance(size, int) and not isinstance(size, bool):
        return integer(size)
    raise Opaque(f"{size} is no integer")


def _form_of(expression: Any, shape_env: Any) -> Form:
    """A sympy expression as a form; what is not linear in it becomes a size of its own."""
    if expression.is_Integer:
        return integer(int(expression))
    if expression.is_Add:
        total = integer(0)
        for part in expression.args:
            total = total + _form_of(part, shape_env)
        return total
    if expression.is_Mul and expression.args[0].is_Integer:
        rest = expression.func(*expression.args[1:])
        return _form_of(rest, shape_env) * int(expression.args[0])
    ranges = shape_env.var_to_range
    known = ranges.get(expression) if expression.is_Symbol else None
    if known is None:
        known = bound_sympy(expression, {s: ranges[s] for s in expression.free_symbols if s in ranges})
    return single(Size.of(expression, _limit(known.lower), _limit(known.upper)))


def _limit(bound: Any) -> Limit:
    return int(bound) if getattr(bound, "is_Integer", False) else float("inf") if bound > 0 else float("-inf")
