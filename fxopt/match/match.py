"""A match: which nodes it covers, what its variables are bound to, and how a rewrite makes new nodes from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils._pytree import tree_map

from fxopt.graph.query import val


@dataclass
class Match:
    """A subgraph that a fusion can replace.

    outputs   the nodes whose values the rewrite must produce, in the order of the fusion's choosing
    nodes     every node that the rewrite makes dead, outputs included (inner values must have no other user)
    bindings  variable name -> node, or a number for scalars
    tags      name -> which alternative of the pattern matched, or any other fact the finder noted
    """

    outputs: tuple[Node, ...]
    nodes: frozenset[Node]
    bindings: dict[str, Any]
    tags: dict[str, Any] = field(default_factory=dict)
    made: list[Node] = field(default_factory=list)  # filled by `call`

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
        """Insert a call before the match's first output and give it its fake value.

        `target` is an ATen overload or a fused op. The node's place in the graph is settled by the rewriter, which
        also writes its provenance.
        """
        function = getattr(target, "overload", target)
        graph = self.graph
        with graph.inserting_before(_last(self.outputs)):
            node = graph.call_function(function, args, kwargs)
        values = tree_map(val, (args, kwargs))
        mode = _fake_mode(values) or _fake_mode([n.meta.get("val") for n in self.nodes])
        with mode:
            node.meta["val"] = function(*values[0], **values[1])
        self.made.append(node)
        return node

    def item(self, node: Node, index: int) -> Node:
        """Result `index` of a node with several results."""
        return self.call(operator.getitem, node, index)


def _last(nodes: Iterable[Node]) -> Node:
    return max(nodes, key=lambda n: n)  # fx nodes compare by position in the graph


def _fake_mode(values: Any) -> Any:
    from torch._guards import detect_fake_mode
    from torch.utils._pytree import tree_leaves

    return detect_fake_mode(tree_leaves(values))
