"""Linear layers of few rows with what stands around them: a norm before, bias, activation and residual add after."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from fxopt.graph.query import arguments, is_call, is_tensor, users, val
from fxopt.graph.symbols import hint, same_shape
from fxopt.kernels.rms_norm import add_rms_norm, rms_norm
from fxopt.kernels.small_linear import TILE_ROWS, small_linear
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._activations import ANCHORS, Activation, activation_at
from fxopt.passes._norm_before import with_norm
from fxopt.rewrite.fusion import Example, Fusion
from fxopt.tune import may_pay

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten

#: how many ops from the layer the heart of a spelled-out activation is looked for
_REACH = 6


@dataclass(frozen=True)
class FuseSmallLinear(Fusion):
    """act(linear(rms_norm(x), w, b)) + r   ->   fxopt::small_linear(x, w, b, r, act, ...)

    For few rows, at most 64. The norm is taken in where only this layer reads it, an activation and a residual add
    where they alone read the layer. A norm that has taken the add already gives it back. With `most_rows` None that is
    done where a launch was measured to pay (or is about to be: tune="full"), or is believed to: in CUDA graphs. A
    number sets the limit by hand.

    Layers that share their input are left to shared_input_linear.
    """

    most_rows: int | None = None
    devices: tuple[str, ...] = ("cuda",)

    anchors = (aten.linear.default,)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The layer at `node` with all that can be taken in."""
        given = arguments(node)
        x, weight = given["input"], given["weight"]
        if self.most_rows == 0 or val(node).device.type not in self.devices or val(x).dim() < 1:
            return None
        if val(weight).dim() != 2 or not val(x).dtype == val(weight).dtype == val(node).dtype:
            return None
        if sum(is_call(user, aten.linear.default) and user.args[0] is x for user in users(x)) > 1:
            return None
        rows = hint(math.prod(val(x).shape[:-1]))
        most = TILE_ROWS if self.most_rows is None else min(self.most_rows, TILE_ROWS)
        if rows > most:
            miss = Miss(f"one launch for a layer pays up to {most} rows; there are {rows}", node, 1)
            return miss if self.most_rows is not None else None  # said only to those who set a limit
        bindings = {"x": x, "w": weight} | ({"b": given["bias"]} if given["bias"] is not None else {})
        match = _with_ends(with_norm(Match((node,), frozenset({node}), bindings, {"rows": rows})))
        if self.most_rows is None and not may_pay(small_linear, *tree_map(val, self._arguments(match))):
            return None
        return match

    def _arguments(self, match: Match) -> tuple[Any, ...]:
        """The arguments of small_linear."""
        norm = (match.get("g"), *match.tags.get("norm", (None, 0.0, None)))
        operands = (match["x"], match["w"], match.get("b"), match.get("r"))
        return (*operands, match.tags.get("activation"), *norm, self.most_rows or 0)

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """One call of small_linear, and the norm after it where that held the residual add."""
        total = match.call(small_linear, *self._arguments(match))
        if "after" not in match.tags:
            return total
        normed = match.call(rms_norm, total, match.get("after_g"), *match.tags["after"])
        return tuple(normed if output.args[1] == 0 else total for output in match.outputs)

    def examples(self) -> Iterable[Example]:
        """Nothing by default; tests register the fusion with rows and devices of their own."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4)

        yield Example(lambda x, w, r: F.relu(F.linear(x, w)) + r, inputs, sites=0, name="where nothing was measured")


def _with_ends(match: Match) -> Match:
    """`match` with the activation and the residual add after it."""
    (out,) = match.outputs
    found = _activation(out)
    if found is not None:
        tags = match.tags | {"activation": found.name}
        match = replace(match, outputs=(found.out,), nodes=match.nodes | found.nodes, tags=tags)
        out = found.out
    if len(users(out)) != 1:
        return match
    (user,) = users(out)
    if is_call(user, aten.add.Tensor):
        given = arguments(user)
        residual = _other(out, given["self"], given["other"])
        if given["alpha"] == 1 and residual is not None:
            return _ending(match, (user,), {user}, {"r": residual})
    if is_call(user, add_rms_norm.overload) and (parts := users(user)):
        a, b, factor, *rest = add_rms_norm.bind(*user.args, **user.kwargs)
        residual = _other(out, a, b)
        if residual is not None and all(part.target is operator.getitem for part in parts):
            bindings = {"r": residual} | ({"after_g": factor} if factor is not None else {})
            match = _ending(match, tuple(parts), {user, *parts}, bindings)
            match.tags["after"] = tuple(rest)
    return match


def _ending(match: Match, outputs: tuple[Node, ...], nodes: set[Node], bindings: dict[str, Any]) -> Match:
    tags = dict(match.tags)
    return replace(match, outputs=outputs, nodes=match.nodes | nodes, bindings=match.bindings | bindings, tags=tags)


def _other(out: Node, a: Any, b: Any) -> Node | None:
    """The one of two summands that is not `out`, if it is a tensor like it."""
    other = b if a is out else a
    if other is out or not is_tensor(other):
        return None
    alike = val(other).dtype == val(out).dtype and same_shape(val(other).shape, val(out).shape)
    return other if alike else None


def _activation(out: Node) -> Activation | None:
    """The activation of `out` that takes in all that reads it, in its own dtype."""
    for heart in _ahead(out):
        found = activation_at(heart) if is_call(heart, *ANCHORS) else None
        if found is None or found.x is not out or any(user not in found.nodes for user in users(out)):
            continue
        within = found.nodes - {found.out}
        if val(found.out).dtype == val(out).dtype and all(u in found.nodes for node in within for u in users(node)):
            return found
    return None


def _ahead(out: Node) -> Iterator[Node]:
    """The nodes computed from `out` within a few ops, nearest first."""
    found, edge = {out}, [out]
    for _ in range(_REACH):
        edge = [user for node in edge for user in users(node) if user not in found and is_tensor(user)]
        found.update(edge)
        yield from edge
