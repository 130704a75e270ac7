"""Higher-order ops in the retrace: recorded as one call, with their graphs attached, between which all is normalised.

What such an op does with its graphs is its own business (run one of two, loop, recompute in the backward), so it is not
run in the trace: its results are fakes with the metadata that Dynamo gave them. Everything later treats the call as a
barrier that may write to any of its arguments.

The graphs of some ops are plain forward programs of their operands. These are brought into normal form themselves, and
fused in like any graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.autocast import State
from fxopt.graph.query import storage, val

#: ops that may stand in a normal form as one call
OPAQUE = frozenset(
    {
        "tag_activation_checkpoint",
        "wrap",
        "cond",
        "while_loop",
        "map_impl",
        "scan",
        "associative_scan",
        "flex_attention",
        "autograd_function_apply",
        "triton_kernel_wrapper_mutation",
        "triton_kernel_wrapper_functional",
    }
)

#: of these, the ops whose first argument is a graph that is run on the rest, once
_RUN_ONCE = frozenset({"tag_activation_checkpoint", "wrap"})

#: meta key of such a call: the autocast state its graph runs under
BODY_UNDER = "fxopt_body_autocast"

#: keyword arguments of torch.utils.checkpoint itself; any other belongs to the checkpointed function
_CHECKPOINT_OPTIONS = frozenset(
    {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
)


class OpaqueError(Exception):
    """The call can't stand in a normal form; the message says why."""


def is_region(target: Any) -> bool:
    """Whether `target` runs a region that the user marked to be compiled once (torch.compiler.nested_compile_region).

    It is run in the trace like any code. What is repeated, the lowering finds by itself, after the fusions.
    """
    return target is torch.ops.higher_order.invoke_subgraph


def is_opaque(target: Any) -> bool:
    """Whether `target` is a higher-order op that may stand in a normal form as one call."""
    return isinstance(target, HigherOrderOperator) and target._name in OPAQUE


def record(node: Node, args: Any, kwargs: Any, mode: FakeTensorMode, on: State) -> Any:
    """Record `node`, a call of a higher-order op, in the current trace; its results.

    `args` and `kwargs` are its arguments in the trace, `on` is the autocast state it runs under. Raises OpaqueError.
    """
    graphs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, GraphModule)]
    if on and graphs and not _runs_once(node):
        raise OpaqueError(f"{node.name} runs a graph under autocast, whose casts would be lost")
    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None
    tracer: Any = proxy_mode.tracer
    template = node.meta["example_value"] if "example_value" in node.meta else val(node)
    with disable_proxy_modes_tracing():
        results = tree_map(lambda leaf: _rehome(leaf, node, mode), template)
    for body in graphs:
        _attach(tracer.root, body)
    proxies = tree_map(tracer.unwrap_proxy, (args, kwargs))
    call = tracer.create_proxy("call_function", node.target, *proxies)
    call.node.meta["example_value"] = template  # which knows what needs gradients; a trace's own values don't
    if on:
        call.node.meta[BODY_UNDER] = on
    return track_tensor_tree(results, call, constant=None, tracer=tracer)


def _rehome(leaf: Any, node: Node, mode: FakeTensorMode) -> Any:
    """A fake of `mode` like `leaf`, which may be of Dynamo's own mode."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.layout != torch.strided or is_traceable_wrapper_subclass(leaf):
        raise OpaqueError(f"{node.name} returns a tensor that is not a plain strided one")
    if storage(leaf) in {storage(v) for n in node.all_input_nodes for v in tree_leaves(_value(n))}:
        raise OpaqueError(f"{node.name} returns a view of one of its arguments")
    with mode:
        return torch.empty_strided(
            leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device, requires_grad=leaf.requires_grad
        )


def _value(node: Node) -> Any:
    return node.meta["example_value"] if "example_value" in node.meta else val(node)


def _attach(root: torch.nn.Module, body: GraphModule) -> None:
    if any(body is known for known in root.children()):
        return
    root.register_module(next(n for i in count() if not hasattr(root, n := f"subgraph_{i}")), body)


def _runs_once(node: Node) -> bool:
    return getattr(node.target, "_name", "") in _RUN_ONCE


def bodies(module: GraphModule) -> Iterator[tuple[Node, str, GraphModule, tuple[Any, ...]]]:
    """The graphs in the normal form `module` that may be brought into normal form: (call, attribute, graph, operands).

    Left out are graphs whose op decides by the ops in it (selective checkpointing), or binds operands by name.
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or not _runs_once(node):
            continue
        body, *operands = node.args
        graph = getattr(module, str(body.target))
        if node.kwargs.keys() <= _CHECKPOINT_OPTIONS and "_checkpoint_context_fn" not in graph.meta:
            yield node, str(body.target), graph, tuple(val(o) for o in operands)
