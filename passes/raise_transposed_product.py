"""a @ pᵀ  ->  (p @ aᵀ)ᵀ   where p is a softmax, and a @ p -> (pᵀ @ aᵀ)ᵀ where p is one over its rows

Some models keep channels before positions and multiply values by the transposed attention weights from the left. Turned
round, the weights are the left operand, where fusions look for them. Refused when the right operand isn't the transpose
of a softmax (through casts and copies), or the transpose is used elsewhere too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.graph.query import is_cast, is_copy, is_tensor, permutation, users, val
from fxopt.graph.scope import Scope
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten

_SOFTMAXES = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class RaiseTransposedProduct(Fusion):
    """v @ softmax(s)ᵀ -> (softmax(s) @ vᵀ)ᵀ"""

    stage = "raise"
    anchors = (aten.matmul.default, aten.bmm.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A product whose right operand is a transposed softmax."""
        values, turned = node.args[0], node.args[1]
        if not isinstance(turned, Node) or not is_tensor(turned) or val(turned).dim() < 2:
            return None
        rank = val(turned).dim()
        if isinstance(values, Node) and _is_softmax(turned, rank - 2) and val(values).dim() > 1:
            return Match((node,), frozenset({node}), {"values": values, "weights": turned}, {"turn": True})
        if permutation(turned) != (*range(rank - 2), rank - 1, rank - 2):
            return None
        weights = turned.args[0]
        if not isinstance(values, Node) or val(values).dim() < 2 or not _is_softmax(weights):
            return None
        if len(users(turned)) > 1:
            return Miss("the transposed attention weights are used elsewhere too", turned, 2)
        return Match((node,), frozenset({node, turned}), {"values": values, "weights": weights})

    def rewrite(self, match: Match) -> Node:
        """Multiply from the other side and turn the product."""
        values = match.call(aten.transpose.int, match["values"], -1, -2)
        weights = match["weights"]
        if match.tags.get("turn"):
            weights = match.call(aten.transpose.int, weights, -1, -2)
        product = match.call(match.outputs[0].target, weights, values)  # type: ignore[arg-type]
        return match.call(aten.transpose.int, product, -1, -2)

    def examples(self) -> list[Example]:
        """Attention with channels before positions, and a product that has nothing to do with it."""

        def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 6)

        def channels_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return v @ (q.mT @ k * 0.5).softmax(-1).transpose(-2, -1)

        def rows_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return v @ (k.mT @ q * 0.5).softmax(-2)

        return [Example(channels_first, inputs, name="channels first"), Example(rows_first, inputs, name="rows first")]


def _is_softmax(node: object, dim: int | None = None) -> bool:
    while isinstance(node, Node) and (is_cast(node) or is_copy(node)):
        node = node.args[0]
    if not isinstance(node, Node) or node.target not in _SOFTMAXES:
        return False
    return dim is None or node.args[1] % val(node).dim() == dim
