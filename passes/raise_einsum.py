"""einsum(a, b) -> permute(matmul(permute(a), permute(b)))

One contracted index, at most one index that only `a` has and one that only `b` has, any number of shared ones: then the
product is a batched matrix product, and fusions that look for `matmul` find it. Refused when an index repeats within an
operand, is summed in one operand alone, or when there are not exactly two operands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.graph.query import is_tensor, val
from fxopt.graph.scope import Scope
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseEinsum(Fusion):
    """einsum("bhid,bhjd->bhij", a, b) -> a @ b.mT"""

    stage = "raise"
    anchors = (aten.einsum.default,)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """Two tensors and an equation that is a batched matrix product."""
        equation, operands = node.args[0], node.args[1]
        if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
            return Miss("an einsum of other than two operands is not a matrix product", node, 1)
        roles = _roles(equation)
        if isinstance(roles, str):
            return Miss(roles, node, 1)
        a, b = operands
        if not is_tensor(a) or not is_tensor(b) or val(a).dtype != val(b).dtype:
            return Miss("the einsum's operands are not two tensors of one dtype", node, 1)
        return Match((node,), frozenset({node}), {"a": a, "b": b}, {"equation": equation, "roles": roles})

    def rewrite(self, match: Match) -> Node:
        """Bring both operands into matrix-product order, multiply, and bring the product into the asked order."""
        roles: _Roles = match.tags["roles"]
        a = _permuted(match, match["a"], roles.left, [*roles.shared, roles.row, roles.inner])
        b = _permuted(match, match["b"], roles.right, [*roles.shared, roles.inner, roles.column])
        product = match.call(aten.matmul.default, a, b)
        return _permuted(match, product, [*roles.shared, roles.row, roles.column], list(roles.out))

    def examples(self) -> list[Example]:
        """Attention's two products, and forms that are no matrix product."""

        def inputs() -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)

        return [
            Example(lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b).softmax(-1), inputs),
            Example(lambda a, b: torch.einsum("bhid,bhjd->bij", a, b), inputs, refused="summed over two"),
        ]


@dataclass(frozen=True)
class _Roles:
    left: str
    right: str
    out: str
    shared: tuple[str, ...]
    row: str
    column: str
    inner: str

    def __str__(self) -> str:
        return f"{self.left},{self.right}->{self.out}"


def _roles(equation: str) -> _Roles | str:
    """What each index of the equation does, or why it is no matrix product."""
    text = equation.replace(" ", "")
    if "..." in text or "->" not in text or text.count(",") != 1:
        return f"the einsum {equation!r} has an ellipsis, no output or not two operands"
    inputs, out = text.split("->")
    left, right = inputs.split(",")
    if any(len(set(term)) != len(term) for term in (left, right, out)):
        return f"the einsum {equation!r} repeats an index within an operand"
    inner = [i for i in left if i in right and i not in out]
    rows = [i for i in left if i not in right]
    columns = [i for i in right if i not in left]
    if len(inner) != 1:
        return f"the einsum {equation!r} is summed over {'two or more indices' if inner else 'no shared index'}"
    if len(rows) != 1 or len(columns) != 1 or rows[0] not in out or columns[0] not in out:
        return f"the einsum {equation!r} has not one row and one column index"
    shared = tuple(i for i in left if i in right and i in out)
    return _Roles(left, right, out, shared, rows[0], columns[0], inner[0])


def _permuted(match: Match, node: Node, have: str | list[str], want: list[str]) -> Node:
    order = [list(have).index(i) for i in want]
    return node if order == sorted(order) else match.call(aten.permute.default, node, order)
