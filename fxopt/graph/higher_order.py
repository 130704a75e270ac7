"""Higher-order ops in the retrace: recorded as one call, with their graphs attached, between which all is normalised.

What such an op does with its graphs is its own business (run one of two, loop, recompute in the backward), so it is not
run in the trace: its results are fakes with the metadata that Dynamo gave them. Everything later treats the call as a
barrier that may write to any of its arguments.

The graphs of most ops are plain forward programs (the branches of a cond, the body of a loop, a checkpointed region).
These are brought into normal form themselves, and fused in like any graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
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

#: ops whose graphs are plain forward programs: where these are among the arguments
_GRAPHS = {
    **dict.fromkeys(_RUN_ONCE, (0,)),
    "cond": (1, 2),
    "while_loop": (0, 1),
    "map_impl": (0,),
    "scan": (0,),
}

#: meta key of such a call: the autocast state its graphs run under
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
    if on and graphs and _name(node) not in _GRAPHS:
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


def _name(node: Node) -> str:
    return getattr(node.target, "_name", "")


def runs_once(node: Node) -> bool:
    """Whether the call runs its one graph on its operands, once."""
    return _name(node) in _RUN_ONCE


def bodies(module: GraphModule) -> Iterator[tuple[Node, str, GraphModule, list[Any]]]:
    """The graphs in the normal form `module` that may be brought into normal form: (call, attribute, graph, inputs).

    The inputs are fakes of what the graph is given, which need gradients where Dynamo says so. Left out are graphs
    whose op decides by the ops in it (selective checkpointing), or binds operands by name.
    """
    for node in module.graph.nodes:
        name = _name(node) if node.op == "call_function" else ""
        if not node.kwargs.keys() <= (_CHECKPOINT_OPTIONS if name in _RUN_ONCE else frozenset()):
            continue
        for position in _GRAPHS.get(name, ())[: len(node.args)]:
            attribute = str(node.args[position].target)
            graph = getattr(module, attribute)
            placeholders = graph.graph.find_nodes(op="placeholder")
            if "_checkpoint_context_fn" in graph.meta:
                continue
            if name in _RUN_ONCE:
                given = [val(operand) for operand in node.args[1:]]
                inputs = [_leaf(p, v) for p, v in zip(placeholders, given, strict=True)]
            else:  # which is given slices, or what an earlier step made
                mode = detect_fake_mode(val(node))
                inputs = [fake_like(_example(p), mode) for p in placeholders]
            yield node, attribute, graph, inputs


def _example(placeholder: Node) -> Any:
    return placeholder.meta["example_value"]


def _leaf(placeholder: Node, value: Any) -> Any:
    """The operand without its autograd history."""
    return value.detach().requires_grad_(_example(placeholder).requires_grad) if isinstance(value, Tensor) else value


def fake_like(example: Any, mode: FakeTensorMode | None) -> Any:
    """A fake of `mode` like the tensor `example`, which Dynamo may have of a mode of its own; itself if it is none."""
    if not isinstance(example, Tensor) or mode is None:
        return example
    with mode:
        made = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=example.device)
    return made.requires_grad_(example.requires_grad)
