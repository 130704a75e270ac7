"""GroupNorm, with the SiLU behind it that diffusion models have."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, users, val
from fxopt.graph.symbols import is_static
from fxopt.kernels.group_norm import group_norm
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseGroupNorm(Fusion):
    """silu(group_norm(x, groups, w, b))   ->   fxopt::group_norm(x, groups, w, b, eps, silu), with or without the silu

    Refused where the number of channels is dynamic, weight and x differ in dtype, or the statistics are used too.
    """

    anchors = (aten.group_norm.default, aten.native_group_norm.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The norm at `node`, and the silu that reads it."""
        given = arguments(node)
        out, nodes = node, {node}
        if is_call(node, aten.native_group_norm.default):
            taken = [user for user in users(node) if user.target is operator.getitem and user.args[1] == 0]
            others = [user for user in users(node) if user not in taken and user.users]
            if others or len(taken) != 1:
                return Miss("its mean or variance is used", node, 1)
            out = taken[0]
            nodes.update(users(node))
        x = given["input"]
        if not is_static(val(x).shape[1]):
            return Miss("the number of channels is dynamic", node, 1, hints.STATIC)
        bindings = {"x": x, "eps": given["eps"]}
        bindings |= {name: given[key] for name, key in (("w", "weight"), ("b", "bias")) if given[key] is not None}
        for name in set(bindings) & {"w", "b"}:
            if val(bindings[name]).dtype != val(x).dtype:
                what = f"{name} is {val(bindings[name]).dtype}, x {val(x).dtype}"
                return Miss(what, bindings[name], 1, hints.same_dtype(name, val(x).dtype))
        followers = users(out)
        silu = len(followers) == 1 and is_call(followers[0], aten.silu.default)
        if silu:
            (out,) = followers
        groups = given.get("num_groups", given.get("group"))
        return Match((out,), frozenset({*nodes, out}), bindings, {"groups": groups, "silu": silu})

    def rewrite(self, match: Match) -> Node:
        """One call of group_norm."""
        rest = (match["eps"], match.tags["silu"])
        return match.call(group_norm, match["x"], match.tags["groups"], match.get("w"), match.get("b"), *rest)

    def examples(self) -> Iterable[Example]:
        """With and without affine parameters and silu."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(2, 8, 3, 5), torch.randn(8), torch.randn(8)

        yield Example(lambda x, w, b: F.group_norm(x, 4, w, b), inputs, name="affine")
        yield Example(lambda x, w, b: F.group_norm(x, 4), inputs, name="plain")
        yield Example(lambda x, w, b: F.silu(F.group_norm(x, 2, w, b, 1e-6)), inputs, name="silu behind it")
        yield Example(
            lambda x, w, b: aten.native_group_norm(x, w, b, 2, 8, 15, 2, 1e-5)[:2],
            inputs, sites=0, refused="mean or variance is used", name="statistics returned",
        )  # fmt: skip
