"""Fusions found by a pattern written in plain PyTorch: anchors and search are derived from it.

    class FuseRMSNorm(PatternFusion):
        def pattern(self, x, w, eps: float): ...
        def check(self, match): ...
        def rewrite(self, match): ...

The pattern's variables are the match's bindings, its tags the match's tags. `check` takes part in the search: if one
way to match is refused, the next is tried (the norm alone, say, where what multiplies it is not a weight).
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from fxopt.graph.query import users
from fxopt.match import hints
from fxopt.match.exact import difference, share
from fxopt.match.match import Match
from fxopt.match.matcher import Found, Matcher
from fxopt.match.miss import Miss
from fxopt.match.pattern import CAST, ONE_OF, Pattern, PatternError, alternatives, trace
from fxopt.match.spelling import beginnings, origin, read, source
from fxopt.rewrite.fusion import Fusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

#: fewer pattern nodes than this in common say nothing
LEAST = 2

#: ops of which models have many: a search does not begin at them if the pattern has another
_COMMON = ("add", "mul", "sub", "div", "cast", "permute", "reshape", "unsqueeze", "expand", "getitem", "neg")


@dataclass(frozen=True)
class PatternFusion(Fusion):
    """Base class of fusions that are found by a traced pattern.

    `pattern` is a method of tensors and numbers in plain PyTorch; see `fxopt.match.pattern` for alternatives and
    optional parts. Its outputs are the match's outputs.
    """

    #: a tensor variable's shape while the pattern is traced, where (2, 3, 8) won't do
    shapes: ClassVar[Mapping[str, Sequence[int]]] = {}

    #: ops at which `find` begins besides those derived from the pattern
    more_anchors: ClassVar[tuple[Any, ...]] = ()

    pattern: ClassVar[Any]

    @property
    def anchors(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The ops at which a search begins, derived from the pattern."""
        return (*_anchors(self)[1], *self.more_anchors)

    @abstractmethod
    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """Make the replacement; see `Fusion.rewrite`."""

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The outermost match of the pattern around anchor `node` that `check` accepts, or the best near miss."""
        pattern = traced(self)
        matcher = Matcher(pattern)
        settled: Miss | None = None
        for found in matcher.search(_anchors(self)[0], node):
            outcome = self._settle(pattern, found)
            if isinstance(outcome, Match):
                return outcome
            if matcher.best is None or outcome.progress >= matcher.best.progress:
                matcher.best = outcome
                settled = outcome
        miss = matcher.best
        if miss is None or miss.progress < LEAST:
            return None
        return miss if miss is settled else replace(miss, share=share(pattern, matcher.farthest))

    def extend(self, match: Match) -> Match:
        """A chance to take in more than the pattern (a residual add before it, say) before the match is checked."""
        return match

    def _settle(self, pattern: Pattern, found: Found) -> Match | Miss:
        refusal = difference(pattern, found)
        if refusal is not None:
            return replace(refusal, share=share(pattern, found))
        match = self.extend(to_match(pattern, found))
        refusal = _leak(match) or self.check(match)
        return match if refusal is None else replace(refusal, progress=max(refusal.progress, found.progress))


def traced(fusion: PatternFusion) -> Pattern:
    """The fusion's pattern, traced once."""
    return _traced(fusion)


@functools.lru_cache(maxsize=256)
def _traced(fusion: PatternFusion) -> Pattern:
    try:
        return trace(fusion.pattern, fusion.shapes)
    except PatternError as error:
        raise PatternError(f"{fusion.location}: pattern of {fusion.name}: {error}") from None


@functools.lru_cache(maxsize=256)
def _anchors(fusion: PatternFusion) -> tuple[Node, tuple[Any, ...]]:
    """The pattern node where a search begins, and the ops of the graph nodes where it may be found.

    It must be in every alternative. Of those the rarest in models is the best; the deepest among equals.
    """
    pattern = _traced(fusion)
    within = {part for node in pattern.graph.nodes if node.op == "call_function" for part in read(node).inner}
    candidates = [
        node for node in _mandatory(pattern.root) - within if node.op == "call_function" and source(node) is None
    ]
    if not candidates:
        raise PatternError(
            f"pattern of {fusion.name}: no op is in all of its alternatives, so no search can begin; compute what they"
            " share once"
        )
    order = {node: i for i, node in enumerate(pattern.graph.nodes)}
    best = min(candidates, key=lambda node: (_commonness(node), order[node]))
    if not isinstance(best.target, torch._ops.OpOverload):
        return best, (best.target,)
    if best.target.namespace != "aten":
        return best, (best.target.overloadpacket,)
    names = beginnings(read(best).op)
    return best, tuple(getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name))


def _commonness(node: Node) -> int:
    """0 for ops that are not pointwise (a reduction, a matmul), 1 for pointwise ones, 2 for those in every model."""
    if read(node).op in _COMMON:
        return 2
    return int(torch.Tag.pointwise in getattr(node.target, "tags", ()))


def _mandatory(node: Node) -> set[Node]:
    """The pattern nodes below and at `node` that are in every choice of alternatives."""
    node = origin(node)
    if node.target is ONE_OF:
        parts = [_mandatory(value) for value in alternatives(node)[2]]
        return set.intersection(*parts)
    found = set() if node.target is CAST else {node}
    for below in node.all_input_nodes:
        found |= _mandatory(below)
    return found


def to_match(pattern: Pattern, found: Found) -> Match:
    """A structural match as the rest of the framework sees it."""
    outputs = tuple(found.at(output) for output in pattern.outputs)
    nodes = set(found.pairs.values()) | found.covered
    # What is only seen through and is used elsewhere too stays; and then so does what it sees through to.
    for node in sorted(nodes, reverse=True):
        if source(node) is not None and node not in outputs and any(u not in nodes for u in users(node)):
            nodes.discard(node)
    bindings = {name: value for name, value in found.bindings.items() if not name.startswith("_")}
    return Match(outputs, frozenset(nodes), bindings, dict(found.tags))


def _leak(match: Match) -> Miss | None:
    """Refusal of a match whose inner values are used outside, so that a smaller match can be tried."""
    for node in match.nodes:
        if node not in match.outputs:
            for user in users(node):
                if user not in match.nodes:
                    what = f"the inner value {node.name} is {hints.read_by(user)}"
                    return Miss(what, user, len(match.nodes), hints.kept(node, user))
    return None
