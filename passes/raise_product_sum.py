"""c · a b + d · x y  ->  c · [a, (d/c) x] [b; y]   where the sum goes to a softmax

Scores can be the sum of two products: content and layout (LiLT), latent and rotary parts of multi-head latent attention
written without a concatenation. Side by side they are one product of wider heads, and nothing of the size of the scores
is stored. Refused when one product is used otherwise too, when the shapes of the factors differ, and when the joined
heads would be wider than fast kernels serve.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, is_tensor, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import same_shape
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import number, passes_on
from fxopt.rewrite.fusion import Example, Fusion

MAX_WIDTH = 256
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class RaiseProductSum(Fusion):
    """c · a b + d · x y -> c · [a, (d/c) x] [b; y]"""

    stage: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[Any, ...]] = (aten.add.Tensor,)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A sum of two scaled products of one shape, and what else adds the same two."""
        one, two = node.args
        if not isinstance(one, Node) or not isinstance(two, Node) or one is two or arguments(node)["alpha"] != 1:
            return None
        found = [_scaled_product(one), _scaled_product(two)]
        if found[0] is None or found[1] is None or not _reaches_softmax(node):
            return None
        (first, c, chain), (second, d, other) = found[0], found[1]
        sums = [u for end in (one, two) for u in users(end)]
        if any(not is_call(u, aten.add.Tensor) or {u.args[0], u.args[1]} != {one, two} for u in sums):
            return Miss("one of the products that are added is used elsewhere too", node, 3)
        (a, b), (x, y) = first.args[:2], second.args[:2]
        if not same_shape(val(a).shape[:-1], val(x).shape[:-1]) or len({val(t).dtype for t in (a, b, x, y)}) > 1:
            return Miss("the products that are added have factors of other shapes or dtypes", node, 3)
        if not same_shape(val(b).shape[:-2], val(y).shape[:-2]) or not same_shape(val(b).shape[-1:], val(y).shape[-1:]):
            return Miss("the products that are added have factors of other shapes", node, 3)
        width = val(a).shape[-1] + val(x).shape[-1]
        if not isinstance(width, int) or width > MAX_WIDTH:
            return Miss(
                f"side by side the products are {width} wide, more than the {MAX_WIDTH} of fast kernels", node, 3
            )
        outputs = tuple(dict.fromkeys(sums))
        return Match(outputs, frozenset({*outputs, *chain, *other}), {"a": a, "b": b, "x": x, "y": y}, {"c": c, "d": d})

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """One product in the place of two, for each of the sums."""
        c, d = match.tags["c"], match.tags["d"]
        x = match["x"] if c == d else match.call(aten.mul.Tensor, match["x"], d / c)
        left = match.call(aten.cat.default, [match["a"], x], -1)
        right = match.call(aten.cat.default, [match["b"], match["y"]], -2)
        results = [match.call(aten.matmul.default, left, right) for _ in match.outputs]  # each to a softmax of its own
        return tuple(r if c == 1 else match.call(aten.mul.Tensor, r, c) for r in results)

    def examples(self) -> Iterable[Example]:
        """Latent attention, and a sum that has nothing to do with attention."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)

        def latent(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
            return torch.softmax((q @ k.mT + r @ s.mT) * 0.3, -1) @ k

        yield Example(latent, inputs, name="latent attention")


def _scaled_product(node: Node) -> tuple[Node, float, tuple[Node, ...]] | None:
    """(product, number, nodes) if `node` is a product of matrices times numbers."""
    scale, chain = 1.0, []
    while is_call(node, aten.mul.Tensor, aten.div.Tensor):
        by = number(node.args[1])
        if not isinstance(by, (int, float)) or by == 0 or not isinstance(node.args[0], Node):
            return None
        scale = scale / by if is_call(node, aten.div.Tensor) else scale * by
        chain.append(node)
        node = node.args[0]
        if len(users(node)) > 1:
            return None
    if not is_call(node, *_PRODUCTS) or not all(is_tensor(a) and val(a).dim() > 1 for a in node.args[:2]):
        return None
    return (node, scale, (*chain, node)) if val(node).is_floating_point() else None


def _reaches_softmax(node: Node, limit: int = 24) -> bool:
    """Whether a softmax takes the value, through pointwise and layout ops."""
    cone = [node]
    for at in cone:
        for user in users(at):
            if is_call(user, aten.softmax, aten._softmax, aten._safe_softmax):
                return True
            if passes_on(user) and user not in cone and len(cone) < limit:
                cone.append(user)
    return False
