"""What a node costs, as an expression of the graph's symbolic dimensions.

    bytes   what it reads and writes when it runs by itself; a view of another value moves nothing
    FLOPs   2 M N K for a product; one an element for pointwise ops, one an element read for reductions, a few for what
            is made of several (softmax, norms); a fused op has those of its reference, traced on its own fake values

Views are recognised by their memory, not by a list of ops.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymFloat, SymInt, Tensor
from torch._guards import detect_fake_mode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.query import is_mutable, storage, val
from fxopt.ops import FusedOp, find_op


def _size(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(int(size))


def _elements(value: Any) -> sympy.Expr:
    return sympy.Mul(*(_size(size) for size in value.shape)) if isinstance(value, Tensor) else sympy.Integer(0)


def _bytes(value: Any) -> sympy.Expr:
    found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sympy.Add(*(_elements(leaf) * leaf.element_size() for leaf in found))


def traffic(node: Node) -> sympy.Expr:
    """The bytes that a node reads and writes if it runs by itself."""
    if node.op != "call_function" or node.target is operator.getitem:
        return sympy.Integer(0)
    sources = [val(source) for source in node.all_input_nodes]
    read = {key for value in sources if (key := storage(value)) is not None}
    made = [leaf for leaf in tree_leaves(val(node)) if isinstance(leaf, Tensor)]
    if not is_mutable(node) and made and all(storage(leaf) in read for leaf in made):
        return sympy.Integer(0)
    return sympy.Add(_bytes(val(node)), *map(_bytes, sources))


#: products, and the dimension of their first (for addmm and its like: second) tensor that is summed over
_PRODUCTS = {"mm": 0, "bmm": 0, "matmul": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "_int_mm": 0, "_scaled_mm": 0}

_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "var", "std", "logsumexp", "prod", "argmax", "cumsum"}

#: FLOPs an element of what has more than one
_ELEMENTWISE = {
    "softmax": 5,
    "_softmax": 5,
    "log_softmax": 5,
    "layer_norm": 8,
    "rms_norm": 4,
    "group_norm": 8,
    "glu": 2,
}


class Flops:
    """The floating-point operations of nodes; references of fused ops are traced once a signature."""

    def __init__(self) -> None:
        """Nothing is traced yet."""
        self._traced: dict[Any, sympy.Expr] = {}

    def of(self, node: Node) -> sympy.Expr:
        """The FLOPs of `node`, as far as they can be told from shapes."""
        op = find_op(node.target)
        if op is None:
            return flops(node)
        args = tree_map(val, op.bind(*node.args, **node.kwargs))
        key = (op.name, tuple(map(_words, tree_leaves(args))))
        if key not in self._traced:
            self._traced[key] = _of_reference(op, args)
        return self._traced[key]


def _words(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}{value.device}" if isinstance(value, Tensor) else repr(value)


def _of_reference(op: FusedOp, args: Any) -> sympy.Expr:
    leaves = tree_leaves(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = [size for tensor in tensors for size in tensor.shape if isinstance(size, SymInt)]
    mode = detect_fake_mode(tensors)
    # A reference that asks about a symbolic size must not specialise the user's program because somebody listens.
    quiet: Any = sizes[0].node.shape_env.suppress_guards() if sizes else nullcontext()  # type: ignore[attr-defined]

    def program(*given: Tensor) -> Any:
        fresh = iter(given)

        def argument(value: Any) -> Any:
            # An eps can be symbolic too (a float attribute with dynamic=True); no number of FLOPs depends on it.
            return next(fresh) if isinstance(value, Tensor) else 1.0 if isinstance(value, SymFloat) else value

        return op.reference(*tree_map(argument, args))

    with mode or nullcontext(), quiet, torch.no_grad():
        traced = make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True)(*(t.detach() for t in tensors))
    return sympy.Add(*map(flops, traced.graph.nodes))


def flops(node: Node) -> sympy.Expr:
    """The FLOPs of a node that is no fused op."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", "")
    operands = [value for leaf in tree_leaves(node.args) if isinstance(value := val(leaf), Tensor)]
    out = val(node)
    if name in _PRODUCTS and len(operands) > _PRODUCTS[name]:
        return 2 * _elements(out) * _size(operands[_PRODUCTS[name]].shape[-1])
    if name == "scaled_dot_product_attention" and len(operands) >= 3:
        q, k, v = operands[:3]
        scores = sympy.Mul(*map(_size, (*q.shape[:-1], k.shape[-2])))
        # Two products, a scale and a softmax.
        return scores * (2 * _size(q.shape[-1]) + 2 * _size(v.shape[-1]) + 1 + _ELEMENTWISE["softmax"])
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name] * _elements(out)
    if name in _REDUCTIONS:
        return sympy.Add(*map(_elements, operands))
    if isinstance(out, Tensor) and out.is_floating_point() and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _elements(out)
    return sympy.Integer(0)
