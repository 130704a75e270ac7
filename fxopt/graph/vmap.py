"""torch.vmap regions taken out before the retrace: each becomes the batched ops that it comes down to.

Dynamo writes a vmap as calls that open a level, wrap and unwrap batched tensors, and close it. A pre-dispatch trace of
these burns the batched tensors in as constants, and reports success. So the stretch from the call that opens the
outermost level to the one that closes it is traced by itself, below autograd and autocast, and its ops take its place:
they hold the casts of the place, and run with autocast off. That is the same program unless gradients flow through it:
there the graph is turned away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fxopt.graph import autocast
from fxopt.graph.retrace import RetraceError, burned_in, fake_inputs, quiet_unbacked, unwind_functorch

_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast


def inline_vmaps(module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph `module` without vmap regions; itself where it has none. Raises RetraceError."""
    regions = list(_regions(module.graph))
    if not regions:
        return module
    for region in regions:
        for node in region:
            if any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves(node.meta.get("example_value"))):
                raise RetraceError(f"gradients flow through the vmap at {node.name}")
        crossing = next((n for nodes in _borders(region) for n in nodes if n.target is _ENTER_AUTOCAST), None)
        if crossing is not None:
            raise RetraceError(f"the autocast region {crossing.name} and a vmap overlap")
    mode, fakes = fake_inputs(module, example_inputs)
    try:
        with mode, quiet_unbacked(mode), torch.no_grad(), autocast.under(autocast.state()):
            values = _Values(module, regions)
            values.collect(fakes)
            traced = [_trace(module, region, values) for region in regions]
    except Exception as error:
        raise RetraceError(f"vmap: {type(error).__name__}: {error}") from error
    finally:
        unwind_functorch()
    return _spliced(module, regions, traced)


def _regions(graph: Graph) -> Iterator[list[Node]]:
    """The stretches of the graph from the opening of an outermost vmap level to its close."""
    depth, region = 0, list[Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "lazy_load_decompositions" and not depth:
            yield [node]  # nothing is left of it outside of a level
        if name == "_vmap_increment_nesting":
            depth += 1
        if depth and node.op != "get_attr":
            region.append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if depth == 0:
                yield region
                region = []


def _borders(region: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes outside that a region uses, and its own nodes that are used outside."""
    inside = set(region)
    used = dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in inside)
    return list(used), [node for node in region if any(user not in inside for user in node.users)]


class _Values(autocast.Obeying):
    """Runs the graph on fakes up to its last vmap, for the values that the regions use and their autocast states."""

    def __init__(self, module: GraphModule, regions: Sequence[Sequence[Node]]) -> None:
        super().__init__(module)
        self.nodes = list(module.graph.nodes)
        self.wanted = {node for region in regions for node in _borders(region)[0]}
        self.first, self.last = {region[0] for region in regions}, regions[-1][-1]
        self.found: dict[Node, Any] = {}
        self.states: dict[Node, autocast.State] = {}  # of the first node of each region

    def collect(self, fakes: Sequence[Any]) -> None:
        inputs = iter(fakes)
        for node in self.nodes:
            if node in self.first:
                self.states[node] = autocast.state()
            self.env[node] = next(inputs) if node.op == "placeholder" else self.run_node(node)
            if node in self.wanted:
                self.found[node] = self.env[node]
            if node is self.last:
                break


def _trace(module: GraphModule, region: Sequence[Node], values: _Values) -> GraphModule:
    """The region as a program of what it uses, in ATen below autograd; it returns what is used of it."""
    sources, results = _borders(region)
    graph = Graph()
    copies = {source: graph.placeholder(source.name) for source in sources}
    for node in region:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([copies[node] for node in results])
    program = GraphModule(module, graph)
    inputs = [v.detach() if isinstance(v, Tensor) else v for v in (values.found[source] for source in sources)]
    run = autocast.Obeying(program).run
    with autocast.under(values.states[region[0]]):
        traced = make_fx(run, _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(*inputs)
    if (reason := burned_in(traced)) is not None:
        raise RetraceError(reason)
    return traced


def _spliced(module: GraphModule, regions: Sequence[Sequence[Node]], traced: Sequence[GraphModule]) -> GraphModule:
    """A copy of `module` with the traces in the place of the regions."""
    graph = Graph()
    copies: dict[Node, Any] = {}
    inside = {node for region in regions for node in region}
    traces = {region[0]: (region, trace) for region, trace in zip(regions, traced, strict=True)}
    constants: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node in traces:
            region, trace = traces[node]
            sources, results = _borders(region)
            outputs = _copy(trace, graph, [copies[s] for s in sources], constants)
            for result, output in zip(results, outputs, strict=True):
                copies[result] = output
                if isinstance(output, Node):
                    output.meta = {**result.meta, **output.meta}
        if node not in inside:
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
            name = f"_vmap_constant{len(constants)}"
            constants[name] = getattr(trace, str(node.target))
            copies[node] = graph.create_node("get_attr", name)
        elif node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta[autocast.EXPLICIT] = True
    return [copies[leaf] if isinstance(leaf, Node) else leaf for leaf in tree_leaves(trace.graph.output_node().args[0])]
