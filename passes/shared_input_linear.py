"""Linear layers that read the same input, for one launch that takes all of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, users, val
from fxopt.graph.symbols import hint
from fxopt.kernels.gated_mlp import gated_activation
from fxopt.kernels.shared_input_linear import TILE_ROWS, gated_linear, linear_pair, linear_triple
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseSharedInputLinear(Fusion):
    """linear(x, w0), linear(x, w1), linear(x, w2)   ->   fxopt::linear_triple(x, w0, w1, w2), or linear_pair

    Two that end in a gated activation become fxopt::gated_linear(x, gate, up, act) together with it. For few rows, at
    most `most_rows` (and 64): what is saved then are launches, and the tails of their grids. That was not measured yet,
    so by default it is 0 and nothing is rewritten; to try it, `fxopt.register(FuseSharedInputLinear(most_rows=16))`.
    """

    most_rows: int = 0
    devices: tuple[str, ...] = ("cuda",)

    anchors = (aten.linear.default,)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The two or three layers that read what `node` reads, where `node` is the first of them."""
        x: Any = node.args[0]
        if self.most_rows == 0 or val(node).device.type not in self.devices or val(x).dim() < 1:
            return None
        group = sorted(user for user in users(x) if _alike(user, node))
        if len(group) < 2 or group[0] is not node:
            return None
        rows = hint(val(x).numel() // val(x).shape[-1]) if val(x).numel() != 0 else 0
        most = min(self.most_rows, TILE_ROWS)
        if rows > most:
            return Miss(f"one launch for all pays up to {most} rows; there are {rows}", node, 1)
        gated = _gated(group, rows)
        if gated is not None:
            return gated
        group = group[: 3 if len(group) != 4 else 2]
        bindings = {"x": x}
        for i, layer in enumerate(group):
            given = arguments(layer)
            bindings |= {f"w{i}": given["weight"]} | ({f"b{i}": given["bias"]} if given["bias"] is not None else {})
        return Match(tuple(group), frozenset(group), bindings, {"layers": len(group), "rows": rows})

    def rewrite(self, match: Match) -> tuple[Node, ...]:
        """One call of linear_pair, linear_triple or gated_linear."""
        if "activation" in match.tags:
            weights, biases = ([match.get(f"{role}{i}") for i in range(2)] for role in "wb")
            return (match.call(gated_linear, match["x"], *weights, match.tags["activation"], *biases, self.most_rows),)
        count = len(match.outputs)
        weights = [match[f"w{i}"] for i in range(count)]
        biases = [match.get(f"b{i}") for i in range(count)]
        op = linear_pair if count == 2 else linear_triple
        made = match.call(op, match["x"], *weights, *biases, self.most_rows)
        return tuple(match.item(made, i) for i in range(count))

    def examples(self) -> Iterable[Example]:
        """Nothing by default; tests register the fusion with rows and devices of their own."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(3, 8), torch.randn(4, 8), torch.randn(6, 8)

        yield Example(lambda x, v, w: (F.linear(x, v), F.linear(x, w)), inputs, sites=0, name="off by default")


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
