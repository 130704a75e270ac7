"""Which activation a node is part of, whichever way the model spells it.

    silu        x * sigmoid(x)                          quick_gelu  x * sigmoid(1.702 x)
    gelu        x/2 * (1 + erf(x / √2))                 relu2       relu(x)²
    gelu_tanh   x/2 * (1 + tanh(√(2/π) (x + 0.044715 x³)))

A spelled-out form is read as a polynomial in x and in t, the value of the sigmoid, tanh or erf: how its products are
associated, where the halves stand and how the cube is written makes no difference then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_tensor, users
from fxopt.match.region import number
from fxopt.match.spelling import origin, read, sources

aten = torch.ops.aten

#: the ops that an activation is recognised by
ANCHORS = (aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.tanh, aten.erf)

#: (power of x, power of t) -> coefficient
Polynomial = Mapping[tuple[int, int], float]

_SQRT_2_PI = math.sqrt(2 / math.pi)
_X: Polynomial = {(1, 0): 1.0}
_HALVES: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}  # x/2 * (1 + t)
_PRODUCT: Polynomial = {(1, 1): 1.0}  # x * t

#: spelled out: what t is the value of -> (activation, its argument, the activation itself)
_SPELLED: dict[Any, tuple[tuple[str, Polynomial, Polynomial], ...]] = {
    aten.sigmoid: (("silu", _X, _PRODUCT), ("quick_gelu", {(1, 0): 1.702}, _PRODUCT)),
    aten.tanh: (("gelu_tanh", {(1, 0): _SQRT_2_PI, (3, 0): 0.044715 * _SQRT_2_PI}, _HALVES),),
    aten.erf: (("gelu", {(1, 0): math.sqrt(0.5)}, _HALVES),),
}

#: how many nodes away from t the ends of a spelled-out form are looked for
_REACH = 12


@dataclass(frozen=True)
class Activation:
    """`out` is activation `name` of `x`; `nodes` are all that compute it, `out` included."""

    name: str
    x: Node
    out: Node
    nodes: frozenset[Node]


def activation_at(node: Node) -> Activation | None:
    """The activation that `node`, a call of one of `ANCHORS`, is or is the heart of."""
    x = node.args[0]
    if not isinstance(x, Node):
        return None
    if is_call(node, aten.gelu):
        tanh = arguments(node)["approximate"] == "tanh"
        return Activation("gelu_tanh" if tanh else "gelu", x, node, frozenset({node}))
    if is_call(node, aten.relu):
        return _squared(node, x) or Activation("relu", x, node, frozenset({node}))
    if is_call(node, aten.silu):
        return Activation("silu", x, node, frozenset({node}))
    spelled = _spelled(node)
    if spelled is None and is_call(node, aten.sigmoid):
        return Activation("sigmoid", x, node, frozenset({node}))
    return spelled


def _squared(relu: Node, x: Node) -> Activation | None:
    for user in users(relu):
        call = read(user)
        if call.op == "square" and all(u is user or u in call.inner for u in users(relu)):
            return Activation("relu2", x, user, frozenset({relu, user, *call.inner}))
    return None


def _spelled(t: Node) -> Activation | None:
    for name, argument, form in _SPELLED[t.target.overloadpacket]:  # type: ignore[union-attr]
        for x in _below(t.args[0]):
            inside: set[Node] = {t}
            if not _equal(_polynomial(t.args[0], {x: (1, 0)}, inside), argument):
                continue
            for out in _above(t):
                nodes = set(inside)
                if _equal(_polynomial(out, {x: (1, 0), t: (0, 1)}, nodes), form):
                    return Activation(name, x, out, frozenset(nodes))
    return None


def _below(node: Any) -> Iterator[Node]:
    """What could be x: the tensors that `node` is computed from by sums and products, farthest first."""
    found = [origin(node)] if is_tensor(node) else []
    for at in found:
        if len(found) < _REACH and at.op == "call_function" and read(at).op in _RULES:
            for operand in read(at).operands:
                behind = origin(operand)
                if is_tensor(behind) and number(behind) is None and behind not in found:
                    found.append(behind)
    return reversed(found)


def _above(t: Node) -> Iterator[Node]:
    """What could be the activation's value: the sums and products made of `t`, nearest first."""
    found = [t]
    for at in found:
        if at is not t:
            yield at
        if len(found) < _REACH:
            found += [u for u in users(at) if is_tensor(u) and u not in found and _passes(u)]


def _passes(node: Node) -> bool:
    return sources(node)[-1] is not node or read(node).op in _RULES


def _polynomial(node: Any, atoms: Mapping[Node, tuple[int, int]], inside: set[Node]) -> Polynomial | None:
    """`node` as a polynomial in `atoms`, or None; the nodes that compute it are added to `inside`."""
    if (value := number(node)) is not None:
        return {(0, 0): float(value)} if isinstance(value, (int, float)) else None
    for at in sources(node):
        if at in atoms:
            return {atoms[at]: 1.0}
        inside.add(at)
    at = origin(node)
    if not isinstance(at, Node) or at.op != "call_function" or not is_tensor(at):
        return None
    call = read(at)
    rule = _RULES.get(call.op)
    if rule is None or call.attributes.get("alpha", 1) != 1:
        return None
    inside.update(call.inner)
    operands = [_polynomial(operand, atoms, inside) for operand in call.operands]
    return rule(*operands) if all(operand is not None for operand in operands) else None


def _add(a: Polynomial, b: Polynomial) -> Polynomial:
    return {power: a.get(power, 0.0) + b.get(power, 0.0) for power in {*a, *b}}


def _mul(a: Polynomial, b: Polynomial) -> Polynomial:
    result: dict[tuple[int, int], float] = {}
    for (i, j), c in a.items():
        for (k, m), d in b.items():
            result[i + k, j + m] = result.get((i + k, j + m), 0.0) + c * d
    return result


def _negative(a: Polynomial) -> Polynomial:
    return {power: -c for power, c in a.items()}


def _power(a: Polynomial, exponent: Polynomial) -> Polynomial | None:
    n = exponent.get((0, 0)) if len(exponent) == 1 else None
    return _mul(a, _mul(a, a)) if n == 3 else None


_RULES: dict[str, Any] = {
    "add": _add,
    "sub": lambda a, b: _add(a, _negative(b)),
    "mul": _mul,
    "neg": _negative,
    "square": lambda a: _mul(a, a),
    "pow": _power,
}


def _equal(a: Polynomial | None, b: Polynomial) -> bool:
    """Equal to nine digits: constants are written with ten."""
    return a is not None and all(math.isclose(a.get(power, 0.0), b.get(power, 0.0), rel_tol=1e-9) for power in {*a, *b})
