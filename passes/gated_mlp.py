"""Gated MLPs: an activation of one projection times another, in every spelling of the activation."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, is_call, is_cast, is_tensor, is_widening_cast, users, val, widens
from fxopt.graph.symbols import same_shape
from fxopt.kernels import gated_mlp as ops
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.region import back, is_relabel
from fxopt.passes._activations import ANCHORS, activation_at
from fxopt.rewrite.fusion import Example, Fusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten

_LINEARS = (aten.linear, aten.mm, aten.addmm, aten.matmul)
#: activations that gate nothing we have an op for: said where they gate a linear layer
_OTHERS = (aten.mish, aten.hardswish, aten.hardsigmoid, aten.hardtanh, aten.relu6, aten.elu, aten.selu, aten.celu,
           aten.softplus, aten.leaky_relu, aten.log_sigmoid)  # fmt: skip
_PARTS = (aten.slice, aten.split, aten.chunk, aten.split_with_sizes, aten.select, aten.unbind)


@dataclass(frozen=True)
class FuseGatedMLP(Fusion):
    """act(gate) * up   ->   fxopt::gated_activation(gate, up, act), act one of silu, gelu, relu, relu², sigmoid

    `gate` and `up` come from two linear layers, are the halves of one, or are any tensors of one shape; the casts
    around the activation and after the product are kept. x * sigmoid(x) and the spellings of gelu by tanh and erf are
    read as what they are. aten.glu is one too: its halves are `up` and `gate`.

    Refused where gate and up differ in shape (one gate for many values), or the activation is also used elsewhere.
    """

    anchors = (*ANCHORS, aten.glu, *_OTHERS)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The activation at `node`, and the product that it goes into."""
        if is_call(node, aten.glu):
            return Match((node,), frozenset({node}), {"x": node.args[0]}, {"activation": "sigmoid", "from": "glu"})
        found = None if is_call(node, *_OTHERS) else activation_at(node)
        if found is None:
            return _nearly(node, node.args[0], f"{_op(node)} is none of the activations that the fused op knows")
        if not val(found.out).dtype.is_floating_point:
            return None
        active, nodes = found.out, set(found.nodes)
        while len(users(active)) == 1 and is_cast(users(active)[0]):
            (active,) = users(active)
            nodes.add(active)
        products = [user for user in users(active) if is_call(user, aten.mul.Tensor)]
        if not products:
            changed = users(active)[0] if len(users(active)) == 1 else None
            return _nearly(changed, found.x, f"the {found.name} is changed before the product") if changed else None
        if len(users(active)) > 1:
            return Miss(f"the {found.name} is used more than once", active, 1)
        (product,) = products
        a, b = product.args
        up: Any = b if a is active else a
        if not is_tensor(up) or up is active or val(up).dim() == 0 or not val(up).dtype.is_floating_point:
            return None
        if not same_shape(val(up).shape, val(active).shape):
            return Miss(f"gate and up differ in shape: {_shape(active)} and {_shape(up)}", product, 1)
        tags = {"activation": found.name, "from": _origin(found.x, up)}
        match = Match((product,), frozenset({*nodes, product}), {"gate": found.x, "up": up}, tags)
        return _with_casts(match, found.out, active)

    def rewrite(self, match: Match) -> Node:
        """One call of gated_activation."""
        if "x" in match.bindings:
            dim = arguments(match.outputs[0])["dim"]
            halves = match.call(aten.chunk.default, match["x"], 2, dim)
            return match.call(ops.gated_activation, match.item(halves, 1), match.item(halves, 0), "sigmoid")
        tags = match.tags
        casts = (tags["compute"], tags["round_to"], tags["out"])
        return match.call(ops.gated_activation, match["gate"], match["up"], tags["activation"], *casts)

    def examples(self) -> Iterable[Example]:
        """Two linears, one linear, spelled-out activations, casts; and what is no gated MLP."""

        def two() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 8), torch.randn(12, 8), torch.randn(12, 8)

        def halves() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 8), torch.randn(24, 8)

        def pair() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()

        yield Example(lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), two, name="SwiGLU")
        yield Example(lambda x, g, u: F.linear(x, u) * F.gelu(F.linear(x, g)), two, name="GeGLU, up first")
        yield Example(_one_linear, halves, name="one linear")
        yield Example(lambda x, w: F.glu(F.linear(x, w)), halves, name="glu")
        yield Example(lambda g, u: g * torch.sigmoid(g) * u, pair, name="silu spelled out")
        yield Example(lambda g, u: F.silu(g.float()).to(g.dtype) * u, pair, name="float32 inside a narrow model")
        yield Example(lambda g, u: (F.relu(g.float()).square() * u.float()).to(g.dtype), pair, name="cast at the end")
        yield Example(lambda g, u: g * F.silu(u)[..., :1], pair, sites=0, name="one gate for many")
        yield Example(
            lambda g, u: F.silu(g[..., :1]) * u,
            pair,
            sites=0,
            refused="differ in shape",
            name="a gate that is broadcast",
        )
        yield Example(_used_twice, pair, sites=0, refused="used more than once", name="the activation is returned too")


def _nearly(active: Node, x: object, reason: str) -> Miss | None:
    """A miss where `active`, pointwise in `x`, gates a linear layer and comes from one; None where there is no such."""
    pointwise = torch.Tag.pointwise in getattr(active.target, "tags", ()) or is_call(active, *_OTHERS)  # not all say so
    if not pointwise or not is_tensor(active) or not is_tensor(x) or not same_shape(val(x).shape, val(active).shape):
        return None
    for product in users(active):
        if is_call(product, aten.mul.Tensor) and len(product.all_input_nodes) == 2:
            (up,) = set(product.all_input_nodes) - {active}
            if _origin(x, up) != "tensors":  # type: ignore[arg-type]  # is_tensor says that it is a node
                return Miss(reason, active, 1)
    return None


def _op(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _with_casts(match: Match, out: Node, active: Node) -> Match:
    """`match` with its casts as tags, those of gate and up and the one after the product taken in.

    `out` is the activation's value, `active` what is multiplied: the same, cast or not.
    """
    (product,) = match.outputs
    gate, up, nodes = match["gate"], match["up"], set(match.nodes)
    compute, rounded, wide = val(out).dtype, val(active).dtype, val(product).dtype
    if is_widening_cast(gate):
        nodes.update({gate} if all(user in nodes for user in users(gate)) else ())
        gate = gate.args[0]
    if is_widening_cast(up) and torch.promote_types(rounded, val(up.args[0]).dtype) == wide:
        nodes.update({up} if all(user in nodes for user in users(up)) else ())
        up = up.args[0]
    last = product
    if len(users(product)) == 1 and is_cast(users(product)[0]) and not widens(wide, val(users(product)[0]).dtype):
        (last,) = users(product)
    if not val(last).dtype.is_floating_point:
        last = product
    tags = match.tags | {
        "compute": compute if compute != val(gate).dtype else None,
        "round_to": rounded if rounded != compute else None,
        "out": val(last).dtype if last is not product else None,
    }
    return Match((last,), frozenset({*nodes, last}), {"gate": gate, "up": up}, tags)


def _origin(gate: Node, up: Node) -> str:
    """What gate and up are made by, for the report."""
    a, b = (_producer(node) for node in (gate, up))
    if a is not None and a is b:
        return "one linear"
    if a is not None and b is not None and _input(a) is _input(b):
        return "two linears"
    return "tensors"


def _producer(node: Node) -> Node | None:
    """The linear layer behind a node, seen through layout, casts, and parts taken of it."""
    *_, source = back(node, _passed)
    return source if is_call(source, *_LINEARS) else None


def _passed(node: Any) -> bool:
    return is_relabel(node) or is_call(node, *_PARTS, operator.getitem)


def _input(linear: Node) -> Any:
    given = arguments(linear)
    *_, x = back(given.get("input") or given.get("mat1") or given["self"])
    return x


def _one_linear(x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _used_twice(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    active = F.silu(gate)
    return active * up, active


def _shape(node: Node) -> list[Any]:
    return list(val(node).shape)
