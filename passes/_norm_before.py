"""The RMSNorm before linear layers, taken in with them where nothing else reads it."""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import Node

from fxopt.graph.query import is_call, users, val
from fxopt.graph.symbols import hint
from fxopt.kernels.rms_norm import rms_norm
from fxopt.match.match import Match


def with_norm(match: Match) -> Match:
    """`match`, of layers of "x", with the norm that makes x: its operands are then "x" and "g".

    For one row: of several, each of a kernel's programs would compute the norm anew. The tag "norm" holds eps, offset
    and round_to of `rms_norm`. The norm stays where it has another reader, or where its operands and its result are not
    of one dtype.
    """
    norm = match["x"]
    if not is_call(norm, rms_norm.overload) or any(user not in match.nodes for user in users(norm)):
        return match
    x, factor, eps, offset, round_to, _ = rms_norm.bind(*norm.args, **norm.kwargs)
    if isinstance(eps, Node) or isinstance(offset, Node):  # a float of the program's that is symbolic
        return match
    if hint(math.prod(val(x).shape[:-1])) != 1:
        return match
    if any(val(t).dtype != val(norm).dtype for t in (x, factor) if t is not None):
        return match
    bindings = match.bindings | {"x": x} | ({"g": factor} if factor is not None else {})
    return replace(
        match, nodes=match.nodes | {norm}, bindings=bindings, tags=match.tags | {"norm": (eps, offset, round_to)}
    )
