"""Shared bodies as opaque ops while AOTAutograd traces, so that its time does not grow with the number of layers.

AOTAutograd enters the body of an `invoke_subgraph` at every call, once for each thing it wants to know. For inference,
where a body neither writes nor returns what it was given, it needs to know only what the call returns. So each call is
sealed, as

    fxopt_lower::body(name, operands, sizes) -> results

and on the way to Inductor opened again, every body traced once: functional, decomposed by the table that Inductor asks
for, with the passes that Inductor runs before it is given a graph. The name is a hash of the body's code, so both
compilation caches tell bodies apart.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes

from fxopt.graph.query import val
from fxopt.lower.decompose import trace
from fxopt.lower.outline_labels import expression
from fxopt.lower.outline_memory import PREFIX, SIZE, check_bodies

_library = torch.library.Library("fxopt_lower", "DEF")
_library.define("body(str name, Tensor[] operands, SymInt[] sizes) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


class _Sealed:
    """A body, and what it returned for operands of each kind."""

    def __init__(self, body: GraphModule) -> None:
        self.body = body
        self.returned: dict[Any, list[Tensor]] = {}


_bodies: dict[str, _Sealed] = {}  # of the compilation under way; Dynamo compiles one graph at a time


@torch.library.impl(_library, "body", "CompositeExplicitAutograd")
def _run(name: str, operands: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return list(Interpreter(_bodies[name].body).run(*operands, *sizes))


@torch.library.register_fake("fxopt_lower::body", lib=_library)  # type: ignore[untyped-decorator]
def _returned(name: str, operands: Sequence[Tensor], sizes: Sequence[Any]) -> list[Tensor]:
    known = _bodies[name].returned
    key = tuple(map(_described, (*operands, *sizes)))
    if key not in known:
        known[key] = _run(name, operands, sizes)
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in known[key]]


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device, *map(expression, (*value.shape, *value.stride()))
    return expression(value)


@contextlib.contextmanager
def sealed(module: GraphModule) -> Iterator[None]:
    """Seal the calls of `module`'s bodies, in place, for as long as it is compiled: until then they can be opened."""
    names: dict[str, str] = {}
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        held, label, *given = node.args
        if not str(label).startswith(PREFIX):
            continue
        body = getattr(module, held.target)
        if held.target not in names:
            names[held.target] = PREFIX + hashlib.sha256(body.code.encode()).hexdigest()[:16]
            _bodies[names[held.target]] = _Sealed(body)
        inputs = body.graph.find_nodes(op="placeholder")
        tensors = sum(not str(n.target).startswith(SIZE) for n in inputs)
        node.target = torch.ops.fxopt_lower.body.default
        node.args = (names[held.target], given[:tensors], given[tensors:])
        if not held.users:
            module.graph.erase_node(held)
    for target in names:
        delattr(module, target)
    module.recompile()
    try:
        yield
    finally:
        for name in names.values():
            _bodies.pop(name, None)


def opening_inner(graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Inductor's inner compiler, for graphs with sealed calls. Raises SharedMemoryError (see outline_memory)."""
    from torch._inductor.compile_fx import compile_fx_inner

    unseal(graph)
    check_bodies(graph)
    return compile_fx_inner(graph, *args, **kwargs)


def unseal(graph: GraphModule) -> None:
    """Turn the sealed calls in a graph that AOTAutograd made into calls of bodies, in place, ready for Inductor."""
    opened: set[str] = set()
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.fxopt_lower.body.default):
        name, tensors, sizes = node.args
        if name not in opened:
            opened.add(name)
            setattr(graph, name, _traced(_bodies[name].body, [*tensors, *sizes]))
        with graph.graph.inserting_before(node):
            held = graph.graph.get_attr(name)
            call = graph.graph.call_function(torch.ops.higher_order.invoke_subgraph, (held, name, *tensors, *sizes))
        call.meta = dict(node.meta) | {"val": tuple(val(node))}
        if "eager_input_vals" in node.meta:  # the layouts that the call's operands must have
            (_, operands, numbers), _ = node.meta["eager_input_vals"]
            call.meta["eager_input_vals"] = (None, name, *operands, *numbers), {}
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    if opened:
        graph.graph.lint()
        graph.recompile()


def _traced(body: GraphModule, given: Sequence[Node]) -> GraphModule:
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    values = [val(n) for n in given]
    mode = detect_fake_mode(values)
    assert mode is not None
    with _disable_current_modes():
        traced = trace(Interpreter(body).run, values, select_decomp_table(), mode)
    joint_graph_passes(traced)
    return traced
