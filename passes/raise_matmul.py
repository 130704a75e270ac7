"""view(bmm(view(expand(a)), view(expand(b))))  ->  matmul(a, b)        view(mm(view(x), w))  ->  matmul(x, w)

What ATen makes of a matrix product with leading dimensions: both operands broadcast and flattened to three dimensions
(copied first, where their strides ask for it), or the rows of the left one to two, and the dimensions given back.
Refused where the product is not viewed with the leading dimensions of both operands, or is used otherwise too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import is_call, is_copy, is_reshape, is_tensor, permutation, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import known_equal, same_shape
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import private
from fxopt.passes.raise_linear import flattened
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseMatmul(Fusion):
    """view(bmm(view(expand(a)), view(expand(b)))) -> matmul(a, b), and mm with flattened rows"""

    stage: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[Any, ...]] = (aten.bmm.default, aten.mm.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A product between views that take leading dimensions off and give them back."""
        a, b = node.args
        if not isinstance(a, Node) or not isinstance(b, Node):
            return None
        if is_call(node, aten.mm.default):
            output, x = flattened(node, a)
            if output is node or permutation(b) is not None:
                return None  # a plain matrix product, or a linear layer
            nodes = {node, output}
            nodes.update(private([a], nodes))
            return Match((output,), frozenset(nodes), {"a": x, "b": b})
        used = users(node)
        if len(used) != 1 or not is_reshape(used[0]) or not (is_reshape(a) and is_reshape(b)):
            return None
        output = used[0]
        *lead, rows, columns = val(output).shape
        if not same_shape((rows, columns), val(node).shape[1:]) or len(lead) < 2:
            return Miss("the product is not viewed with leading dimensions", output, 1)
        first, second = (_operand(x, [*lead, *val(x).shape[1:]]) for x in (a, b))
        if first is None or second is None:
            return Miss("the operands' leading dimensions are not those of the result", node, 1)
        (x, left), (y, right) = first, second
        nodes = {node, output}
        nodes.update(private(left, nodes))
        nodes.update(private(right, nodes))
        return Match((output,), frozenset(nodes), {"a": x, "b": y})

    def rewrite(self, match: Match) -> Node:
        """One matmul."""
        return match.call(aten.matmul.default, match["a"], match["b"])

    def examples(self) -> Iterable[Example]:
        """As ATen spells out products of four dimensions, of three by two, and one that is viewed otherwise."""

        def inputs() -> tuple[Tensor, Tensor]:
            return torch.randn(2, 3, 4, 5), torch.randn(2, 1, 5, 6)

        def spelled(a: Tensor, b: Tensor) -> Tensor:
            left, right = a.expand(2, 3, 4, 5).reshape(6, 4, 5), b.expand(2, 3, 5, 6).reshape(6, 5, 6)
            return torch.bmm(left, right).view(2, 3, 4, 6)

        def rows(a: Tensor, b: Tensor) -> Tensor:
            return torch.mm(a.view(-1, 5), b[0, 0]).view(*a.shape[:-1], 6)

        def otherwise(a: Tensor, b: Tensor) -> Tensor:
            return torch.bmm(a.reshape(6, 4, 5), b.expand(2, 3, 5, 6).reshape(6, 5, 6)).view(3, 2, 4, 6)

        yield Example(spelled, inputs, name="four dimensions")
        yield Example(rows, inputs, name="rows flattened")
        yield Example(otherwise, inputs, sites=0, refused="leading dimensions are not those", name="viewed otherwise")


def _operand(flat: Node, shape: list[Any]) -> tuple[Node, list[Node]] | None:
    """What broadcasts to `shape` behind a flattened operand, and the nodes from the operand back to it."""
    chain = [flat]
    node: Any = flat.args[0]
    while is_copy(node):
        chain.append(node)
        node = node.args[0]
    if not is_tensor(node) or not same_shape(val(node).shape, shape):
        return None
    while is_call(node, aten.expand.default) and len(val(node.args[0]).shape) == len(shape):
        before = val(node.args[0]).shape
        if not all(known_equal(n, 1) or known_equal(n, m) for n, m in zip(before[:-2], shape, strict=False)):
            break
        if not same_shape(before[-2:], shape[-2:]):
            break
        chain.append(node)
        node = node.args[0]
    return node, chain
