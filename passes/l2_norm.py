"""L2 norms: F.normalize, x / x.norm(), and the forms that spell out the sum of squares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_cast, is_widening_cast, users, val
from fxopt.graph.symbols import same_shape
from fxopt.kernels.l2_norm import l2_norm
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.pattern import OneOf, cast
from fxopt.match.region import number
from fxopt.match.spelling import origin
from fxopt.rewrite.fusion import Example
from fxopt.rewrite.pattern_fusion import PatternFusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseL2Norm(PatternFusion):
    """x * rsqrt(sum(x², -1) + eps)   ->   fxopt::l2_norm(x, -1, eps), and x / max(‖x‖, eps) over any dimension

    Computed in the dtype that the model computes it in. Refused where a spelled-out sum is not over the last dimension,
    or the norm is not Euclidean.
    """

    more_anchors: ClassVar[tuple[Any, ...]] = (aten.linalg_vector_norm.default, aten.linalg_norm, aten.norm)

    @property
    def anchors(self) -> tuple[Any, ...]:  # type: ignore[override]
        """Said here, not derived: the pattern is traced (50 ms) once there is a graph with a sum in it."""
        return (aten.sum, *self.more_anchors)

    def pattern(self, x: Tensor, eps: float) -> Tensor:
        """The forms that spell out the sum of squares."""
        s = x.pow(2).sum(-1, keepdim=True)
        v = OneOf("eps", sum=s + eps, floor=s.clamp_min(eps), clamp=s.clamp(min=eps), none=s)
        return cast("out", OneOf("root", rsqrt=x * torch.rsqrt(v), sqrt=x / torch.sqrt(v)))

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A spelled-out norm around a sum, or a division by a norm that is one already."""
        if not is_call(node, *self.more_anchors):
            return super().find(node, scope)
        return _find_norm(node)

    def check(self, match: Match) -> Miss | None:
        """x is floating point, eps a number."""
        x = match.val("x")
        if not x.dtype.is_floating_point or x.dim() == 0:
            return Miss(f"x is {x.dtype} with {x.dim()} dimensions", match["x"])
        if isinstance(match.val("eps"), Tensor):
            return Miss("eps is a tensor, not a number", match["eps"], hint=hints.NUMBER)
        return None

    def rewrite(self, match: Match) -> Node:
        """One call of l2_norm."""
        place = {"clamp": "floor", "none": "sum"}.get(match.tags["eps"], match.tags["eps"])
        given, out = match.val("x").dtype, val(match.outputs[0]).dtype
        compute = match.tags.get("compute") or next(val(n).dtype for n in match.nodes if is_call(n, aten.sum))
        casts = (compute if compute != given else None, out if out != compute else None)
        return match.call(l2_norm, match["x"], match.tags.get("dim", -1), match.get("eps", 0.0), place, *casts)

    def examples(self) -> Iterable[Example]:
        """F.normalize, CLIP, gated delta nets; and norms that are not Euclidean or not divided by."""

        def x() -> tuple[Tensor]:
            return (torch.randn(2, 3, 8),)

        yield Example(lambda x: F.normalize(x, dim=-1), x, name="F.normalize")
        yield Example(lambda x: F.normalize(x, dim=1), x, name="over another dimension")
        yield Example(lambda x: x / x.norm(p=2, dim=-1, keepdim=True), x, name="CLIP")
        yield Example(lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), x, name="delta net")
        yield Example(lambda x: x / x.pow(2).sum(-1, True).clamp(1e-12).sqrt(), x, name="floor")
        yield Example(lambda x: F.normalize(x, p=1.0), x, sites=0, refused="not the Euclidean norm", name="L1")
        yield Example(lambda x: x - x.norm(dim=-1, keepdim=True), x, sites=0, name="not divided by")


def _find_norm(node: Node) -> Match | Miss | None:
    """x / max(‖x‖, eps), x / (‖x‖ + eps) or x / ‖x‖ around its norm."""
    given = arguments(node)
    x: Any = given.get("self", given.get("x"))
    order = given.get("ord", given.get("p", 2))
    dims: Any = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    nodes: set[Node] = {node}
    at, eps, place = node, 0.0, "outside"
    while len(users(at)) == 1 and not is_call(users(at)[0], aten.div.Tensor):
        (user,) = users(at)
        found = _floor(user, at)
        if found is not None and eps == 0.0:
            place, eps = found
        elif not (is_call(user, aten.expand, aten.expand_as) or is_cast(user)):
            return None
        at = user
        nodes.add(at)
    if len(users(at)) != 1:
        return None
    (out,) = users(at)
    divided: Any = out.args[0]
    if out.args[1] is not at or origin(divided) is not origin(x):
        return None
    if order not in (None, 2) or dims is None or len(dims) != 1 or not given.get("keepdim"):
        return Miss(f"not the Euclidean norm over one dimension, kept: order {order}, dim={dims}", node, 2)
    if not same_shape(val(out).shape, val(x).shape) or given.get("dtype") is not None:
        return None
    nodes.add(out)
    wide = x if is_widening_cast(x) and divided is x else None
    if wide is not None and all(user in nodes for user in users(wide)):
        nodes.add(wide)
    if wide is not None and len(users(out)) == 1 and is_cast(users(out)[0]):
        (out,) = users(out)
        nodes.add(out)
    bindings = {"x": x if wide is None else wide.args[0], "eps": eps}
    dim = dims[0] - val(x).dim() if dims[0] >= 0 else dims[0]
    return Match((out,), frozenset(nodes), bindings, {"eps": place, "dim": dim, "compute": val(divided).dtype})


def _floor(node: Node, norm: Node) -> tuple[str, float] | None:
    """(where eps is, eps) if `node` keeps `norm` away from zero."""
    given = arguments(node)
    if is_call(node, aten.clamp_min.default, aten.clamp.default) and given.get("max") is None:
        eps, place = number(given.get("min")), "max"
    elif is_call(node, aten.add.Tensor) and given["alpha"] == 1:
        other = given["other"] if given["self"] is norm else given["self"]
        eps, place = number(other), "outside"
    else:
        return None
    return (place, float(eps)) if isinstance(eps, (int, float)) else None
