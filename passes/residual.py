"""The residual add before a norm: norm(x + r), where x + r is often used again by the next residual add."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_tensor, users, val
from fxopt.graph.symbols import same_shape
from fxopt.match.match import Match
from fxopt.match.spelling import origin

aten = torch.ops.aten


def with_residual(match: Match) -> Match:
    """`match`, whose variable "x" is normed, with the add that makes x taken in as "x" and "residual" if there is one.

    The sum becomes a second output where it is used elsewhere. Of the two operands the residual is the one computed
    earlier: the residual stream was there before the branch that is added to it.
    """
    total = match["x"]
    if not is_call(total, aten.add.Tensor) or _shared_copies(match, total):
        return match
    given = arguments(total)
    a, b = given["self"], given["other"]
    if given["alpha"] != 1 or not (is_tensor(a) and is_tensor(b)) or a is b or not _alike(a, b):
        return match
    residual, x = sorted((a, b))
    used_elsewhere = any(user not in match.nodes for user in users(total))
    return replace(
        match,
        outputs=(*match.outputs, total) if used_elsewhere else match.outputs,
        nodes=match.nodes | {total},
        bindings=match.bindings | {"x": x, "residual": residual},
    )


def _shared_copies(match: Match, total: Node) -> bool:
    """Whether the norm reads the sum through a cast or copy that others use too.

    It would have to stand both after the norm, which makes the sum, and before it, which reads the copy: the sum stays
    where it is.
    """
    read = {source for node in match.nodes for source in node.all_input_nodes} - match.nodes
    return any(source is not total and origin(source) is total for source in read)


def _alike(a: Node, b: Node) -> bool:
    x, y = val(a), val(b)
    return bool(x.dtype == y.dtype and x.dtype.is_floating_point and same_shape(x.shape, y.shape))
