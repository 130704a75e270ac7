"""Roles of the tensors around a dequantised matmul: operands, tables of its weight, what scales it afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import COPIES, arguments, is_call, is_cast, is_permute, is_reshape, is_tensor, users, val
from fxopt.graph.symbols import is_static, known_equal
from fxopt.match.miss import Miss
from fxopt.passes._dequant_chain import FLOATS, INTEGERS, Chain, aten, constant


@dataclass(frozen=True)
class Product:
    """x @ weight^T + bias; the outputs lie along dimension `axis` of `weight`."""

    node: Node
    x: Node
    weight: Node
    axis: int
    bias: Node | None = None


def find_product(node: Node) -> Product | None:
    """What the matmul `node` multiplies, if its right operand can be a weight."""
    if is_call(node, aten.linear.default):
        given = arguments(node)
        found = Product(node, given["input"], given["weight"], 0, given["bias"])
    elif is_call(node, aten.matmul.default, aten.mm.default):
        found = Product(node, node.args[0], node.args[1], 1)  # type: ignore[arg-type]
    elif is_call(node, aten.addmm.default):
        given = arguments(node)
        if given["alpha"] != 1 or given["beta"] != 1 or val(given["self"]).dim() != 1:
            return None
        found = Product(node, given["mat1"], given["mat2"], 1, given["self"])
    else:
        return None
    if not (is_tensor(found.x) and is_tensor(found.weight)) or val(found.weight).dim() != 2 or val(found.x).dim() < 1:
        return None
    return found if val(found.x).dtype in FLOATS else None


@dataclass
class Roles:
    """The tables that a chain applies to its unpacked integers, and whether `minimum` is subtracted."""

    tables: dict[str, Node] = field(default_factory=dict)
    negated: bool = False


def find_roles(weight: Node, inside: list[Node], root: Node) -> Roles | Miss:
    """Walk back from the weight to where it is unpacked and name the tables met on the way."""
    roles, node, chain = Roles(), weight, {root, *inside}
    while node is not root:
        mains = [a for a in node.all_input_nodes if a in chain]
        if len(mains) != 1:
            break  # from here on values are unpacked
        if not (is_reshape(node) or is_permute(node) or is_cast(node) or is_call(node, aten.expand, *COPIES)):
            miss = _role(node, mains[0], roles)
            if isinstance(miss, Miss):
                return miss
            if miss is None:
                break
        node = mains[0]
    for left in inside:
        if left < node or left is node:
            for source in left.all_input_nodes:
                if source not in chain and not constant(source):
                    return Miss(f"{source.name} takes part in unpacking the weight, and its value may change", left, 2)
    return roles


def _role(node: Node, main: Node, roles: Roles) -> Miss | bool | None:
    """Note which table `node` applies. True: seen; None: it is part of the unpacking."""
    if not is_call(node, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.mul.Scalar, aten.div.Tensor):
        return None
    other: Any = next((a for a in node.args if a is not main), main)
    if arguments(node).get("alpha", 1) != 1 or other is main:
        return Miss("the weight is combined with itself or a multiple", node, 2)
    if is_call(node, aten.div.Tensor):
        return Miss("the weight is divided by its scale; only products are fused", node, 2)
    floating = isinstance(other, Node) and is_tensor(other)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        if not floating or constant(other):
            return None if val(node).dtype in INTEGERS else Miss("the weight is multiplied by a constant", node, 2)
        if "scale" in roles.tables:
            return Miss("the weight has two scales", node, 2)
        if "zero" in roles.tables:
            return Miss("the zero point is applied to the scaled weight", node, 2)
        roles.tables["scale"] = other
        return True
    if not floating or constant(other):
        return True  # an offset, found by running the chain
    after = "scale" not in roles.tables and _scaled_before(main)
    name = "minimum" if after else "zero"
    if name in roles.tables:
        return Miss(f"two tensors are added as the weight's {name}", node, 2)
    if name == "zero" and (is_call(node, aten.add.Tensor) or node.args[0] is not main):
        return Miss("a zero point is added, or the weight is subtracted from it", node, 2)
    if name == "minimum" and is_call(node, aten.sub.Tensor):
        if node.args[0] is not main:
            return Miss("the weight is subtracted from its minimum", node, 2)
        roles.negated = True
    roles.tables[name] = other
    return True


def _scaled_before(node: Node) -> bool:
    """Whether, further back, the weight is multiplied by a float tensor."""
    nodes, _ = Chain.collect(node)
    return any(is_call(n, aten.mul.Tensor) and val(n).dtype in FLOATS and len(n.all_input_nodes) == 2 for n in nodes)


def strip(node: Node, covered: set[Node]) -> Node:
    """The tensor behind views and casts of a table that serve this weight only; those join `covered`."""
    while True:
        view = is_reshape(node) or is_permute(node) or is_call(node, aten.expand, aten.repeat_interleave.self_int)
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        widened = is_cast(node) and val(node).dtype in FLOATS and source is not None
        if not (view or widened) or source is None or any(u not in covered for u in users(node)):
            return node
        if widened and val(source).dtype not in (*FLOATS, *INTEGERS):
            return node
        covered.add(node)
        node = source


def epilogue(product: Product, outputs: int, covered: set[Node]) -> tuple[Node, Node, Node | None] | Miss:
    """(last node, scale, bias) of a product that is scaled per output afterwards; its nodes join `covered`."""
    missing = Miss("the integers are not scaled, neither before nor after the product", product.node, 2)
    node = _only_user(product.node)
    if node is not None and is_cast(node) and val(node).dtype in FLOATS:
        covered.add(node)
        node = _only_user(node)
    if node is None or not is_call(node, aten.mul.Tensor):
        return missing
    scale = next((a for a in node.args if isinstance(a, Node) and a not in covered), None)
    if scale is None or not _per_output(scale, node, outputs):
        return Miss("the product is not multiplied by one scale an output", node, 2)
    if product.bias is not None:
        return Miss("a bias is added before the scale", node, 2)
    covered.add(node)
    last, added = node, _only_user(node)
    if added is not None and is_call(added, aten.add.Tensor) and arguments(added)["alpha"] == 1:
        bias = next((a for a in added.args if isinstance(a, Node) and a is not node), None)
        same = val(added).dtype == val(product.x).dtype  # a wider sum would be rounded to x's dtype
        if bias is not None and same and val(bias).dim() == 1 and _per_output(bias, added, outputs):
            covered.add(added)
            return added, scale, bias
    return last, scale, None


def _only_user(node: Node) -> Node | None:
    found = users(node)
    return found[0] if len(found) == 1 else None


def _per_output(value: Node, node: Node, outputs: int) -> bool:
    """Whether `value` has one float for each output, or one for all, and does not change the result's shape."""
    held = val(value)
    if not isinstance(held, Tensor) or held.dtype not in FLOATS or held.dim() > val(node).dim():
        return False
    if not all(is_static(size) for size in held.shape):
        return False
    return held.numel() == 1 or (held.numel() == outputs and known_equal(held.shape[-1], outputs))
