"""torch.func transforms taken out before the retrace: each region becomes the plain ops that it comes down to.

A pre-dispatch trace of a transform burns its wrapped tensors in as constants, and reports success. So every region (see
`levels`) is traced by itself, below autograd and autocast, and its ops take its place: they hold the casts of the
place, and run with autocast off.

Gradients flow through them as before: a transform does its work above the dispatch of plain ops, and those that the
trace holds are the ones that autograd records in eager mode. That is not so for higher-order ops, which bring a
backward of their own, and where gradients are switched on the way; there the graph is turned away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph import autocast
from fxopt.graph.higher_order import fake_like
from fxopt.graph.levels import call_name, gradient_modes, regions
from fxopt.graph.retrace import RetraceError, burned_in, detached, fake_inputs, quiet_unbacked, unwind_functorch

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast


def inline_transforms(module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph `module` without torch.func transforms; itself where it has none. Raises RetraceError."""
    found = regions(module.graph)
    if not found:
        return module
    modes = gradient_modes(module.graph)
    for region in found:
        reason = _objection(region, modes)
        if reason is not None:
            raise RetraceError(f"{reason}, in the torch.func transform at {region[0].name}")
    mode, fakes = fake_inputs(module, example_inputs)
    try:
        with mode, quiet_unbacked(mode), autocast.under(autocast.state()), _state_kept():
            values = _Values(module, found, mode)
            values.collect([detached(f) if isinstance(f, Tensor) else f for f in fakes])
            traced = [_trace(module, region, values, modes[region[0]]) for region in found]
    except RetraceError:
        raise
    except Exception as error:
        raise RetraceError(f"torch.func transform: {type(error).__name__}: {error}") from error
    return _spliced(module, found, traced)


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """Whatever fails inside, no level stays open and no switch stays turned."""
    hooks_off = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    forward, depth, inplace = torch._C._is_fwd_grad_enabled(), forward_ad._current_level, _inplace_allowed()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        unwind_functorch()
        torch._C._set_fwd_grad_enabled(forward)
        torch._C._functorch.set_inplace_requires_grad_allowed(inplace)
        while forward_ad._current_level > depth:
            forward_ad.exit_dual_level()
        if hooks_off is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(hooks_off)


def _inplace_allowed() -> bool:
    return bool(torch._C._functorch.get_inplace_requires_grad_allowed())


def _objection(region: Sequence[Node], modes: dict[Node, bool]) -> str | None:
    """Why the region must not be taken out, in words, or None."""
    sources, results = _borders(region)
    crossing = next((n for n in (*sources, *results) if n.target is _ENTER_AUTOCAST), None)
    if crossing is not None:
        return f"the autocast region {crossing.name} begins or ends"
    if any(node.op == "output" or node.op == "placeholder" for node in region):
        return "a tensor of its levels is returned"
    after = region[-1].next
    differentiated = any(_requires_grad(source) for source in sources)
    if modes[after] != modes[region[0]] or (differentiated and len({modes[n] for n in region}) > 1):
        return "gradients are switched"
    within = {call_name(node) for node in region}
    if differentiated or within & {"_grad_increment_nesting", "_jvp_increment_nesting"}:
        for node in region:
            if isinstance(node.target, HigherOrderOperator):
                return f"there is a higher-order op ({node.target._name}) that gradients flow through"
            if call_name(node) in ("_get_data_attr", "_set_data_attr"):
                return "there is a .data that gradients would flow through"
    return None


def _requires_grad(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _borders(region: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes outside that a region uses, and its own nodes that are used outside."""
    inside = set(region)
    used = dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in inside)
    return list(used), [node for node in region if any(user not in inside for user in node.users)]


class _Values(autocast.Obeying):
    """Runs the graph on fakes up to its last region, for the values that the regions use and their autocast states.

    Not higher-order ops, which decide by values that nobody has here: Dynamo says what they return.
    """

    def __init__(self, module: GraphModule, found: Sequence[Sequence[Node]], mode: FakeTensorMode) -> None:
        super().__init__(module)
        self.mode = mode
        self.nodes = list(module.graph.nodes)
        self.wanted = {node for region in found for node in _borders(region)[0]}
        self.first, self.last = {region[0] for region in found}, found[-1][-1]
        self.found: dict[Node, Any] = {}
        self.states: dict[Node, autocast.State] = {}  # of the first node of each region

    def collect(self, fakes: Sequence[Any]) -> None:
        inputs = iter(fakes)
        for node in self.nodes:
            if node in self.first:
                self.states[node] = autocast.state()
            if isinstance(node.target, HigherOrderOperator) and "example_value" in node.meta:
                self.env[node] = tree_map(self._plain_fake, node.meta["example_value"])
            else:
                self.env[node] = next(inputs) if node.op == "placeholder" else self.run_node(node)
            if node in self.wanted:
                self.found[node] = self.env[node]
            if node is self.last:
                break

    def _plain_fake(self, example: Any) -> Any:
        made = fake_like(example, self.mode)
        return made.detach() if isinstance(made, Tensor) else made


def _trace(module: GraphModule, region: Sequence[Node], values: _Values, gradients: bool) -> GraphModule:
    """The region as a program of what it uses, in ATen below autograd; it returns what is used of it."""
    sources, results = _borders(region)
    graph = Graph()
    copies = {source: graph.placeholder(source.name) for source in sources}
    for node in region:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([copies[node] for node in results])
    program = GraphModule(module, graph)
    inputs = []
    for source in sources:
        value = values.found[source]
        if isinstance(value, Tensor):
            value = value.detach().requires_grad_(gradients and _requires_grad(source))
        inputs.append(value)
    made: list[Any] = []

    def run(*inputs: Any) -> Any:
        made[:] = autocast.Obeying(program).run(*inputs)
        return list(made)

    with autocast.under(values.states[region[0]]), torch.set_grad_enabled(gradients):
        traced = make_fx(run, _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(*inputs)
    if (reason := burned_in(traced)) is not None:
        raise RetraceError(reason)
    for node, value in zip(results, made, strict=True):
        if isinstance(value, Tensor) and value.requires_grad != _requires_grad(node):
            raise RetraceError(
                f"{node.name} {'needs' if value.requires_grad else 'needs no'} gradient in the trace only"
            )
    traced.graph.eliminate_dead_code()  # what autograd keeps for itself
    return traced


def _spliced(module: GraphModule, found: Sequence[Sequence[Node]], traced: Sequence[GraphModule]) -> GraphModule:
    """A copy of `module` with the traces in the place of the regions."""
    graph = Graph()
    copies: dict[Node, Any] = {}
    inside = {node for region in found for node in region}
    traces = {region[0]: (region, trace) for region, trace in zip(found, traced, strict=True)}
    constants: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node in traces:
            region, trace = traces[node]
            sources, results = _borders(region)
            for source in sources:
                if source.op == "get_attr" and source not in copies:  # which may stand further down
                    copies[source] = graph.node_copy(source)
            outputs = _copy(trace, graph, [copies[s] for s in sources], constants)
            for result, output in zip(results, outputs, strict=True):
                copies[result] = output
                if isinstance(output, Node):
                    output.meta = {**result.meta, **output.meta}
        if node not in inside and node not in copies:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if hasattr(node, "_dynamo_source"):
                copies[node]._dynamo_source = node._dynamo_source
    spliced = GraphModule(module, graph)
    for name, value in constants.items():
        spliced.register_buffer(name, value, persistent=False)
    spliced.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        spliced._param_name_to_source = module._param_name_to_source
    return spliced


def _copy(trace: GraphModule, graph: Graph, inputs: Sequence[Any], constants: dict[str, Any]) -> list[Any]:
    """Copy the ops of `trace` to the end of `graph`; its outputs there. Its constants go to `constants`."""
    given = iter(inputs)
    copies: dict[Node, Any] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op == "get_attr":
            name = f"_transform_constant{len(constants)}"
            constants[name] = getattr(trace, str(node.target))
            copies[node] = graph.create_node("get_attr", name)
        elif node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta[autocast.EXPLICIT] = True
    return [copies[leaf] if isinstance(leaf, Node) else leaf for leaf in tree_leaves(trace.graph.output_node().args[0])]
