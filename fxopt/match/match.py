"""A match: which nodes it covers, what its variables are bound to, and how a rewrite makes new nodes from it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.fakes import Results
from fxopt.graph.query import faking, val


@dataclass
class Match:
    """A subgraph that a fusion can replace.

    Attributes:
        outputs: the nodes whose values the rewrite must produce, in the order of the fusion's choosing
        nodes: every node that the rewrite makes dead, outputs included (inner values must have no other user)
        bindings: variable name -> node, or a number for scalars
        tags: name -> which alternative of the pattern matched, or any other fact the finder noted
        made: the nodes that `call` made, in order
        insert_before: where the replacement stands; settled by the legality check
        results: what fused ops returned for arguments that look alike, if that is kept
        moderate: values proved to be neither infinite nor so large that they mask: verification draws them so
    """

    outputs: tuple[Node, ...]
    nodes: frozenset[Node]
    bindings: dict[str, Any]
    tags: dict[str, Any] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)
    insert_before: Node | None = None
    moderate: frozenset[Node] = frozenset()
    results: Results | None = None

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What variable `name` is bound to, or `default`."""
        return self.bindings.get(name, default)

    def val(self, name: str) -> Any:
        """The fake value of what variable `name` is bound to."""
        return val(self.bindings.get(name))

    @property
    def graph(self) -> Graph:
        """The graph that the match lies in."""
        return self.outputs[0].graph

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert a call where the replacement stands and give it its fake value.

        `target` is an ATen overload or a fused op. The rewriter writes the node's provenance.
        """
        function = getattr(target, "overload", target)
        graph = self.graph
        values = tree_map(val, (args, kwargs))

        def run() -> Any:
            with self.fake_mode():
                return function(*values[0], **values[1])

        # Where this raises, nothing was inserted. A fused op returns memory of its own.
        value = run() if self.results is None or function is target else self.results(run, function, values)
        with graph.inserting_before(self.insert_before or max(self.outputs)):
            node = graph.call_function(function, args, kwargs)
        node.meta["val"] = value
        self.made.append(node)
        return node

    def fake_mode(self) -> Any:
        """The mode of the fake values around the match, as a context in which their ops run."""
        mode = detect_fake_mode(tree_leaves([val(node) for node in self.nodes]))
        return contextlib.nullcontext() if mode is None else faking(mode)

    def item(self, node: Node, index: int) -> Node:
        """Result `index` of a node with several results."""
        return self.call(operator.getitem, node, index)
