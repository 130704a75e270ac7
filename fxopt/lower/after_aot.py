"""The second entry: the graph that AOTAutograd made, rewritten before Inductor sees it.

For inference graphs that the retrace can't take. Here autocast has become casts, tensor subclasses the plain ops on
what they hold, autograd functions and checkpoints their forward, torch.func transforms batched ops, and in-place writes
are functional, with one `copy_` for each written input at the end. The trace keeps ops whole that Inductor's table
would spell out; what is left of them after the rewrite is decomposed then, node by node.

The pass is handed to Inductor as its `joint_custom_pre_pass`: it runs where Inductor's own rewrites begin, CUDA graphs
and static inputs are settled by Inductor from Dynamo's own graph, and both compilation caches hold the result under the
pass's `uuid`. A rewrite that fails leaves AOTAutograd's graph as it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from fxopt.graph.query import val
from fxopt.graph.scope import storages
from fxopt.lower.compile import gradients_flow, patches
from fxopt.lower.decompose import Table, decompose
from fxopt.lower.strides import same_strides, with_strides
from fxopt.options import Options
from fxopt.rewrite.guard import GraphBroken

log = logging.getLogger(__name__)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)

#: rewrites a functional graph in place; whether anything was gained. After GraphBroken it does without that fusion
Rewrite = Callable[[GraphModule], bool]


class AfterAOT(CustomGraphPass):
    """Rewrites AOTAutograd's inference graph, and then decomposes it by `table`.

    `identity` names all that the rewrite depends on, for the compilation caches. `then` is another pass of the user's
    to run afterwards. `graphs` counts those that the pass was given: none, where the compiled code was cached.
    """

    def __init__(self, rewrite: Rewrite, table: Callable[[], Table], identity: str, then: Sequence[Any] = ()) -> None:
        self.rewrite = rewrite
        self.table = table
        self.identity = identity
        self.then = tuple(then)
        self.graphs = 0

    def __call__(self, graph: Graph) -> None:
        """Rewrite and decompose `graph` in place. Raises what the decomposition raises, nothing else."""
        module = graph.owning_module
        assert module is not None
        self.graphs += 1
        with _outside_dispatch():
            before = _Outputs(graph)
            self._try_rewrite(module, before)
            decompose(module, self.table())
            before.keep(graph)
        for further in self.then:
            further(graph)

    def uuid(self) -> Any:
        """What the caches know the pass by; None (nothing is cached) if a pass of the user's has no uuid."""
        others = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.then]
        return None if None in others else (self.identity, *others)

    def _try_rewrite(self, module: GraphModule, before: _Outputs) -> None:
        if any(str(n.target).startswith("tangents") for n in module.graph.find_nodes(op="placeholder")):
            return  # a graph with a backward: where its halves will be cut isn't known yet
        try:
            trial = self._rewritten(module)
            if trial is not None:
                # As it will run: whether the outputs can be kept shows only then.
                decompose(trial, self.table())
                before.keep(trial.graph)
                trial.graph.lint()
                _put(module, trial)
        except Exception as error:
            log.warning(
                "fxopt leaves AOTAutograd's graph as it was: %s: %s", type(error).__name__, error, exc_info=True
            )

    def _rewritten(self, module: GraphModule) -> GraphModule | None:
        """A rewritten copy of `module`, begun again without each fusion that changed the graph by itself."""
        left_out: set[str] = set()
        while True:
            trial = _copied(module)
            try:
                return trial if self.rewrite(trial) else None
            except GraphBroken as error:
                if error.fusion in left_out:
                    raise
                left_out.add(error.fusion)
                log.warning("fxopt rewrites AOTAutograd's graph without a fusion: %s", error)


def serves(module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether Dynamo's graph with these inputs is one for this entry.

    Nothing will be differentiated, by anybody, and AOTAutograd knows what each input holds: of a subclass without
    `__tensor_flatten__` it doesn't.
    """
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    known = all(type(x) in _PLAIN_TYPES or is_traceable_wrapper_subclass(x) for x in tensors)
    differentiated = gradients_flow(module, example_inputs) or torch._C._functorch.peek_interpreter_stack() is not None
    return known and not differentiated


def compile_after_aot(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, rewrite: Rewrite, identity: str
) -> tuple[Callable[..., Any], int]:
    """Compile Dynamo's graph with Inductor, `rewrite` applied after AOTAutograd; and how many graphs it was given."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    chosen = patches(options)
    users = chosen.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
    then = users if isinstance(users, (list, tuple)) else [users] if users is not None else []
    ours = AfterAOT(rewrite, select_decomp_table, identity, then)

    def inner(*args: Any, **kwargs: Any) -> Any:
        if "get_decomp_fn" in kwargs:  # what reaches this point is decomposed by Inductor's own table
            kwargs["get_decomp_fn"] = select_decomp_table
        return compile_fx_inner(*args, **kwargs)

    run: Any = compile_fx(
        module,
        list(example_inputs),
        inner_compile=inner,
        config_patches={**chosen, "joint_custom_pre_pass": ours},
        decompositions={},
    )
    return run, ours.graphs


def run_after_aot(
    module: GraphModule, example_inputs: Sequence[Any], rewrite: Rewrite, table: Table | None = None
) -> tuple[Callable[..., Any], int]:
    """The same without Inductor: AOTAutograd's graph rewritten, decomposed by `table`, and run op by op."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    ours = AfterAOT(rewrite, lambda: table or {}, "")

    def inference(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        for name, child in graph.named_children():
            if isinstance(child, GraphModule) and name in {n.target for n in graph.graph.find_nodes(op="get_attr")}:
                inference(child, ())
        ours(graph.graph)
        graph.recompile()
        return make_boxed_func(graph.forward)

    def forward(graph: GraphModule, inputs: Sequence[Any]) -> Any:
        return make_boxed_func(graph.forward)

    lower: Any = aot_autograd(fw_compiler=forward, inference_compiler=inference, keep_inference_input_mutations=True)
    return lower(module, list(example_inputs)), ours.graphs


@contextlib.contextmanager
def _outside_dispatch() -> Iterator[None]:
    """As around the first entry: no fake mode, Python dispatcher or autocast of the compilation is on."""
    with (
        _disable_current_modes(),
        torch._C._DisablePythonDispatcher(),
        torch._C._DisableAutocast(),
        torch.no_grad(),
    ):
        yield


class _Outputs:
    """What the outputs of a graph were: AOTAutograd has promised their strides and aliases to the caller."""

    def __init__(self, graph: Graph) -> None:
        self.values = [val(n) for n in _returned(graph)]
        self.aliases = _aliases(graph)

    def keep(self, graph: Graph) -> None:
        """Give the outputs their strides back where they differ. Raises ValueError where that can't be done."""
        output = graph.output_node()
        for i, (node, wanted) in enumerate(zip(_returned(graph), self.values, strict=True)):
            if not isinstance(wanted, Tensor) or not isinstance(node, Node) or wanted.layout != torch.strided:
                continue
            if same_strides(wanted, val(node)):
                continue
            kept = with_strides(graph, node, wanted)
            if not same_strides(wanted, val(kept)):
                raise ValueError(f"output {i} can't be given the strides {tuple(wanted.stride())}")
            output.replace_input_with(node, kept)
        if _aliases(graph) != self.aliases:
            raise ValueError("an output shares memory with another value than before")


def _returned(graph: Graph) -> list[Any]:
    return list(tree_leaves(graph.output_node().args[0]))


def _aliases(graph: Graph) -> list[int | None]:
    """For each output the first input, or earlier output, that it shares memory with."""
    homes: dict[int, int] = {}
    found = []
    inputs = list(graph.find_nodes(op="placeholder"))
    for i, node in enumerate([*inputs, *_returned(graph)]):
        own = storages(node) if isinstance(node, Node) else frozenset()
        if i >= len(inputs):
            found.append(next((homes[h] for h in own if h in homes), None))
        for home in own:
            homes.setdefault(home, i)
    return found


def _copied(module: GraphModule) -> GraphModule:
    graph = Graph(tracer_cls=module.graph._tracer_cls)
    made = graph.output(graph.graph_copy(module.graph, {}))
    made.meta = dict(module.graph.output_node().meta)
    return GraphModule(module, graph)


def _put(module: GraphModule, rewritten: GraphModule) -> None:
    """Put the rewritten graph in the place of the module's; its inputs and its output node stay the ones they were."""
    graph = module.graph
    output = graph.output_node()
    output.args = ((),)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    placeholders = [g.find_nodes(op="placeholder") for g in (rewritten.graph, graph)]
    mapping: dict[Node, Node] = dict(zip(*placeholders, strict=True))
    with graph.inserting_before(output):
        for node in rewritten.graph.nodes:
            if node.op == "get_attr":
                name, value = str(node.target), getattr(rewritten, str(node.target))
                if not hasattr(module, name):
                    module.register_buffer(name, value, persistent=False)
            if node.op not in ("placeholder", "output"):
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    output.args = map_arg(rewritten.graph.output_node().args, lambda n: mapping[n])
    module.recompile()
