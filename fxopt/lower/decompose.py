"""Decomposing a functional ATen graph node by node, with the table that the compiler behind it expects.

AOTAutograd decomposes while it traces; a graph that was traced with composites whole, and then rewritten, is decomposed
here. Each call that the table (or ATen itself) spells out is traced by itself on the fake values of its arguments, and
the trace takes its place. Nothing else is touched: in-place writes back to inputs, higher-order ops and data-dependent
sizes stay the nodes that they are, where a second trace of the whole graph would have to make them anew.

One pass in graph order: a value whose layout changed is computed anew before anybody asks for its strides.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fxopt.graph.query import is_mutable, val
from fxopt.lower.strides import restore_strides

Table = Mapping[Any, Callable[..., Any]]

#: what a node of a decomposition takes over from the node that it spells out
_CARRIED = ("stack_trace", "nn_module_stack", "seq_nr", "from_node", "fxopt", "original_aten", "source_fn_stack")


class DecomposeError(Exception):
    """A call can't be decomposed by itself; the message says which and why."""


def decompose(module: GraphModule, table: Table) -> int:
    """Decompose the graph of `module`, and those that it holds, in place; the number of calls that were spelled out.

    `table` maps overloads to their decompositions; ops that ATen itself defines by others are spelled out too. Values
    keep the strides that they had where somebody can tell. Raises DecomposeError; the graph is then partly done.
    """
    done = 0
    for child in {str(n.target) for n in module.graph.find_nodes(op="get_attr")}:
        held = getattr(module, child, None)
        if isinstance(held, GraphModule):
            done += decompose(held, table)
    done += _Decomposer(module, table).run()
    if done:
        module.graph.lint()
        module.recompile()
    return done


def is_composite(target: Any) -> bool:
    """Whether ATen defines the op by others and gives it no kernel of its own."""
    return isinstance(target, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )


class _Decomposer:
    def __init__(self, module: GraphModule, table: Table) -> None:
        self.module = module
        self.graph: Graph = module.graph
        self.table = table
        self.traces: dict[Any, GraphModule] = {}
        self.changed: set[Node] = set()  # nodes with a fake value other than the one that they came with
        self.mode = detect_fake_mode([val(n) for n in self.graph.nodes])

    def run(self) -> int:
        if self.mode is None:
            return 0  # a graph without tensors
        done = 0
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node._erased:
                continue
            if any(source in self.changed for source in node.all_input_nodes):
                self._refresh(node)
            if self._spelled_out(node):
                done += self._decompose(node)
        return done

    def _spelled_out(self, node: Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or is_mutable(node):
            return False
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(val(node))):
            return False  # sizes
        return node.target in self.table or is_composite(node.target)

    def _refresh(self, node: Node) -> None:
        """Compute the node's fake value anew: its inputs may be laid out otherwise, or share memory with others."""
        plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if not plain or "unbacked_bindings" in node.meta:
            return  # what a higher-order op returns is memory of its own, as are data-dependent results
        args, kwargs = tree_map(val, (node.args, node.kwargs))
        assert self.mode is not None
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        self.changed.add(node)

    def _decompose(self, node: Node) -> int:
        if "unbacked_bindings" in node.meta:
            raise DecomposeError(f"{node.target} at {node.name} has a data-dependent size")
        leaves, structure = tree_flatten((node.args, node.kwargs))
        dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
        key = (node.target, structure, tuple(_key(leaf) for leaf in leaves))
        traced = self.traces.get(key)
        if traced is None:

            def program(*values: Any) -> Any:
                filled = list(leaves)
                for i, value in zip(dynamic, values, strict=True):
                    filled[i] = value
                args, kwargs = tree_unflatten(filled, structure)
                return node.target(*args, **kwargs)  # type: ignore[operator]

            assert self.mode is not None
            traced = self.traces[key] = trace(program, [val(leaves[i]) for i in dynamic], self.table, self.mode)
        calls = [n for n in traced.graph.nodes if n.op == "call_function"]
        if any(call.target is node.target for call in calls) and len(calls) == 1:
            return 0  # the decomposition declined
        self._put(node, traced, [leaves[i] for i in dynamic])
        return 1

    def _put(self, node: Node, traced: GraphModule, inputs: list[Node]) -> None:
        graph = self.graph
        placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
        environment: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
        with graph.inserting_before(node):
            for inner in traced.graph.nodes:
                if inner.op == "get_attr":
                    environment[inner] = self._constant(node, traced, inner)
                elif inner.op == "call_function":
                    copy = graph.node_copy(inner, lambda n: environment[n])
                    carried = {key: node.meta[key] for key in _CARRIED if key in node.meta}
                    copy.meta = {"val": inner.meta.get("val"), **carried}
                    self._refresh(copy)
                    environment[inner] = copy
        results = [
            environment[n] if isinstance(n, Node) else n for n in tree_leaves(traced.graph.output_node().args[0])
        ]
        if isinstance(val(node), (tuple, list)):
            for user in list(node.users):
                index: Any = user.args[1]
                if user.target is not operator.getitem:
                    raise DecomposeError(f"{user.name} takes all results of {node.name} at once")
                self._replace(user, results[index])
            graph.erase_node(node)
        else:
            self._replace(node, results[0])
        for made in reversed(list(environment.values())):  # results that nobody asks for
            if made not in inputs and not made.users and not made.is_impure():
                graph.erase_node(made)

    def _replace(self, old: Node, new: Any) -> None:
        if not isinstance(new, Node) and old.users:
            raise DecomposeError(f"the decomposition of {old.name} returns no tensor")
        if old.users:
            kept = restore_strides(self.graph, old, new)
            self.changed.update({kept, new})
            old.replace_all_uses_with(kept)
        self.graph.erase_node(old)

    def _constant(self, node: Node, traced: GraphModule, inner: Node) -> Node:
        """A tensor that the decomposition made up, held by the module."""
        value = getattr(traced, str(inner.target))
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            raise DecomposeError(f"the decomposition of {node.name} holds {type(value).__name__} {inner.target}")
        name = next(n for i in range(1 << 20) if not hasattr(self.module, n := f"_fxopt_constant{i}"))
        self.module.register_buffer(name, value, persistent=False)
        made = self.graph.get_attr(name)
        assert self.mode is not None
        made.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return made


def trace(program: Callable[..., Any], values: Sequence[Any], table: Table, mode: FakeTensorMode) -> GraphModule:
    """The functional graph that AOTAutograd would make of `program` on the fake `values` of `mode`, for inference."""
    with mode, enable_python_dispatcher(), torch.no_grad():
        # A trace knows its inputs by identity; two nodes may have one fake value between them.
        inputs = [v.detach() if isinstance(v, Tensor) else v for v in values]
        traced = _make_fx(program, table, inputs)
        if any(is_mutable(n) for n in traced.graph.nodes):
            traced = _make_fx(dispatch_functionalize(program), table, inputs)
    traced.graph.eliminate_dead_code()
    return traced


def _make_fx(program: Callable[..., Any], table: Table, values: list[Any]) -> GraphModule:
    return make_fx(program, decomposition_table=dict(table), _allow_non_fake_inputs=True)(*values)


def _key(leaf: Any) -> Any:
    """What a trace depends on, for one argument."""
    value = val(leaf)
    if isinstance(value, Tensor):
        layout = tuple(map(str, value.stride())) if value.layout == torch.strided else str(value.layout)
        return ("tensor", value.dtype, value.device, tuple(map(str, value.shape)), layout)
    if isinstance(leaf, Node):
        return ("symbol", str(value))
    return (type(leaf), str(leaf))
