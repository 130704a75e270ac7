"""RMSNorm in the forms that models spell it in, with the residual add before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, val
from fxopt.graph.symbols import known_equal
from fxopt.kernels import rms_norm as ops
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.pattern import OneOf, at_least_float32, cast, upcast
from fxopt.match.spelling import origin
from fxopt.passes.residual import with_residual
from fxopt.rewrite.fusion import Example
from fxopt.rewrite.pattern_fusion import PatternFusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseRMSNorm(PatternFusion):
    """x * rsqrt(mean(x², -1) + eps) * (offset + w)   ->   fxopt::rms_norm(x, w, eps)

    Llama rounds before the weight is applied, OLMo and Gemma after it, Gemma stores w - 1, T5 upcasts x for the mean
    only: the op takes the rounding and the offset as arguments. `x` may be a sum x + r, which is then returned too.

    Refused where the reduction is not over the last dimension, the statistics are not in float32 (float64 for float64),
    eps is added outside the root, or the norm has another use inside.
    """

    more_anchors: ClassVar[tuple[Any, ...]] = (aten.rms_norm.default,)

    def pattern(self, x: Tensor, w: Tensor, eps: float, offset: float) -> Tensor:
        """The norm in all its forms."""
        h = upcast(x)
        v = h.pow(2).mean(-1, keepdim=True) + eps
        # x, not h: where the root is rounded first, DeepSeek multiplies in x's own dtype.
        n = OneOf("root", rsqrt=x * cast("round_root", torch.rsqrt(v)), sqrt=x / cast("round_root", torch.sqrt(v)))
        n = cast("round_to", n)
        return cast("out", OneOf("weight", offset=n * (w + offset), plain=n * w, none=n))

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A spelled-out norm around a mean, or one that is an aten.rms_norm already."""
        return self._find_aten(node) if is_call(node, aten.rms_norm.default) else super().find(node, scope)

    def _find_aten(self, node: Node) -> Match | Miss:
        given = arguments(node)
        x = given["input"]
        if len(given["normalized_shape"]) != 1:
            return Miss(f"normalises over {len(given['normalized_shape'])} dimensions, not only the last", node)
        # F.rms_norm computes in float32 (float64 for float64), takes that dtype's eps if given none, and rounds once.
        eps = given["eps"] if given["eps"] is not None else torch.finfo(at_least_float32(val(x).dtype)).eps
        bindings = {"x": x, "eps": eps} | ({"w": given["weight"]} if given["weight"] is not None else {})
        match = self.extend(Match((node,), frozenset({node}), bindings, {"root": "rsqrt", "round_to": None}))
        return self.check(match) or match

    def extend(self, match: Match) -> Match:
        """Take in the residual add before the norm."""
        return with_residual(match)

    def check(self, match: Match) -> Miss | None:
        """The weight has one element a column; eps and offset are numbers."""
        x, w = match.val("x"), match.val("w")
        if not x.dtype.is_floating_point:
            return Miss(f"x is {x.dtype}, not floating point", match["x"])
        if x.dim() == 0:
            return Miss("x has no dimensions", match["x"])
        if _is_centred(match["x"]):
            return Miss("x has its mean subtracted: this is a layer norm", match["x"])
        if w is not None and (w.dim() != 1 or not known_equal(w.shape[0], x.shape[-1])):
            return Miss(f"the weight has shape {list(w.shape)}, x's rows have {x.shape[-1]} elements", match["w"])
        if w is not None and not w.dtype.is_floating_point:
            what = f"the weight is {w.dtype}, not floating point"
            return Miss(what, match["w"], hint=hints.same_dtype("the weight", x.dtype))
        for name in ("eps", "offset"):
            if isinstance(match.val(name), Tensor):
                return Miss(f"{name} is a tensor, not a number", match[name], hint=hints.NUMBER)
        return None

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """One call of rms_norm or add_rms_norm."""
        out = val(match.outputs[0]).dtype
        weight = match.get("w")
        round_to = match.tags["round_to"]
        if round_to is not None and weight is not None:
            # If the product is wider than the op would make it, rounding first would lose what the model keeps.
            narrow = torch.promote_types(round_to, val(weight).dtype)
            if torch.promote_types(narrow, out) != narrow:
                round_to = None
        arguments = (weight, match["eps"], match.get("offset", 0.0), round_to, out)
        if "residual" not in match.bindings:
            return match.call(ops.rms_norm, match["x"], *arguments)
        both = match.call(ops.add_rms_norm, match["x"], match["residual"], *arguments)
        return tuple(match.item(both, i) for i in range(len(match.outputs)))

    def examples(self) -> Iterable[Example]:
        """The forms of Llama, OLMo, Gemma, T5; a residual; and what must be refused."""
        x, w = (lambda: torch.randn(2, 3, 8).bfloat16()), (lambda: torch.randn(8).bfloat16())

        yield Example(lambda x, w: w * _norm(x.float()).to(x.dtype), lambda: (x(), w()), name="Llama")
        yield Example(lambda x, w: (w * _norm(x.float())).to(x.dtype), lambda: (x(), w()), name="OLMo")
        yield Example(lambda x, w: (_norm(x.float()) * (1 + w.float())).type_as(x), lambda: (x(), w()), name="Gemma")
        yield Example(lambda x: _norm(x.float()).type_as(x), lambda: (x(),), name="no weight")
        yield Example(_t5, lambda: (x(), w()), name="T5")
        yield Example(_residual, lambda: (x(), x(), w()), name="residual")
        yield Example(lambda x, w: torch.rms_norm(x, (8,), w), lambda: (x(), w()), name="aten.rms_norm")
        yield Example(
            lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
            lambda: (torch.randn(2, 3, 8),),
            sites=0,
            refused="reduces over dim 1, the pattern over the last",
            name="over another dimension",
        )
        yield Example(
            lambda x: _norm(x), lambda: (x(),), sites=0, refused="computed in bfloat16", name="narrow statistics"
        )


def _is_centred(x: Node) -> bool:
    return is_call(x, aten.sub.Tensor) and is_call(origin(x.args[1]), aten.mean)


def _norm(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def _t5(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype)


def _residual(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return w * _norm(h.float()).to(h.dtype), h
