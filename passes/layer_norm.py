"""LayerNorm with the residual add before it and the casts around it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_cast, is_widening_cast, users, val
from fxopt.graph.scope import needs_gradient
from fxopt.graph.symbols import same_shape
from fxopt.kernels import layer_norm as ops
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.pattern import OneOf, cast, upcast
from fxopt.passes.residual import with_residual
from fxopt.rewrite.fusion import Example
from fxopt.rewrite.pattern_fusion import PatternFusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten

#: rows of fewer elements are not fused where gradients are wanted, unless the program has them whole
SHORT = 4


@dataclass(frozen=True)
class FuseLayerNorm(PatternFusion):
    """layer_norm(x + r, w, b)   ->   fxopt::add_layer_norm(x, r, w, b, eps), the sum returned too

    Without a residual add it becomes fxopt::layer_norm. Found as aten.layer_norm, also in float32 inside a narrow model
    (both casts are taken in), and spelled out: (x - mean(x)) * rsqrt(var(x) + eps) * w + b.

    Refused where weight or bias don't have the shape of the normalised dimensions, the reduction is not over the last
    dimension or not in float32 (float64 for float64), the result is wider than x, or a gradient is asked of a
    spelled-out norm of rows of two or three elements.
    """

    more_anchors: ClassVar[tuple[Any, ...]] = (aten.layer_norm.default,)

    def pattern(self, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        """The norm as Cohere, DeBERTa and others spell it."""
        h = upcast(x)
        m = h.mean(-1, keepdim=True)
        squares = (h - m).pow(2).mean(-1, keepdim=True)
        v = OneOf("variance", squares=squares, var=h.var(-1, unbiased=False, keepdim=True)) + eps
        d = h - m  # apart from the one above: many compute it twice
        n = cast("round_to", OneOf("root", rsqrt=d * torch.rsqrt(v), sqrt=d / torch.sqrt(v)))
        return cast("out", OneOf("affine", both=n * w + b, weight=n * w, none=n))

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A spelled-out norm around a mean, or one that is an aten.layer_norm already."""
        if not is_call(node, aten.layer_norm.default):
            return super().find(node, scope)
        given = arguments(node)
        bindings = {"x": given["input"], "eps": given["eps"]}
        bindings |= {name: given[key] for name, key in (("w", "weight"), ("b", "bias")) if given[key] is not None}
        match = Match((node,), frozenset({node}), bindings, {"dims": len(given["normalized_shape"])})
        return with_residual(_with_casts(match))

    def extend(self, match: Match) -> Match:
        """Take in the residual add before the norm."""
        return with_residual(match)

    def check(self, match: Match) -> Miss | None:
        """Weight and bias have the shape of the normalised dimensions; the result is as wide as x."""
        x, norm = match.val("x"), match.outputs[0]
        if x.dim() == 0:
            return Miss("x has no dimensions", match["x"])
        rows = x.shape[x.dim() - match.tags.get("dims", 1) :]
        for name in ("w", "b"):
            value = match.val(name)
            if value is not None and not same_shape(value.shape, rows):
                return Miss(f"{name} has shape {list(value.shape)}, x's rows {list(rows)}", match[name])
        if not x.dtype.is_floating_point:
            return Miss(f"x is {x.dtype}, not floating point", match["x"])
        if _is_short(rows[-1]) and _loses_digits(match):
            why = "in rows this short the gradient is most exact as it is spelled"
            return Miss(f"x has rows of {rows[-1]}: {why}", match["x"])
        if isinstance(match.val("eps"), Tensor):
            return Miss("eps is a tensor, not a number", match["eps"], hint=hints.NUMBER)
        if val(norm).dtype != x.dtype:
            return Miss(f"the result is {val(norm).dtype}, x {x.dtype}: the op would round it to that first", norm)
        return None

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """One call of layer_norm or add_layer_norm."""
        out = val(match.outputs[0]).dtype
        arguments = (match.get("w"), match.get("b"), match["eps"], match.tags.get("dims", 1), out)
        if "residual" not in match.bindings:
            return match.call(ops.layer_norm, match["x"], *arguments)
        both = match.call(ops.add_layer_norm, match["x"], match["residual"], *arguments)
        return tuple(match.item(both, i) for i in range(len(match.outputs)))

    def examples(self) -> Iterable[Example]:
        """With and without affine parameters, over two dimensions, in float32 inside a narrow model."""
        x, w = (lambda: torch.randn(2, 3, 8)), (lambda: torch.randn(8))
        norm = torch.nn.functional.layer_norm

        yield Example(lambda x, w, b: norm(x, (8,), w, b), lambda: (x(), w(), w()), name="affine")
        yield Example(lambda x: norm(x, (3, 8)), lambda: (x(),), name="two dimensions")
        yield Example(_residual, lambda: (x(), x(), w(), w()), name="residual")
        yield Example(
            lambda x: norm(x.float(), (8,)).to(x.dtype), lambda: (x().bfloat16(),), name="float32 inside a narrow model"
        )
        yield Example(lambda x, w: (w.float() * _norm(x.float())).to(x.dtype), lambda: (x(), w()), name="Cohere")
        yield Example(
            lambda x: x - x.mean(1, True) / torch.sqrt((x - x.mean(1, True)).pow(2).mean(1, True) + 1e-5),
            lambda: (x(),),
            sites=0,
            name="over another dimension",
        )


def _norm(h: Tensor) -> Tensor:
    m = h.mean(-1, keepdim=True)
    return (h - m) * torch.rsqrt((h - m).pow(2).mean(-1, keepdim=True) + 1e-5)


def _residual(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return torch.nn.functional.layer_norm(h, (8,), w, b), h


def _is_short(size: object) -> bool:
    return isinstance(size, int) and size < SHORT


def _loses_digits(match: Match) -> bool:
    """Whether autograd differentiates a norm that was spelled out, whose fused gradient is less exact in short rows.

    Of two elements the differences to the mean are each other's negatives to the last bit, and in the spelled-out
    gradient all but eps cancels exactly; in the fused formulas it cancels up to rounding. Measured with PyTorch's two
    fused formulas, the error is 2 to 4 times as large for 2 elements, 1.4 to 1.8 times for 3, and alike from 4 on.
    """
    whole = any(is_call(node, aten.layer_norm.default) for node in match.nodes)
    return not whole and torch.is_grad_enabled() and needs_gradient(match["x"])


def _with_casts(match: Match) -> Match:
    """`match` with x.float() before the norm and the cast back after it taken in, where there are both.

    The op computes in at least float32 and rounds to x's dtype once, so the casts are its own; one without the other
    would round where the model does not.
    """
    (norm,) = match.outputs
    before, after = match["x"], users(norm)
    if not is_widening_cast(before) or len(after) != 1 or not is_cast(after[0]):
        return match
    (narrow,) = after
    x = before.args[0]
    if val(narrow).dtype != val(x).dtype or val(norm).dtype != torch.float32:
        return match
    nodes = match.nodes | {narrow}
    if all(user in nodes for user in users(before)):
        nodes |= {before}
    return replace(match, outputs=(narrow,), nodes=nodes, bindings=match.bindings | {"x": x})
