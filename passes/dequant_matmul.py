"""Find matmuls whose weight is dequantised on the way, and read the quantised weight instead.

The weight operand's chain is read by roles, backwards: casts and views are passed, a product is with the scale, a sum
before it with the zero point, one after it with the minimum, and what is left unpacks the integers. The roles are a
guess; what the chain computes is then proven by running it (passes/_dequant_proof.py). Nothing is matched by template,
so any spelling of a layout that the kernels know is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import is_call, is_tensor, users, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import is_static, known_equal
from fxopt.kernels import _int4
from fxopt.kernels.dequant_matmul import int4_matmul, int8_matmul, too_many_rows
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._dequant_chain import INTEGERS, Chain, Unsupported, constant
from fxopt.passes._dequant_proof import prove
from fxopt.passes._dequant_roles import Product, epilogue, find_product, find_roles, strip
from fxopt.rewrite.fusion import Example, Fusion

aten = torch.ops.aten

#: products of quantised operands that are no matmul of a dequantised weight, and why they stay
_OTHERS = {
    aten._int_mm.default: "the activations are quantised too: a product of integers has no fused op",
    aten._scaled_mm.default: "the activations are quantised too: a product of float8 has no fused op",
    aten._weight_int8pack_mm.default: "the weight is packed for a kernel of PyTorch's, which is called already",
    aten._weight_int4pack_mm.default: "the weight is packed for a kernel of PyTorch's, which is called already",
    aten._weight_int4pack_mm_for_cpu.default: "the weight is packed for a kernel of PyTorch's, which is called already",
}


@dataclass(frozen=True)
class FuseDequantMatmul(Fusion):
    """x @ dequantise(q, scale)^T + bias -> fxopt::int8_matmul or fxopt::int4_matmul

    Refused when the layout of the packed integers is not known, a scale varies over inputs in another way than by
    groups of consecutive ones, or the dequantised weight is used elsewhere too; on a GPU also for more rows of x than
    the kernel pays for: the user's own form costs Inductor one pass over the weight before a plain matmul.
    """

    anchors = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, *_OTHERS)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        if node.target in _OTHERS:
            return Miss(_OTHERS[node.target], node, 1, "hand the weight over as int8 or int4 with its scales")
        product = find_product(node)
        if product is None:
            return None
        root = _root(product)
        if not isinstance(root, Node):
            return root
        try:
            return _match(product, root)
        except Unsupported as error:
            return Miss(error.reason, error.node, 1)

    def check(self, match: Match) -> Miss | None:
        """Refused where the op would only be spelled out again."""
        x, bits = match.val("x"), 8 if match.tags["layout"] == "int8" else 4
        reason = too_many_rows(x, bits=bits) if x.device.type == "cuda" else None
        return Miss(f"{reason}, and spelled out it is as fast", match.outputs[0], len(match.nodes)) if reason else None

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


def _root(product: Product) -> Node | Miss | None:
    """The one tensor of packed integers that the weight is made of; None if the weight is no such thing."""
    nodes, leaves = Chain.collect(product.weight)
    if not nodes or not all(map(is_static, val(product.weight).shape)):
        return None
    found = []
    for node in leaves:
        other = _other(node, nodes, product)
        if other is not None:
            return other
        if not is_tensor(node) or val(node).dtype not in INTEGERS or constant(node):
            continue
        if not all(map(is_static, val(node).shape)):
            return Miss("the quantised weight has a dynamic shape", node, 1, hints.STATIC)
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


def _other(node: Node, nodes: list[Node], product: Product) -> Miss | None:
    """Refusal of a weight that is quantised in a way that no op reads, one element of `node` for each of the weight."""
    if not is_tensor(node) or not known_equal(val(node).numel(), val(product.weight).numel()) or constant(node):
        return None
    dtype = val(node).dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        return Miss(f"the weight is {dtype}: only integers have a fused op", node, 1)
    if dtype in (torch.int16, torch.int32, torch.int64) and any(is_call(n, aten.mul, aten.div) for n in nodes):
        what = f"the weight's integers are {dtype}, one for each weight: the fused ops read int8, or 4 bits packed"
        return Miss(what, node, 1, "store the weight as int8, or packed")
    if is_call(node, aten.index.Tensor) and is_tensor(node.args[0]) and val(node.args[0]).dim() == 1:
        return Miss(f"the weight is looked up in the table {node.args[0]}, as in NF4: that has no fused op", node, 1)
    return None


def _match(product: Product, root: Node) -> Match | Miss:
    if val(product.x).dtype != val(product.weight).dtype:
        hint = hints.same_dtype("x", val(product.weight).dtype)
        return Miss("x and the dequantised weight differ in dtype", product.node, 1, hint)
    if known_equal(val(product.weight).numel(), 0):
        return Miss("the quantised weight is empty", product.weight, 1)
    nodes, _ = Chain.collect(product.weight)
    inside = _depending_on(root, nodes)
    roles = find_roles(product.weight, inside, root)
    if isinstance(roles, Miss):
        return roles
    covered = {product.node, *inside}
    for node in inside:
        outside = [u for u in users(node) if u not in covered]
        if outside:
            what = f"the dequantised weight is {hints.read_by(outside[0])}"
            return Miss(
                what, outside[0], len(inside), "dequantise once for each use: then no product needs it in memory"
            )
    try:
        stripped = set(covered)
        tables = {role: strip(node, stripped) for role, node in roles.tables.items()}
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
        after = epilogue(product, chain.outputs, covered)
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
