"""view(mm(view(x), wᵀ))  ->  linear(x, w)        view(addmm(b, view(x), wᵀ))  ->  linear(x, w, b)

What ATen makes of a linear layer below autograd: the rows flattened, a product with the transposed weight, the rows
given their dimensions back. Without the views it is the layer on a matrix. Refused where the right operand isn't a
transposed matrix, or addmm scales one of its terms or adds something other than one number an output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_reshape, is_tensor, permutation, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import known_equal, same_shape
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import private
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLinear(Fusion):
    """view(addmm(b, view(x), wᵀ)) -> linear(x, w, b), and mm without the bias"""

    stage: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[Any, ...]] = (aten.mm.default, aten.addmm.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A product with a transposed matrix, and the views around it."""
        given = arguments(node)
        bias = None
        if is_call(node, aten.addmm.default):
            bias, rows, turned = given["self"], given["mat1"], given["mat2"]
            if given["alpha"] != 1 or given["beta"] != 1:
                return Miss("addmm scales one of its terms", node, 1)
            if not known_equal(val(bias).numel(), val(node).shape[-1]) or val(bias).dim() != 1:
                return Miss("addmm adds something other than one number an output", node, 1)
        else:
            rows, turned = given["self"], given["mat2"]
        if not isinstance(turned, Node) or permutation(turned) != (1, 0):
            return None
        output, x = flattened(node, rows)
        nodes = {node, output}
        nodes.update(private([turned], nodes))
        if x is not rows:
            nodes.update(private([rows], nodes))
        bindings = {"x": x, "w": turned.args[0]} | ({"b": bias} if bias is not None else {})
        return Match((output,), frozenset(nodes), bindings)

    def rewrite(self, match: Match) -> Node:
        """One linear."""
        rest = [match["b"]] if "b" in match.bindings else []
        return match.call(aten.linear.default, match["x"], match["w"], *rest)

    def examples(self) -> Iterable[Example]:
        """With and without bias and views, and products that are no linear layer."""

        def inputs() -> tuple[Tensor, Tensor, Tensor]:
            return torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)

        yield Example(lambda x, w, b: torch.addmm(b, x.view(6, 4), w.t()).view(2, 3, 5), inputs, name="with views")
        yield Example(lambda x, w, b: torch.mm(x[0], w.t()) + b, inputs, name="without bias")
        yield Example(
            lambda x, w, b: torch.addmm(b, x[0], w.t(), alpha=2), inputs, sites=0, refused="scales", name="scaled"
        )
        yield Example(lambda x, w, b: torch.mm(w, x[0].t()) + b[:, None], inputs, name="the other way round")
        yield Example(lambda x, w, b: torch.mm(x[0], w.reshape(4, 5)), inputs, sites=0, name="not transposed")


def flattened(product: Node, rows: Any) -> tuple[Node, Node]:
    """(result, left operand) of a matrix product of flattened rows; the product's own where it isn't that.

    The result is the one view of the product that gives the rows the dimensions back which they had.
    """
    used = users(product)
    if len(used) != 1 or not is_reshape(used[0]) or not is_reshape(rows) or not is_tensor(rows.args[0]):
        return product, rows
    x = rows.args[0]
    given, back = val(x).shape, val(used[0]).shape
    if len(given) < 2 or not same_shape(given[:-1], back[:-1]) or not known_equal(given[-1], val(rows).shape[-1]):
        return product, rows
    if not known_equal(back[-1], val(product).shape[-1]):
        return product, rows
    return used[0], x
