"""exp(x - amax(x, d)) / sum(exp(x - amax(x, d)), d)  ->  softmax(x, d)

The maximum must be that of the very slices that are summed: one over everything (or over another dimension) leaves
slices that underflow to 0 / 0 where softmax does not. Without any maximum, exp overflows to inf / inf where softmax
does not, so that spelling is left alone; so is exp(x - logsumexp(x)), which is not 1 / n on a slice of equal, huge
negative values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, is_copy, is_tensor, val
from fxopt.graph.scope import Scope
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion


@dataclass(frozen=True)
class RaiseSoftmax(Fusion):
    """exp(x - amax(x, d)) / sum(exp(x - amax(x, d)), d) -> softmax(x, d)

    Refused when nothing or another maximum is subtracted, when maximum and sum are not over the same one dimension, or
    when the sum has another dtype.
    """

    stage: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[Any, ...]] = (aten.div.Tensor,)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A quotient of an exponential and its own sum."""
        exponential, total = node.args
        if not is_call(exponential, aten.exp.default) or not is_call(total, aten.sum.dim_IntList):
            return None
        assert isinstance(exponential, Node)
        assert isinstance(total, Node)
        if total.args[0] is not exponential:
            return None
        dim = _one_dim(total)
        if dim is None:
            return Miss("the sum is not over one dimension that is kept", total, 2)
        if val(total).dtype != val(exponential).dtype:
            return Miss(f"the sum is taken in {val(total).dtype}", total, 2)
        shifted = exponential.args[0]
        if not isinstance(shifted, Node) or shifted.target is not aten.sub.Tensor or arguments(shifted)["alpha"] != 1:
            return Miss(
                "no maximum is subtracted before the exponential, so it overflows where softmax does not", node, 3
            )
        x, covered = shifted.args[0], {node, exponential, total, shifted}
        maximum = shifted.args[1]
        while isinstance(maximum, Node) and (is_copy(maximum) or maximum.target is aten.detach.default):
            covered.add(maximum)
            maximum = maximum.args[0]
        found = _maximum(maximum)
        if found is None:
            return Miss("what is subtracted before the exponential is not the maximum of the slices summed", shifted, 4)
        source, at, nodes = found
        if source is not x or not is_tensor(x) or not val(x).is_floating_point():
            return Miss("the maximum is that of another tensor", shifted, 4)
        if at != dim:
            return Miss(f"the maximum is over dimension {at}, the sum over dimension {dim}", shifted, 4)
        return Match((node,), frozenset(covered.union(nodes)), {"x": x, "dim": dim})

    def rewrite(self, match: Match) -> Node:
        """One softmax."""
        return match.call(aten.softmax.int, match["x"], match["dim"])

    def adversaries(self, match: Match) -> Iterator[dict[str, Tensor]]:
        """Slices of equal huge values."""
        value = match.val("x")
        shape = tuple(n if isinstance(n, int) else 7 for n in value.shape)
        for fill in (torch.finfo(value.dtype).min, 1e4):
            yield {"x": torch.full(shape, fill, dtype=value.dtype)}

    def examples(self) -> Iterable[Example]:
        """The stable spelling, and the two that look like it."""

        def inputs() -> tuple[Tensor, ...]:
            return (torch.randn(3, 4, 5),)

        def stable(x: Tensor) -> Tensor:
            e = torch.exp(x - x.amax(-1, keepdim=True))
            return e / e.sum(-1, keepdim=True)

        def unstable(x: Tensor) -> Tensor:
            return x.exp() / x.exp().sum(-1, keepdim=True)

        def shared_maximum(x: Tensor) -> Tensor:
            e = torch.exp(x - x.max())
            return e / e.sum(-1, keepdim=True)

        yield Example(stable, inputs, name="subtracting the maximum")
        yield Example(unstable, inputs, sites=0, name="no maximum")
        yield Example(
            shared_maximum, inputs, sites=0, refused="not the maximum of the slices", name="one maximum for all"
        )


def _one_dim(reduction: Node) -> int | None:
    """The one dimension (from the front) that a reduction goes over and keeps, or None."""
    given = arguments(reduction)
    dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
    if not given["keepdim"] or len(dims) != 1 or val(reduction.args[0]).dim() == 0:
        return None
    return int(dims[0]) % val(reduction.args[0]).dim()


def _maximum(node: Any) -> tuple[Node, int, list[Node]] | None:
    """(tensor, dimension, nodes) of a maximum over one dimension that is kept, spelled amax or max(dim)."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if is_call(node, aten.amax.default):
        reduction, nodes = node, [node]
    elif is_call(source, aten.max.dim) and node.args[1] == 0:
        unused = [u for u in source.users if not u.users]  # the positions of the maxima
        reduction, nodes = source, [node, source, *unused]
    else:
        return None
    dim = _one_dim(reduction)
    x = reduction.args[0]
    return None if dim is None or not isinstance(x, Node) else (x, dim, nodes)
