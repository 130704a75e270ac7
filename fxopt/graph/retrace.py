"""Dynamo's graph, retraced into the normal form: ATen with composite ops whole, autograd still below.

The retrace runs on fake tensors of the tracing context's own mode, never on the real inputs (those are the user's
parameters and KV caches: running the graph on them would write to the caches). Every placeholder keeps its name and
metadata, without which Inductor forgets which inputs are static and copies the weights in each CUDA-graph replay.

Afterwards the trace is compared with Dynamo's own: dtypes, shapes, requires_grad, which outputs alias which inputs, and
which inputs are written to. Any difference discards it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_leaves

from fxopt.graph import autocast
from fxopt.graph.higher_order import BODY_UNDER, is_opaque, is_region, record
from fxopt.graph.query import storage, written_arguments
from fxopt.graph.replay import Replay
from fxopt.graph.symbols import same_shape


class RetraceError(Exception):
    """The graph could not be retraced faithfully; the message says why."""


def retrace(module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The normal form of Dynamo's graph `module`. Raises RetraceError where it would not be the same program.

    Autocast is made explicit: the normal form computes the same with autocast off, and must run so.
    """
    mode, fakes = fake_inputs(module, example_inputs)
    try:
        with autocast.under(autocast.state()):  # restored, should the trace end inside an autocast region
            traced = _trace(module, fakes, mode)
        for _ in range(autocast.MOST_PASSES):
            if not autocast.is_marked(traced.module):
                break
            with autocast.under(()):
                traced = _trace(traced.module, fakes, mode)
        else:
            raise RetraceError("autocast casts inside of ops that don't come apart")
    except Exception as error:
        raise RetraceError(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    finally:
        unwind_functorch()

    placeholders = _placeholders(module)
    _carry_metadata(module, placeholders, traced.module)
    difference = burned_in(traced.module) or _difference(module, placeholders, traced)
    if difference is not None:
        raise RetraceError(difference)
    return traced.module


@dataclass
class _Traced:
    """What one trace gave."""

    module: GraphModule
    inputs: list[Any]  # fakes
    result: Any
    written: set[int]  # inputs whose fakes were written to


def _trace(module: GraphModule, fakes: Sequence[Any], mode: FakeTensorMode) -> _Traced:
    results: list[Any] = []
    inputs = [_copy(f) for f in fakes]
    versions = [_version(f) for f in inputs]
    retracer = _Retracer(module, mode)

    def program(*inputs: Any) -> Any:
        out = retracer.run(*inputs)
        results[:] = [out]
        return out

    with preserve_node_meta(), mode, quiet_unbacked(mode), _unseen_by_hooks():
        traced = make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(
            *inputs
        )
    written = {i for i, (f, v) in enumerate(zip(inputs, versions, strict=True)) if _version(f) != v}
    return _Traced(traced, inputs, results[0], written)


def _unseen_by_hooks() -> Any:
    """What the trace saves for a backward that nobody runs is not for the user's hooks (checkpointing counts it)."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _copy(fake: Any) -> Any:
    """The same input for another trace, without the autograd history that writing to it in a trace gives it."""
    if not isinstance(fake, Tensor) or not fake.is_leaf:  # a leaf in its place could not be written to
        return fake
    return detached(fake).requires_grad_(fake.requires_grad)


def detached(fake: Tensor) -> Tensor:
    """`fake.detach()` that knows the symbol that `fake.item()` gives."""
    copied: Any = fake.detach()
    if isinstance(fake, FakeTensor) and fake.item_memo is not None:
        copied.item_memo = fake.item_memo
    return copied


class _Retracer(autocast.Obeying):
    """Runs a graph in a trace: Dynamo's, or one of an earlier trace whose casts are not explicit yet."""

    def __init__(self, module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.explicit = autocast.Explicit(module)
        self.replay = Replay()

    def run_node(self, n: Node) -> Any:
        self.node = n
        with autocast.under(()) if autocast.EXPLICIT in n.meta else contextlib.nullcontext(), autocast.marking():
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_region(target):
            graph, _, *operands = args
            return _Retracer(graph, self.mode).run(*operands)
        if is_opaque(target):
            on = self.node.meta.get(BODY_UNDER) or self.node.meta.get(autocast.UNDER) or autocast.state()
            return record(self.node, args, kwargs, self.mode, on)
        if target is _GET_DATA and not torch.is_grad_enabled():
            # Without gradients `x.data` is `x.detach()`, which a trace can see. With them the trace is discarded.
            return args[0].detach()
        if autocast.UNDER in self.node.meta and isinstance(target, torch._ops.OpOverload):
            return self.explicit.call(self.node, target, args, kwargs)
        call = super().call_function
        return self.replay(lambda: call(target, args, kwargs), target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = super().call_method
        return self.replay(lambda: call(target, args, kwargs), target, args, kwargs)


_GET_DATA = getattr(torch._C._autograd, "_get_data_attr", object())


def fake_inputs(module: GraphModule, example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """The fake mode that `module` is to be traced in, and its inputs as fakes of that mode."""
    placeholders = _placeholders(module)
    mode = _fake_mode(placeholders)
    return mode, [_fake(p, x, mode) for p, x in zip(placeholders, example_inputs, strict=True)]


def _placeholders(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _fake_mode(placeholders: Sequence[Node]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    found = detect_fake_mode([p.meta.get("example_value") for p in placeholders])
    return found or FakeTensorMode(allow_non_fake_inputs=True)


def _fake(placeholder: Node, value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, FakeTensor):
        if value.fake_mode is not mode:
            raise RetraceError(f"the input {placeholder.name} is a fake tensor of another mode")
        return value
    if isinstance(value, Tensor):
        context = TracingContext.try_get()
        symbolic = context.tensor_to_context.get(value) if context is not None else None
        source = _source(placeholder)
        if symbolic is None:
            return mode.from_tensor(value, static_shapes=True, source=source)
        return mode.from_tensor(value, symbolic_context=symbolic, source=source)
    return placeholder.meta.get("example_value", value)


def _source(placeholder: Node) -> Any:
    """Where in the user's program an input comes from; a copied graph has it in the metadata only.

    Without it a float that became an input gets no symbol, and `.item()` on it nothing to return.
    """
    return getattr(placeholder, "_dynamo_source", None) or getattr(placeholder.meta.get("grapharg"), "source", None)


def quiet_unbacked(mode: FakeTensorMode) -> Any:
    """`.item()` makes unbacked symbols that the trace binds by itself."""
    return mode.shape_env.ignore_fresh_unbacked_symbols() if mode.shape_env else contextlib.nullcontext()


def _version(value: Any) -> int:
    if not isinstance(value, Tensor) or value.is_inference():
        return 0
    return value._version


def unwind_functorch() -> None:
    """A trace that fails inside a transform leaves functorch's stack behind; later traces would be wrong."""
    while torch._C._functorch.peek_interpreter_stack() is not None:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)


def _carry_metadata(module: GraphModule, old: Sequence[Node], traced: GraphModule) -> None:
    traced.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        traced._param_name_to_source = module._param_name_to_source
    for before, after in zip(old, _placeholders(traced), strict=True):
        value = after.meta.get("val")
        after.meta.update(before.meta)
        after.meta["val"] = value
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        after.name = before.name
        after.target = before.target
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            _name_constant(traced, node)
    traced.recompile()


def _name_constant(traced: GraphModule, node: Node) -> None:
    """AOTAutograd asks every lifted constant for its source; those that the trace made have none yet."""
    from torch._dynamo.source import ConstantSource

    sources = getattr(traced, "_param_name_to_source", None)
    value = getattr(traced, str(node.target), None)
    if sources is not None and isinstance(value, Tensor):
        sources.setdefault(str(node.target), ConstantSource(str(node.target)))
    if isinstance(value, Tensor) and str(node.target) not in traced._buffers:
        delattr(traced, str(node.target))
        traced.register_buffer(str(node.target), value, persistent=False)
    node.meta.setdefault("val", value)


def burned_in(traced: GraphModule) -> str | None:
    """Which tensor of the tracing itself the trace holds as a constant, in words, or None."""
    for node in traced.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(traced, str(node.target), None)
        if isinstance(value, FakeTensor) or (
            isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)
        ):
            return f"the trace burned in a tensor of the tracing itself ({node.target})"
    return None


def _difference(module: GraphModule, placeholders: Sequence[Node], traced: _Traced) -> str | None:
    """How the trace differs from Dynamo's own account of the graph, or None."""
    before = tree_leaves([_example(n) for n in tree_leaves(_output(module))])
    after = tree_leaves(traced.result)
    if len(before) != len(after):
        return f"the trace returns {len(after)} values, the graph {len(before)}"
    homes_before = _homes([p.meta.get("example_value") for p in placeholders])
    homes_after = _homes(traced.inputs)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.dtype != b.dtype:
            return f"output {i} is {b.dtype} in the trace, {a.dtype} in the graph"
        if a.dim() != b.dim() or (_all_static(a, b) and not same_shape(a.shape, b.shape)):
            return f"output {i} has the shape {tuple(b.shape)} in the trace, {tuple(a.shape)} in the graph"
        if a.requires_grad != b.requires_grad:
            return f"output {i} {'requires' if b.requires_grad else 'does not require'} grad in the trace only"
        if homes_before.get(storage(a)) != homes_after.get(storage(b)):
            return f"output {i} aliases another input in the trace than in the graph"
    named = {homes_after[storage(traced.inputs[i])] for i in traced.written if isinstance(traced.inputs[i], Tensor)}
    stated = _written_inputs(traced.module, homes_after, stated=True)
    # What an op writes without saying so in its schema shows in the version of a fake tensor only sometimes.
    possible = stated | _written_inputs(traced.module, homes_after, stated=False)
    if not stated <= named <= possible:
        wrong = sorted((stated - named) | (named - possible))
        return f"the inputs {wrong} are written to in the trace or in the graph, not in both"
    return None


def _output(module: GraphModule) -> Any:
    return next(n for n in reversed(module.graph.nodes) if n.op == "output").args[0]


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def _homes(values: Sequence[Any]) -> dict[int | None, int]:
    """Storage -> the first input that lives in it."""
    found: dict[int | None, int] = {}
    for i, value in enumerate(values):
        if storage(value) is not None:
            found.setdefault(storage(value), i)
    return found


def _written_inputs(traced: GraphModule, homes: dict[int | None, int], *, stated: bool) -> set[int]:
    """The inputs that nodes write to whose schema says so (`stated`), or doesn't."""
    written = [
        node.meta.get("val")
        for writer in traced.graph.nodes
        for node in written_arguments(writer)
        if _states_its_writes(writer) == stated
    ]
    return {homes[storage(value)] for value in written if storage(value) in homes}


def _states_its_writes(node: Node) -> bool:
    """Whether the schema of the op says what it writes, and version counters count it.

    They count in-place and out= ops. ATen ops that write to something beside what they return (running statistics) go
    uncounted.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    beside = not schema.name.endswith("_") and not any(a.is_out for a in schema.arguments)
    return not (beside and schema.name.startswith("aten::"))


def _all_static(a: Tensor, b: Tensor) -> bool:
    return all(isinstance(s, int) for t in (a, b) for s in t.shape)
