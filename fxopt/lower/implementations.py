"""Choosing how each fused op is computed, and tracing the transparent ones into the graph.

A transparent implementation is plain PyTorch: it is traced on the op's fake arguments and its nodes take the op's
place, so that Inductor fuses them with their neighbours and autograd differentiates them. An opaque one stays a single
call.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fxopt.graph.canonical import canonicalise
from fxopt.graph.query import val
from fxopt.lower.arguments import written
from fxopt.lower.strides import restore_strides
from fxopt.ops import FusedOp, Implementation, Target, find_op, spelled
from fxopt.rewrite.driver import STANDS_FOR
from fxopt.tune import Chosen, choose


@dataclass(frozen=True)
class Choice:
    """How one fused op is computed: its node's name (it may be gone), its implementation, what was passed over."""

    node: str
    op: str
    implementation: str
    provenance: Any  # the Rewrite that made the node, or None
    passed_over: tuple[tuple[str, str], ...]
    code: str  # what stands in the op's place: the traced nodes, or the source of the opaque call
    arguments: tuple[str, ...] = ()  # as expressions, sizes as at the first call
    opaque: bool = False
    placed: tuple[str, ...] = ()  # the nodes that stand in the op's place


def place_implementations(module: GraphModule, target: Target) -> list[Choice]:
    """Give every fused op in the graph of `module` an implementation, in place; what was chosen, in graph order.

    `target` says how the graph will run; its device is replaced by each op's own.
    """
    choices = []
    traces: dict[Any, GraphModule] = {}
    for node in list(module.graph.nodes):
        op = find_op(node.target)
        if op is None:
            continue
        args = op.bind(*node.args, **node.kwargs)
        fakes = tree_map(val, args)
        device = next(f.device for f in fakes if isinstance(f, Tensor))
        decision = choose(op, replace(target, device=device), fakes)
        chosen = decision.implementation
        name, made_by = node.name, node.meta.get("fxopt")
        placed: tuple[str, ...] = (name,)
        if chosen.overload is not None:
            node.target = chosen.overload
            if decision.config:
                node.kwargs = {**node.kwargs, "config": spelled(decision.config)}
            code = _source(chosen)
        else:
            code, placed = _inline(module.graph, node, op, decision, args, traces)
        if decision.note:
            code = f"# measured: {decision.note}\n{code}"
        passed_over, opaque = decision.passed_over, chosen.overload is not None
        choices.append(Choice(name, op.name, chosen.name, made_by, passed_over, code, written(fakes), opaque, placed))
    for node in list(module.graph.nodes):
        if STANDS_FOR in node.meta:  # an opaque call, or a raised form that stayed in part
            _restore(module.graph, node)
    module.graph.lint()
    module.recompile()
    return choices


def _source(chosen: Implementation) -> str:
    try:
        return inspect.getsource(chosen.run)
    except OSError:  # made in an interpreter session
        return repr(chosen.run)


def _inline(
    graph: Graph, node: Node, op: FusedOp, chosen: Chosen, args: tuple[Any, ...], traces: dict[Any, GraphModule]
) -> tuple[str, tuple[str, ...]]:
    """Put the trace of `chosen` in the place of `node`; the trace as text, and the nodes that are there now."""
    run = chosen.implementation.configured(chosen.config)
    leaves, structure = tree_flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    key = (op.name, chosen.implementation.name, spelled(chosen.config or {}), tuple(_key(leaf) for leaf in leaves))
    traced = traces.get(key)
    if traced is None:

        def program(*values: Any) -> Any:
            filled = list(leaves)
            for i, value in zip(dynamic, values, strict=True):
                filled[i] = value
            return run(*tree_unflatten(filled, structure))

        traced = traces[key] = _trace(program, [val(leaves[i]) for i in dynamic])
    results, placed = _copy(graph, node, op, traced, [leaves[i] for i in dynamic])
    originals = node.meta.get("val")
    if isinstance(originals, (tuple, list)):
        for user in list(node.users):
            index: Any = user.args[1]
            assert user.target is operator.getitem
            _replace(graph, user, results[index])
        graph.erase_node(node)
    else:
        _replace(graph, node, results[0])
    return str(traced.code).strip(), placed


def _key(leaf: Any) -> Any:
    """What a trace depends on, for one argument."""
    value = val(leaf)
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.device, tuple(map(str, value.shape)), tuple(map(str, value.stride())))
    if isinstance(leaf, Node):
        return ("symbol", str(value))
    return (type(leaf), str(leaf))


def _trace(program: Callable[..., Any], values: list[Any]) -> GraphModule:
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode, torch.no_grad():
        # Two nodes can have one fake value between them (copies of one trace do), and a trace knows its inputs by
        # identity: it would take the one for the other.
        values = [v.detach() if isinstance(v, Tensor) else v for v in values]
        traced = make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    traced.graph.eliminate_dead_code()
    canonicalise(traced)
    return traced


def _copy(
    graph: Graph, node: Node, op: FusedOp, traced: GraphModule, inputs: list[Node]
) -> tuple[list[Any], tuple[str, ...]]:
    """Copy the nodes of `traced` before `node`; the nodes that stand for its results, and the copies' names."""
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    environment: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
    placed = []
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op != "call_function":
                continue
            copy = graph.node_copy(inner, lambda n: environment[n])
            for key in ("stack_trace", "nn_module_stack", "from_node", "fxopt", "seq_nr"):
                if key in node.meta:
                    copy.meta[key] = node.meta[key]
            # What Inductor names kernels after, where it is asked to (descriptive_names="torch").
            copy.meta["source_fn_stack"] = [(node.name, op.name)]
            environment[inner] = copy
            placed.append(copy.name)
    return [environment[n] for n in tree_leaves(traced.graph.output_node().args[0])], tuple(placed)


def _replace(graph: Graph, old: Node, new: Node) -> None:
    old.replace_all_uses_with(restore_strides(graph, old, new))
    graph.erase_node(old)


def _restore(graph: Graph, node: Node) -> None:
    before = set(node.users)
    replacement = restore_strides(graph, node, node)
    if replacement is not node:
        node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user in before)
