"""Linear layers that read the same input, for one launch that takes all of their weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from fxopt.graph.query import arguments, is_call, users, val
from fxopt.graph.symbols import hint
from fxopt.kernels.gated_mlp import gated_activation
from fxopt.kernels.shared_input_linear import TILE_ROWS, gated_linear, linear_pair, linear_triple
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.ops import FusedOp, find_op
from fxopt.passes._norm_before import with_norm
from fxopt.rewrite.fusion import Example, Fusion
from fxopt.tune import may_pay

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSharedInputLinear(Fusion):
    """linear(x, w0), linear(x, w1), linear(x, w2)   ->   fxopt::linear_triple(x, w0, w1, w2), or linear_pair

    Two that end in a gated activation become fxopt::gated_linear(x, gate, up, act) together with it, and an RMSNorm
    that only they read is taken in. For few rows, at most 64: what is saved then are launches, and the tails of their
    grids. With `most_rows` None that is done where it was measured to pay (or is about to be: tune="full"), or is
    believed to: in CUDA graphs. A number sets the limit by hand: `fxopt.register(FuseSharedInputLinear(most_rows=16))`.
    """

    most_rows: int | None = None
    devices: tuple[str, ...] = ("cuda",)

    anchors = (aten.linear.default, linear_pair.overload, linear_triple.overload, gated_linear.overload)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The two or three layers that read what `node` reads, where `node` is the first of them."""
        if not is_call(node, aten.linear.default):
            return self._normed_late(node)
        x: Any = node.args[0]
        if self.most_rows == 0 or val(node).device.type not in self.devices or val(x).dim() < 1:
            return None
        group = sorted(user for user in users(x) if _alike(user, node))
        if len(group) < 2 or group[0] is not node:
            return None
        rows = hint(math.prod(val(x).shape[:-1]))
        most = TILE_ROWS if self.most_rows is None else min(self.most_rows, TILE_ROWS)
        if rows > most:
            miss = Miss(f"one launch for all pays up to {most} rows; there are {rows}", node, 1)
            return miss if self.most_rows is not None else None  # said only to those who set a limit
        for match in self._choices(group, rows):
            if self.most_rows is not None or may_pay(*_with_values(*self._call(match))):
                return match
        return None

    def _choices(self, group: list[Node], rows: int) -> Iterator[Match]:
        """What can be made of the layers of one input, the most that is taken in first."""
        gated = _gated(group, rows)
        if gated is not None:
            yield from (with_norm(gated), gated)
        group = group[: 3 if len(group) != 4 else 2]
        bindings = {"x": group[0].args[0]}
        for i, layer in enumerate(group):
            given = arguments(layer)
            bindings |= {f"w{i}": given["weight"]} | ({f"b{i}": given["bias"]} if given["bias"] is not None else {})
        match = Match(tuple(group), frozenset(group), bindings, {"layers": len(group), "rows": rows})
        yield from (with_norm(match), match)

    def _normed_late(self, node: Node) -> Match | None:
        """One of this fusion's own calls with the norm before it, which became its alone by another rewrite."""
        op = find_op(node.target)
        assert op is not None
        args = op.bind(*node.args, **node.kwargs)
        if args[-4] is not None:  # eps: it has a norm
            return None
        parts = (node,) if op is gated_linear else tuple(users(node))
        plain = Match(parts, frozenset({node, *parts}), {"x": args[0]}, {"late": (op, args[1:-5], args[-1])})
        match = with_norm(plain)
        if match is plain or (self.most_rows is None and not may_pay(*_with_values(*self._call(match)))):
            return None
        return match

    def _call(self, match: Match) -> tuple[FusedOp, tuple[Any, ...]]:
        """The op and its arguments."""
        if "late" in match.tags:
            op, operands, most = match.tags["late"]
            return op, (match["x"], *operands, match.get("g"), *match.tags["norm"], most)
        count, activation = match.tags["layers"], match.tags.get("activation")
        weights, biases = ([match.get(f"{role}{i}") for i in range(count)] for role in "wb")
        norm = (match.get("g"), *match.tags.get("norm", (None, 0.0, None)))
        op = gated_linear if activation else linear_pair if count == 2 else linear_triple
        return op, (match["x"], *weights, *([activation] if activation else []), *biases, *norm, self.most_rows or 0)

    def rewrite(self, match: Match) -> tuple[Node, ...]:
        """One call of linear_pair, linear_triple or gated_linear."""
        op, args = self._call(match)
        made = match.call(op, *args)
        if op is gated_linear:
            return (made,)
        places: list[Any] = [o.args[1] if is_call(o, operator.getitem) else i for i, o in enumerate(match.outputs)]
        return tuple(match.item(made, place) for place in places)

    def examples(self) -> Iterable[Example]:
        """Nothing by default; tests register the fusion with rows and devices of their own."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(3, 8), torch.randn(4, 8), torch.randn(6, 8)

        yield Example(lambda x, v, w: (F.linear(x, v), F.linear(x, w)), inputs, sites=0, name="off by default")


def _with_values(op: FusedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return op, *tree_map(val, args)


def _gated(group: list[Node], rows: int) -> Match | None:
    """The first two layers of `group` that a gated activation takes, and nothing else, with it."""
    for layer in group:
        if len(users(layer)) != 1 or not is_call(product := users(layer)[0], gated_activation.overload):
            continue
        gate, up, activation, *casts = gated_activation.bind(*product.args, **product.kwargs)
        same = gate in group and up in group and gate is not up and users(gate) == users(up)
        if not same or any(cast is not None for cast in casts):
            continue
        bindings: dict[str, Any] = {"x": gate.args[0]}
        for i, given in enumerate((arguments(gate), arguments(up))):
            bindings |= {f"w{i}": given["weight"]} | ({f"b{i}": given["bias"]} if given["bias"] is not None else {})
        tags = {"layers": 2, "rows": rows, "activation": activation}
        return Match((product,), frozenset({gate, up, product}), bindings, tags)
    return None


def _alike(layer: Node, first: Node) -> bool:
    """Whether `layer` is a linear layer with a matrix, of the input and the dtypes of `first`."""
    if not is_call(layer, aten.linear.default) or layer.args[0] is not first.args[0]:
        return False
    weight = val(layer.args[1])
    return bool(weight.dim() == 2 and val(layer).dtype == val(first).dtype == weight.dtype)
