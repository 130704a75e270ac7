"""Find matmuls whose weight is dequantised on the way, and read the quantised weight instead.

The weight operand's chain is read by roles, backwards: casts and views are passed, a product is with the scale, a sum
before it with the zero point, one after it with the minimum, and what is left unpacks the integers. The roles are a
guess; what the chain computes is then proven by running it (passes/_dequant_proof.py). Nothing is matched by template,
so any spelling of a layout that the kernels know is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import COPIES, arguments, is_call, is_cast, is_permute, is_reshape, is_tensor, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import is_static, known_equal
from fxopt.kernels import _int4
from fxopt.kernels.dequant_matmul import int4_matmul, int8_matmul
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._dequant_chain import FLOATS, INTEGERS, Chain, Unsupported, constant
from fxopt.passes._dequant_proof import prove
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """x @ weight^T + bias; the outputs lie along dimension `axis` of `weight`."""

    node: Node
    x: Node
    weight: Node
    axis: int
    bias: Node | None = None


def _product(node: Node) -> _Product | None:
    """What the matmul `node` multiplies, if its right operand can be a weight."""
    if is_call(node, aten.linear.default):
        given = arguments(node)
        found = _Product(node, given["input"], given["weight"], 0, given["bias"])
    elif is_call(node, aten.matmul.default, aten.mm.default):
        found = _Product(node, node.args[0], node.args[1], 1)  # type: ignore[arg-type]
    elif is_call(node, aten.addmm.default):
        given = arguments(node)
        if given["alpha"] != 1 or given["beta"] != 1 or val(given["self"]).dim() != 1:
            return None
        found = _Product(node, given["mat1"], given["mat2"], 1, given["self"])
    else:
        return None
    if not (is_tensor(found.x) and is_tensor(found.weight)) or val(found.weight).dim() != 2 or val(found.x).dim() < 1:
        return None
    return found if val(found.x).dtype in FLOATS else None


@dataclass
class _Roles:
    """The tables that a chain applies to its unpacked integers, and whether `minimum` is subtracted."""

    tables: dict[str, Node] = field(default_factory=dict)
    negated: bool = False


@dataclass(frozen=True)
class FuseDequantMatmul(Fusion):
    """x @ dequantise(q, scale)^T + bias -> fxopt::int8_matmul or fxopt::int4_matmul

    Refused when the layout of the packed integers is not known, a scale varies over inputs in another way than by
    groups of consecutive ones, or the dequantised weight is used elsewhere too.
    """

    anchors = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        product = _product(node)
        if product is None:
            return None
        root = _root(product)
        if not isinstance(root, Node):
            return root
        try:
            return _match(product, root)
        except Unsupported as error:
            return Miss(error.reason, error.node, 1)

    def rewrite(self, match: Match) -> Node:
        x, bias, tags = match["x"], match.get("bias"), match.tags
        n, k = tags["outputs"], tags["inputs"]
        packed = match["packed"]
        if tags["axis"] == 1:
            packed = match.call(aten.transpose.int, packed, 0, 1)
        elif match.val("packed").dim() != 2 or match.val("packed").shape[0] != n:
            packed = match.call(aten.reshape.default, packed, [n, -1])
        groups = k // tags["group_size"]
        tables = {role: _as_table(match, role, n, groups) for role in ("scale", "zero", "minimum")}
        if tags["negated"]:
            tables["minimum"] = match.call(aten.neg.default, tables["minimum"])
        if tags["layout"] == "int8":
            scale = tables["scale"]
            assert scale is not None
            scale = match["scale"] if match.val("scale").shape == (n,) else match.call(aten.select.int, scale, 1, 0)
            made = match.call(int8_matmul, x, packed, scale, bias)
        else:
            rest = (tables["scale"], tables["zero"], tables["minimum"], tags["group_size"], tags["layout"])
            made = match.call(int4_matmul, x, packed, *rest, tags["offset"], bias)
        if val(made).dtype != val(match.outputs[0]).dtype:
            made = match.call(aten.to.dtype, made, val(match.outputs[0]).dtype)
        return made

    def examples(self) -> Iterable[Example]:
        from fxopt.passes._dequant_examples import examples

        return examples()


def _root(product: _Product) -> Node | Miss | None:
    """The one tensor of packed integers that the weight is made of; None if the weight is no such thing."""
    nodes, leaves = Chain.collect(product.weight)
    if not nodes or not all(map(is_static, val(product.weight).shape)):
        return None
    found = []
    for node in leaves:
        if not is_tensor(node) or val(node).dtype not in INTEGERS or constant(node):
            continue
        if not all(map(is_static, val(node).shape)):
            return Miss("the quantised weight has a dynamic shape", node, 1)
        dtype, count = val(node).dtype, val(node).numel()
        eight = dtype == torch.int8 and count == val(product.weight).numel()
        four = dtype in _int4.VALUES and count * _int4.VALUES[dtype] == val(product.weight).numel()
        if eight or four:
            found.append(node)
        elif dtype == torch.uint8 and count == val(product.weight).numel():
            return Miss("8-bit weights with a zero point have no fused op", node, 1)
    if len(found) > 1:
        return Miss("the weight is made of two integer tensors of that size", found[1], 1)
    return found[0] if found else None


def _match(product: _Product, root: Node) -> Match | Miss:
    if val(product.x).dtype != val(product.weight).dtype:
        return Miss("x and the dequantised weight differ in dtype", product.node, 1)
    nodes, _ = Chain.collect(product.weight)
    inside = _depending_on(root, nodes)
    roles = _roles(product.weight, inside, root)
    if isinstance(roles, Miss):
        return roles
    covered = {product.node, *inside}
    for node in inside:
        outside = [u for u in users(node) if u not in covered]
        if outside:
            return Miss(f"the dequantised weight is also used by {outside[0].name}", outside[0], len(inside))
    try:
        stripped = set(covered)
        tables = {role: _strip(node, stripped) for role, node in roles.tables.items()}
        chain = Chain.trace(product.weight, product.axis, [root, *tables.values()])
        covered = stripped
    except Unsupported:  # behind its views a table may be packed, too: GPTQ's zero points are
        tables = dict(roles.tables)
        chain = Chain.trace(product.weight, product.axis, [root, *tables.values()])
    axis = chain.axes.get(root)
    if axis is None or axis[0] > 1 or (axis[0] == 1 and (val(root).dim() != 2 or axis[1] != 1)):
        return Miss("the packed weight is not stored output by output", root, len(inside))
    end, bias = product.node, product.bias
    scaled_after = "scale" not in tables
    if scaled_after:
        after = _epilogue(product, chain.outputs, covered)
        if isinstance(after, Miss):
            return after
        end, scale, bias = after
    inputs = val(product.weight).numel() // chain.outputs
    formula = prove(chain, root, tables, inputs, roles.negated)
    if isinstance(formula, str):
        return Miss(formula, product.weight, len(inside))
    forms = dict(formula.forms)
    if scaled_after:
        if "minimum" in tables:
            return Miss("a minimum is added before the scale", product.weight, len(inside))
        tables["scale"], forms["scale"] = scale, "1" if val(scale).numel() == 1 else "n,g"
    if formula.layout == "int8" and (formula.group_size != inputs or formula.offset != 0.0 or len(tables) > 1):
        return Miss("8-bit weights with groups or zero points have no fused op", root, len(inside))
    tags = {"layout": formula.layout, "group_size": formula.group_size, "offset": formula.offset, "forms": forms,
            "axis": axis[0], "outputs": chain.outputs, "inputs": inputs, "negated": roles.negated}  # fmt: skip
    bindings = {"x": product.x, "packed": root, **tables} | ({"bias": bias} if bias is not None else {})
    return Match((end,), frozenset(covered), bindings, tags)


def _depending_on(root: Node, nodes: list[Node]) -> list[Node]:
    found = {root}
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return [node for node in nodes if node in found]


def _roles(weight: Node, inside: list[Node], root: Node) -> _Roles | Miss:
    """Walk back from the weight to where it is unpacked and name the tables met on the way."""
    roles, node, chain = _Roles(), weight, {root, *inside}
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


def _role(node: Node, main: Node, roles: _Roles) -> Miss | bool | None:
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


def _strip(node: Node, covered: set[Node]) -> Node:
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


def _epilogue(product: _Product, outputs: int, covered: set[Node]) -> tuple[Node, Node, Node | None] | Miss:
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


def _as_table(match: Match, role: str, outputs: int, groups: int) -> Node | None:
    """The table bound to `role` as [outputs, groups]: a view."""
    node = match.get(role)
    if node is None:
        return None
    call: Callable[..., Node] = match.call
    form = match.tags["forms"][role]
    count = max(match.val(role).numel() // outputs, 1)
    if form == "g,n":
        shaped = call(aten.reshape.default, node, [count, outputs])
        return call(aten.transpose.int, shaped, 0, 1)
    shape: list[Any] = [1, 1] if form == "1" else [outputs, count]
    made = node if list(match.val(role).shape) == shape else call(aten.reshape.default, node, shape)
    if shape != [outputs, groups]:
        made = call(aten.expand.default, made, [outputs, groups])
    return made
