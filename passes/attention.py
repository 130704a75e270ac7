"""softmax(scale · q kᵀ + mask) v  ->  fxopt::attention(q, k, v, mask, scale), never storing the scores.

Models spell attention out in dozens of ways that differ in layout, casts, the place of the scale and the order of
masks. The site is found by its roles (`_attention_roles`), not by a template; the algebra used is

    (c q) kᵀ = q (c k)ᵀ = c (q kᵀ)                       scales commute with the product, layouts and casts
    softmax(s + r) = softmax(s)  for r constant in a row  stabilisation by the row's maximum drops out
    k[h // g]                                             repeated heads are read, not stored
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import is_static, known_equal, same_shape
from fxopt.kernels.attention import attention
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._attention_mask import Plan, make_mask, multiply, plan
from fxopt.passes._attention_operands import Operand, emit, spellable
from fxopt.passes._attention_roles import SDPA, SOFTMAXES, Roles, read_sdpa, read_softmax
from fxopt.rewrite.fusion import Example, Fusion


@dataclass
class AttentionMatch(Match):
    """A match with the roles and the arguments that they amount to."""

    roles: Roles = field(kw_only=True)
    plan: Plan = field(kw_only=True)


@dataclass(frozen=True)
class FuseAttention(Fusion):
    """softmax(scale · q kᵀ + mask) v -> fxopt::attention(q, k, v, mask, scale)

    Found spelled out or as F.scaled_dot_product_attention, with any layout of q, k and v, any place of the scale, masks
    added or filled in, and heads of k and v repeated (grouped-query attention). Refused, with the reason, where the
    softmax is not over the keys, dropout is active, the scores are capped, clamped, concatenated to or scaled by a
    tensor, or the weights are used elsewhere.
    """

    anchors: ClassVar[tuple[Any, ...]] = (*SOFTMAXES, SDPA)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The attention around a softmax, or the one that a call names."""
        roles = read_sdpa(node) if node.target is SDPA else read_softmax(node)
        if not isinstance(roles, Roles):
            return roles
        progress = len(roles.covered)
        bad = _unsupported(roles)
        if bad is not None:
            return Miss(bad, node, progress)
        scales = (*roles.q.scales, *roles.k.scales)
        arranged = plan(roles.program, roles.sizes, scales, roles.covered, roles.is_causal)
        if isinstance(arranged, Miss):
            return Miss(arranged.reason, arranged.node, progress)
        bindings: dict[str, Any] = {"q": roles.q.base, "k": roles.k.base, "v": roles.v.base, "scale": arranged.scale}
        tensors = [step.tensor for step in arranged.mask if step.tensor is not None]
        bindings |= {f"mask_{i}" if i else "mask": tensor for i, tensor in enumerate(tensors)}
        bindings |= {f"factor_{i}" if i else "factor": factor.by for i, factor in enumerate(arranged.factors)}
        sources = _sources(roles, arranged)
        every = [*roles.q.moves, *roles.k.moves, *roles.v.moves, *(m for s in arranged.mask for m in s.moves)]
        if not spellable(every, sources):
            return Miss("a symbolic size is not the size of any operand", node, progress)
        tags = {
            "form": "sdpa" if node.target is SDPA else "spelled out",
            "mask": len(tensors),
            "causal": arranged.is_causal,
            "empty_rows": "uniform" if arranged.uniform else roles.empty_rows,
            "grouped": not known_equal(roles.k.heads, roles.sizes[1]),
        }
        return AttentionMatch(
            (roles.output,), roles.covered | arranged.covered, bindings, tags, roles=roles, plan=arranged
        )

    def rewrite(self, match: Match) -> Node:
        """Bring the operands to [B, H, M, D], make one mask, call the op, give the result its old shape."""
        assert isinstance(match, AttentionMatch)
        roles, arranged = match.roles, match.plan
        sources = _sources(roles, arranged)
        q, k, v = (emit(match, operand.base, operand.moves, sources) for operand in (roles.q, roles.k, roles.v))
        for factor in arranged.factors:
            q = multiply(match, q, factor)
        mask = make_mask(match, arranged.mask, sources)
        result = match.call(attention, q, k, v, mask, arranged.scale, arranged.is_causal, match.tags["empty_rows"])
        shape = val(roles.output).shape
        if not same_shape(val(result).shape, shape):
            result = emit(match, result, [("reshape", tuple(shape))], [result, *sources])
        return result

    def adversaries(self, match: Match) -> Iterator[dict[str, Tensor]]:
        """Masks that are the opposite of causal, and that leave a row no live key."""
        mask = match.val("mask")
        if not isinstance(mask, Tensor) or mask.dim() == 0:
            return
        upper = torch.ones([n if is_static(n) else 7 for n in mask.shape], dtype=torch.bool)
        upper = upper.triu() if upper.dim() > 1 else upper
        dead = upper.clone()
        (dead if dead.dim() == 1 else dead[..., 0, :]).fill_(False)
        for kept in (upper, dead):
            if mask.dtype == torch.bool:
                yield {"mask": kept}
                yield {"mask": ~kept}
            elif mask.is_floating_point():
                for fill in (-torch.inf, torch.finfo(mask.dtype).min):
                    yield {"mask": torch.zeros(kept.shape, dtype=mask.dtype).masked_fill(~kept, fill)}

    def examples(self) -> Iterable[Example]:
        """One program for each family of forms, and one that must be refused."""

        def inputs() -> tuple[Tensor, ...]:
            return tuple(torch.randn(2, 4, n, 8) for n in (5, 7, 7))

        def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v

        def named(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def other_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax(q @ k.transpose(-1, -2), -2) @ v

        yield Example(spelled_out, inputs, name="spelled out")
        yield Example(named, inputs, name="F.scaled_dot_product_attention")
        yield Example(other_dim, inputs, sites=0, refused="not the last", name="softmax over the rows")


def _sources(roles: Roles, arranged: Plan) -> list[Node]:
    """The tensors of the match that symbolic sizes can be read off."""
    tensors = [step.tensor for step in arranged.mask if step.tensor is not None]
    return [roles.q.base, roles.k.base, roles.v.base, *tensors]


def _unsupported(roles: Roles) -> str | None:
    """Why the op can't take these operands, in words, or None."""
    operands: tuple[Operand, ...] = (roles.q, roles.k, roles.v)
    for name, operand in zip("qkv", operands, strict=True):
        value = val(operand.base)
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            return f"{name} has dtype {value.dtype}"
        if any(known_equal(n, 0) for n in value.shape):
            return f"{name} is empty"
    if val(roles.v.base).dtype != val(roles.output).dtype:
        return f"v is {val(roles.v.base).dtype} but the result {val(roles.output).dtype}"
    if len({val(operand.base).device for operand in operands}) > 1:
        return "q, k and v are on several devices"
    return None
