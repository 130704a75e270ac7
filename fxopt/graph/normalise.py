"""Dynamo's graph and the graphs inside it (checkpointed regions, branches, loops), each brought into normal form."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxopt.graph import autocast
from fxopt.graph.gate import refusal
from fxopt.graph.higher_order import BODY_UNDER, bodies, runs_once
from fxopt.graph.retrace import RetraceError, retrace
from fxopt.graph.transforms import inline_transforms

log = logging.getLogger(__name__)


def normal_forms(module: GraphModule, example_inputs: Sequence[Any]) -> list[GraphModule]:
    """The normal form of Dynamo's graph `module`, then those of the graphs that it holds and runs.

    Raises RetraceError where the first would not be the same program.
    """
    normal = retrace(inline_transforms(module, example_inputs), example_inputs)
    return [normal, *_bodies(normal)]


def _bodies(module: GraphModule) -> list[GraphModule]:
    """Retrace the graphs that calls in `module` run, in place, and the graphs in those; the ones retraced.

    A graph that can't be retraced stays as it is. Raises RetraceError if its casts under autocast would then be lost.
    """
    retraced: list[GraphModule] = []
    found = list(bodies(module))
    shared = {name for name, uses in Counter(name for _, name, _, _ in found).items() if uses > 1}
    for call, name, graph, inputs in found:
        on = call.meta.get(BODY_UNDER, ())
        reason = "several calls share it" if name in shared else refusal(graph, inputs)
        if reason is None:
            try:
                with autocast.under(on):
                    normal = retrace(inline_transforms(graph, inputs), inputs)
                if not runs_once(call) and _constants(normal) - _constants(graph):
                    raise RetraceError("the trace holds a constant that the graph does not")
                retraced += [normal, *_bodies(normal)]
                setattr(module, name, normal)
                continue
            except RetraceError as error:
                reason = str(error)
        if on:
            raise RetraceError(f"the graph of {call.name} runs under autocast and can't be retraced: {reason}")
        log.info("the graph of %s stays as Dynamo made it: %s", call.name, reason)
    return retraced


def _constants(graph: GraphModule) -> set[str]:
    """The tensors that a graph holds: a body of control flow must not hold any of its own."""
    nodes = graph.graph.find_nodes(op="get_attr")
    return {str(n.target) for n in nodes if isinstance(getattr(graph, str(n.target), None), Tensor)}
