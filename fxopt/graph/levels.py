"""Where the levels of torch.func transforms are open in Dynamo's graph.

Dynamo writes a transform (vmap, grad, vjp, jvp, and what is made of them) as calls that open a level, wrap and unwrap
tensors of it, and close it. A region is a stretch from the call that opens the outermost level to the one that closes
it, or to the last node that reads a tensor of a level: what `vjp` returns is called after its level is closed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

_VMAP, _GRAD, _JVP = "_vmap", "_grad", "_jvp"
_OPEN = {f"{kind}_increment_nesting" for kind in (_VMAP, _GRAD, _JVP)}
_CLOSE = {f"{kind}_decrement_nesting" for kind in (_VMAP, _GRAD, _JVP)}
_HOOKS_OFF, _HOOKS_ON = "_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable"

#: position of the level among the arguments of what takes a tensor out of it
_UNWRAP = {"_unwrap_for_grad": 1, "_remove_batch_dim": 1}

#: what Dynamo makes of transforms, besides the ops that they transform
CALLS = frozenset(
    {
        *_OPEN,
        *_CLOSE,
        *_UNWRAP,
        _HOOKS_OFF,
        _HOOKS_ON,
        "lazy_load_decompositions",
        "_maybe_load_decompositions",
        "_add_batch_dim",
        "_wrap_for_grad",
        "_set_tensor_requires_grad",
        "set_inplace_requires_grad_allowed",
        "_autograd_grad",
        "_set_fwd_grad_enabled",
        "_enter_dual_level",
        "_exit_dual_level",
        "_make_dual",
        "_unpack_dual",
    }
)


def call_name(node: Node) -> str:
    """The name of the function that the node calls; "" for any other node."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def is_transform_call(node: Node) -> bool:
    """Whether the node is a call that only a torch.func transform makes."""
    return call_name(node) in CALLS and "OpOverload" not in type(node.target).__name__


def regions(graph: Graph) -> list[list[Node]]:
    """The stretches of the graph where a level is open, or a tensor of one is still read, in graph order.

    Constants (get_attr) are left out: they belong to no level.
    """
    nodes = list(graph.nodes)
    spans: list[list[int]] = []  # [first, last], disjoint, in order
    owner: dict[Node, int] = {}  # a value of a level -> the first node of its span
    for first, last in _open(nodes):
        spans.append([first, last])
    inside = {i for first, last in spans for i in range(first, last + 1)}
    starts = {i: first for first, last in spans for i in range(first, last + 1)}
    for i, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        read = [owner[source] for source in node.all_input_nodes if source in owner]
        if i in inside:
            read.append(starts[i])
            held = _has_tensors(node) and not _takes_out(node)
        else:
            # What autograd computes where no level is open belongs to none.
            held = call_name(node) not in ("_autograd_grad", *_UNWRAP)
        if read:
            spans.append([min(read), i])
            if held:
                owner[node] = min(read)
            elif node.users and isinstance(node.meta.get("example_value"), (tuple, list)):
                last = max((u for u in node.users if u.target is operator.getitem), default=node)
                spans.append([min(read), nodes.index(last, i)])  # several results leave a region one by one
    return [[n for n in nodes[first : last + 1] if n.op != "get_attr"] for first, last in _merged(spans)]


def _open(nodes: Sequence[Node]) -> Iterator[tuple[int, int]]:
    """(first, last) of each stretch with a level open, or hooks on saved tensors switched off for one.

    Where these are switched off for no level, the switches stand alone: nothing is left of them.
    """
    depth, first, hooks_off, levels = 0, -1, False, 0
    for i, node in enumerate(nodes):
        name = call_name(node)
        if name == "lazy_load_decompositions" and first < 0:
            yield i, i  # nothing is left of it outside of a level
        hooks_off = name == _HOOKS_OFF or (hooks_off and name != _HOOKS_ON)
        depth += (name in _OPEN) - (name in _CLOSE)
        levels += name in _OPEN
        if first < 0 and (depth or hooks_off):
            first, levels = i, depth
        if first >= 0 and not (depth or hooks_off):
            yield from [(first, i)] if levels else [(first, first), (i, i)]
            first = -1
    if first >= 0:
        yield first, len(nodes) - 2  # the last is the output


def _merged(spans: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def _has_tensors(node: Node) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("example_value")))


def _takes_out(node: Node) -> bool:
    """Whether the node takes a tensor out of the outermost level."""
    where = _UNWRAP.get(call_name(node))
    return where is not None and bool(node.args[where] == 1)


def gradient_modes(graph: Graph) -> dict[Node, bool]:
    """Whether gradients are on for tensors of no level, at each node.

    A grad level keeps the mode that it was opened under for what lies below it.
    """
    enabled, outer = torch.is_grad_enabled(), list[bool]()
    modes = {}
    for node in graph.nodes:
        name = call_name(node)
        if name == f"{_GRAD}_increment_nesting":
            outer.append(enabled)
        elif name == f"{_GRAD}_decrement_nesting" and outer:
            outer.pop()
        elif name == "_set_grad_enabled":
            enabled = bool(node.args[0])
        modes[node] = outer[0] if outer else enabled
    return modes
