"""Phase one of matching: does the graph have the pattern's structure here?

The search begins at an anchor (a node whose op the pattern must contain), climbs pattern and graph together to the
graph nodes that could be the pattern's first output, and from each of those matches downwards with backtracking:
operand orders of commutative ops, alternatives, optional casts. Casts, copies and reshapes that change no value are
seen through, and a variable is bound to the value behind them. Attributes (dimensions, flags, dtypes) are left to
phase two (`fxopt.match.exact`), so that a wrong one is reported for what it is.

Nothing outside the pattern's reach is looked at: the cost of a search does not depend on the size of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import is_cast, val
from fxopt.graph.symbols import known_equal
from fxopt.match.miss import Miss
from fxopt.match.pattern import CAST, ONE_OF, Pattern, alternatives, optional_cast
from fxopt.match.spelling import Call, consumers, origin, read, sources

#: graph nodes tried as the pattern's first output from one anchor, outermost first
MAX_ROOTS = 32

#: graph nodes looked at for the pattern's last call, where nothing right above continues the pattern
MAX_BEYOND = 16


#: `spelling.read` and `spelling.consumers` of a pattern's nodes, which never change
read_pattern = functools.lru_cache(maxsize=4096)(read)


@functools.lru_cache(maxsize=4096)
def _above(p: Node) -> tuple[Call, ...]:
    return tuple(consumers(p))


_origin = functools.lru_cache(maxsize=4096)(origin)


@functools.lru_cache(maxsize=4096)
def last_calls(p: Node) -> frozenset[Node]:
    """The calls that pattern value `p` can be the result of: one an alternative."""
    p = origin(p)
    if p.target is ONE_OF:
        return frozenset().union(*map(last_calls, alternatives(p)[2]))
    return last_calls(optional_cast(p)[1]) if p.target is CAST else frozenset({p})


@dataclass(frozen=True)
class Found:
    """A structural match, complete or under way.

    pairs     pattern node -> graph node of the same value
    bindings  variable -> graph node or number
    tags      tag -> alternative chosen, or dtype of an optional cast
    places    pattern node of an alternative or optional cast -> the graph node in its place
    covered   graph nodes taken in beside the pairs: parts of a spelling, and what was seen through
    """

    pairs: dict[Node, Node] = field(default_factory=dict)
    bindings: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    places: dict[Node, Node] = field(default_factory=dict)
    covered: frozenset[Node] = frozenset()

    def at(self, p: Node) -> Node:
        """The graph node in the place of a pattern node that computes something."""
        p = origin(p)
        return self.pairs[p] if p in self.pairs else self.places[p]

    @property
    def progress(self) -> int:
        """How many of the pattern's nodes have been found."""
        return len(self.pairs)


class Matcher:
    """One search for `pattern` around one anchor. `best` is the failure that got farthest, `farthest` how far."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.best: Miss | None = None
        self.farthest = Found()
        self._names = {node: name for name, node in pattern.variables.items()}
        self._calls: dict[Node, Call] = {}
        self._above: dict[Node, list[Call]] = {}

    def search(self, want: Node, anchor: Node) -> Iterator[Found]:
        """All structural matches in which graph node `anchor` is (part of) pattern node `want`, outermost first."""
        starts = [call.node for call in self._readings(anchor) if call.op == read_pattern(want).op]
        for start in starts:
            assert start is not None
            roots, farthest = self._climb(want, start)
            for root in roots:
                for found in self.match(self.pattern.root, root, Found()):
                    if found.pairs.get(want) is start:
                        yield found
            if not roots:
                self._explain_climb(*farthest)

    def match(self, p: Any, g: Any, found: Found) -> Iterator[Found]:
        """All ways in which graph value `g` is pattern value `p`, given what was found so far."""
        if isinstance(p, (list, tuple)):
            if isinstance(g, (list, tuple)) and len(p) == len(g):
                yield from self._match_all(list(zip(p, g, strict=True)), found)
            return
        if not isinstance(p, Node):
            if (p is None and g is None) or (_is_number(p) and not isinstance(g, (Node, str)) and known_equal(p, g)):
                yield found
            else:
                self.fail(found, f"{_say(g)} where the pattern has {_say(p)}", g)
            return
        if p in self._names:
            yield from self._bind(p, g, found)
            return
        p = _origin(p)
        if p in self._names:
            yield from self._bind(p, g, found)
        elif p.target is ONE_OF:
            yield from self._match_one_of(p, g, found)
        elif p.target is CAST:
            yield from self._match_cast(p, g, found)
        else:
            yield from self._match_call(p, g, found)

    def fail(self, found: Found, reason: str, node: Any) -> None:
        """Note a failure; the one that got farthest is kept."""
        if self.best is None or found.progress > self.best.progress:
            self.best = Miss(reason, node if isinstance(node, Node) else None, found.progress)
            self.farthest = found

    def read(self, node: Node) -> Call:
        """`spelling.read`, once a node."""
        if node not in self._calls:
            self._calls[node] = read(node)
        return self._calls[node]

    def _consumers(self, node: Node) -> list[Call]:
        if node not in self._above:
            self._above[node] = list(consumers(node))
        return self._above[node]

    def _match_call(self, p: Node, g: Any, found: Found) -> Iterator[Found]:
        chain = sources(g)
        node = chain[-1]
        if p in found.pairs:
            if found.pairs[p] is node:
                yield replace(found, covered=found.covered.union(chain[:-1]))
            else:
                self.fail(found, f"{_say(node)} where the pattern uses {found.pairs[p].name} again", node)
            return
        want = read_pattern(p)
        if not isinstance(node, Node) or node.op != "call_function":
            self.fail(found, f"{_say(node)} where the pattern has {want.op}", node)
            return
        # A see-through node can be part of a spelling (an unsqueeze that restores a reduced dimension of size one).
        for i, candidate in enumerate(reversed(chain)):
            call = self.read(candidate)
            operands = _align(want, call)
            if operands is None:
                continue
            seen = chain[: len(chain) - 1 - i]
            now = replace(
                found,
                pairs=found.pairs | {p: candidate},
                covered=found.covered.union(seen, call.inner),
            )
            for order in operands:
                yield from self._match_all(order, now)
            return
        self.fail(found, f"{_say(node)} where the pattern has {want.op}", node)

    def _match_all(self, operands: Sequence[tuple[Any, Any]], found: Found) -> Iterator[Found]:
        if not operands:
            yield found
            return
        # What has structure goes before variables: a failure there says more, and variables match anything.
        first = min(range(len(operands)), key=lambda i: self._is_variable(operands[i][0]))
        rest = [pair for i, pair in enumerate(operands) if i != first]
        for now in self.match(*operands[first], found):
            yield from self._match_all(rest, now)

    def _match_one_of(self, p: Node, g: Any, found: Found) -> Iterator[Found]:
        tag, names, values = alternatives(p)
        for name, value in zip(names, values, strict=True):
            if found.tags.get(tag, name) == name:
                now = replace(found, tags=found.tags | {tag: name}, places=found.places | {p: origin(g)})
                yield from self.match(value, g, now)

    def _match_cast(self, p: Node, g: Any, found: Found) -> Iterator[Found]:
        tag, value = optional_cast(p)
        chain = sources(g)
        node = chain[-1]
        if is_cast(node) and val(node).dtype.is_floating_point and val(node.args[0]).dtype.is_floating_point:
            dtype = val(node).dtype
            if found.tags.get(tag, dtype) == dtype:
                now = replace(found, tags=found.tags | {tag: dtype}, places=found.places | {p: node})
                yield from self.match(value, node.args[0], replace(now, covered=found.covered.union(chain)))
        if found.tags.get(tag) is None:
            now = replace(found, tags=found.tags | {tag: None}, places=found.places | {p: node})
            yield from self.match(value, g, now)

    def _bind(self, p: Node, g: Any, found: Found) -> Iterator[Found]:
        name = self._names[p]
        scalar = not isinstance(val(p), Tensor)
        chain = sources(g)
        value = chain[-1]
        if scalar and not _is_scalar(value):
            self.fail(found, f"{_say(value)} where the pattern has the number {name}", value)
        elif not scalar and not isinstance(val(value), Tensor):
            self.fail(found, f"{_say(value)} where the pattern has the tensor {name}", value)
        elif name in found.bindings and not _same(found.bindings[name], value):
            self.fail(found, f"{_say(value)} where {name} is {_say(found.bindings[name])} elsewhere", value)
        else:
            yield replace(
                found,
                bindings=found.bindings | {name: value},
                covered=found.covered.union(n for n in chain[:-1] if isinstance(n, Node)),
            )

    def _is_variable(self, p: Any) -> bool:
        return not isinstance(p, Node) or _origin(p) in self._names

    def _readings(self, anchor: Node) -> list[Call]:
        """The calls that `anchor` is, or is part of."""
        found = [self.read(anchor)]
        work = [anchor]
        for node in work:
            for user in node.users:
                if user.op == "call_function" and anchor in (call := self.read(user)).inner:
                    found.append(call)
                    work.append(user)
        return found

    def _climb(self, want: Node, start: Node) -> tuple[list[Node], tuple[Node, Node]]:
        """Graph nodes that could be the pattern's first output, outermost first, and the highest pair reached."""
        reached: set[tuple[Node, Node]] = set()
        work = [(want, start)]
        roots: list[Node] = []
        farthest = work[0]
        while work and len(roots) < MAX_ROOTS:
            p, g = work.pop(0)
            if (p, g) in reached:
                continue
            reached.add((p, g))
            farthest = (p, g)
            if p is self.pattern.root:
                roots.append(g)
            work += self._steps_up(p, g)
        return sorted(set(roots), reverse=True), farthest

    def _steps_up(self, p: Node, g: Node) -> Iterator[tuple[Node, Node]]:
        above = self._consumers(g)
        for user in p.users:
            if user.target is ONE_OF:
                yield user, g
            elif user.target is CAST:
                yield user, g
                yield from ((user, call.node) for call in above if call.op == "cast" and call.node is not None)
        for want in _above(p):
            assert want.node is not None
            if want.node.target in (ONE_OF, CAST):
                if want.node not in p.users:  # behind an upcast
                    yield want.node, g
                continue
            for call in above:
                if call.node is not None and _align(want, call) is not None:
                    yield want.node, call.node

    def _explain_climb(self, p: Node, g: Node) -> None:
        """Say why nothing above `g` continues the pattern above `p`."""
        for found in self.match(p, g, Found()):
            wanted = " or ".join(sorted({c.op for c in _real_consumers(p)})) or "nothing more"
            users = sorted({_describe(c) for c in consumers(g)})
            given = " and ".join(users) if users else "nothing but the program's result"
            self.fail(self._with_last(found, g), f"{g.name} is used by {given}, in the pattern by {wanted}", g)
            return

    def _with_last(self, found: Found, g: Node) -> Found:
        """`found` with the pattern's last call, where a few steps above `g` it is made of a value that is bound."""
        bound = [value for value in found.bindings.values() if isinstance(value, Node)]
        beyond = [g]
        for node in beyond:
            for call in self._consumers(node) if len(beyond) < MAX_BEYOND else ():
                if call.node is None or call.node in beyond:
                    continue
                beyond.append(call.node)
                for last in last_calls(self.pattern.root) - found.pairs.keys():
                    if _align(read_pattern(last), call) and any(origin(o) in bound for o in call.operands):
                        return replace(found, pairs=found.pairs | {last: call.node})
        return found


def _real_consumers(p: Node) -> Iterator[Call]:
    for call in _above(p):
        if call.node is not None and call.node.target in (ONE_OF, CAST):
            yield from _real_consumers(call.node)
        else:
            yield call


def _align(want: Call, call: Call) -> list[list[tuple[Any, Any]]] | None:
    """The orders in which the operands of a pattern's call can be those of a graph's call; None if the ops differ."""
    if want.op == "div" and call.op == "mul" and len(call.operands) == 2:
        # x / p against x * c, which is how x / (1 / c) reads: p is 1 / c
        p = want.operands[1]
        if isinstance(p, Node) and not isinstance(val(p), Tensor) and _is_number(call.operands[1]) and call.operands[1]:
            return [[(want.operands[0], call.operands[0]), (p, 1.0 / call.operands[1])]]
    if want.op != call.op or len(want.operands) != len(call.operands):
        return None
    straight = list(zip(want.operands, call.operands, strict=True))
    if not (want.commutative and call.commutative):
        return [straight]
    (a, x), (b, y), *rest = straight
    return [straight, [(a, y), (b, x), *rest]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scalar(value: Any) -> bool:
    found = val(value)
    if isinstance(found, Tensor):
        return found.dim() == 0
    return _is_number(found) or isinstance(found, (SymFloat, SymInt))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(val(a), Tensor) or isinstance(val(b), Tensor):
        return False
    return known_equal(val(a), val(b))


def _describe(call: Call) -> str:
    """A call in words, with what tells it from a similar one."""
    if call.op == "pow":
        return f"pow with {_say(call.operands[1])}"
    if call.op == "cast":
        return f"a cast to {str(call.attributes['dtype']).removeprefix('torch.')}"
    return call.op


def _say(value: Any) -> str:
    if isinstance(value, Node):
        if value.op == "call_function" and isinstance(value.target, torch._ops.OpOverload):
            op = _describe(read(value))
            return value.name if value.name.startswith(op) else f"{value.name} ({op})"
        return value.name
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    return "nothing" if value is None else f"the number {value}" if _is_number(value) else str(value)
