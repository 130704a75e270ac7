"""_softmax -> softmax        native_layer_norm(x, ...)[0] -> layer_norm        _fused_rms_norm(x, ...)[0] -> rms_norm
_scaled_dot_product_flash_attention(q, k, v, ...)[0], and its sisters -> scaled_dot_product_attention

Below autograd ATen calls kernels by names of their own, which return what a backward would need besides. Where only the
result itself is used, the call is the op that the program named. Refused where another result is used, or where
attention drops at random.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import known_equal
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten

#: attention kernels, and what each calls its mask
_ATTENTION = {
    getattr(aten, name).default: mask
    for name, mask in (
        ("_scaled_dot_product_flash_attention", None),
        ("_scaled_dot_product_efficient_attention", "attn_bias"),
        ("_scaled_dot_product_cudnn_attention", "attn_bias"),
        ("_scaled_dot_product_flash_attention_for_cpu", "attn_mask"),
        ("_scaled_dot_product_fused_attention_overrideable", "attn_bias"),
    )
    if hasattr(aten, name)
}
_NORMS = tuple(getattr(aten, name).default for name in ("native_layer_norm", "_fused_rms_norm") if hasattr(aten, name))


@dataclass(frozen=True)
class RaiseSplitOps(Fusion):
    """_softmax -> softmax, native_layer_norm()[0] -> layer_norm, _scaled_dot_product_..._attention()[0] -> sdpa"""

    stage: ClassVar[str] = "raise"
    anchors: ClassVar[tuple[Any, ...]] = (aten._softmax.default, *_NORMS, *_ATTENTION)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """A kernel's call, of which only the first result is used."""
        given = arguments(node)
        if is_call(node, aten._softmax.default):
            return Match((node,), frozenset({node}), {"self": given["self"]}, {"given": given})
        if given.get("dropout_p"):
            return Miss(f"dropout is active (dropout_p={given['dropout_p']})", node, 1, hints.DROPOUT)
        taken = [user for user in users(node) if user.target is operator.getitem and user.args[1] == 0]
        others = [user for user in users(node) if user not in taken and user.users]
        if others or len(taken) != 1:
            return Miss(f"{others[0].name} uses another result" if others else "its result isn't used", node, 1)
        unused = [user for user in users(node) if user not in taken]
        bindings = {name: value for name, value in given.items() if isinstance(value, Node)}
        return Match((taken[0],), frozenset({node, *taken, *unused}), bindings, {"given": given, "call": node.target})

    def rewrite(self, match: Match) -> Node:
        """One call of the op that the program named."""
        given = match.tags["given"]
        called = match.tags.get("call")
        if called is None:
            dtype = [torch.float32] if given["half_to_float"] else []
            return match.call(aten.softmax.int, given["self"], given["dim"], *dtype)
        if called in _ATTENTION:
            return _attention(match, given, _ATTENTION[called])
        rest = [given["normalized_shape"], given["weight"]]
        if called is aten.native_layer_norm.default:
            return match.call(aten.layer_norm.default, given["input"], *rest, given["bias"], given["eps"])
        return match.call(aten.rms_norm.default, given["input"], *rest, given["eps"])

    def examples(self) -> Iterable[Example]:
        """Each kernel that runs on a CPU, and one of which another result is used."""

        def x() -> tuple[Tensor]:
            return (torch.randn(2, 3, 8),)

        def qkv() -> tuple[Tensor, ...]:
            return tuple(torch.randn(2, 3, 4, 8) for _ in range(3))

        attention = aten._scaled_dot_product_flash_attention_for_cpu
        yield Example(lambda x: aten._softmax(x, -1, False), x, name="softmax")
        yield Example(lambda x: aten.native_layer_norm(x, [8], None, None, 1e-5)[0], x, name="layer norm")
        yield Example(lambda q, k, v: attention(q, k, v, 0.0, True)[0], qkv, name="attention")
        yield Example(
            lambda x: aten.native_layer_norm(x, [8], None, None, 1e-5)[:2],
            x,
            sites=0,
            refused="uses another result",
            name="the mean is used",
        )


def _attention(match: Match, given: dict[str, Any], mask: str | None) -> Node:
    q, k = (val(given[name]).shape[-3] for name in ("query", "key"))
    named: dict[str, Any] = {"scale": given["scale"]} if given.get("scale") is not None else {}
    if not known_equal(q, k):
        named["enable_gqa"] = True
    masked = given[mask] if mask is not None else None
    operands = (given["query"], given["key"], given["value"])
    return match.call(aten.scaled_dot_product_attention.default, *operands, masked, 0.0, given["is_causal"], **named)
