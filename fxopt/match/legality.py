"""Whether a matched subgraph may be replaced at all, whatever it computes.

Legal means: every node is pure; inner values have no user outside; the replacement can stand at one place in program
order that comes after all inputs and before all users; and on the way there nothing writes to what it reads and no
grad-mode switch or higher-order op is crossed. Each test looks only at the match and at the graph's few writes and
barriers, so the cost of a match does not depend on the size of the graph.
"""

from __future__ import annotations

from torch.fx import Node

from fxopt.graph.query import is_mutable, users
from fxopt.graph.scope import Scope, is_random, storages
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss


def illegality(match: Match, scope: Scope) -> Miss | None:
    """Why `match` must not be replaced, or None; settles `match.insert_before`, where the replacement will stand."""
    progress = len(match.nodes)
    for node in match.nodes:
        if is_mutable(node):
            return Miss(f"{node.name} writes to its argument", node, progress)
        if is_random(node):
            return Miss(f"{node.name} draws random numbers", node, progress, hints.DROPOUT)
        if not scope.is_pure(node):
            return Miss(f"{node.name} is not a pure function", node, progress)
    outside: list[Node] = []
    for node in match.nodes:
        others = [u for u in users(node) if u not in match.nodes]
        if others and node not in match.outputs:
            what = f"the inner value {node.name} is {hints.read_by(others[0])}"
            return Miss(what, others[0], progress, hints.kept(node, others[0]))
        outside += others

    sources = [source for node in match.nodes for source in node.all_input_nodes if source not in match.nodes]
    place = _place(match, sources, outside)
    if isinstance(place, Miss):
        return place
    match.insert_before = place

    hidden = _cut_off(match, sources, scope)
    if hidden is not None:
        what = f"{hidden.name} runs without gradients: the replacement would read through it"
        return Miss(what, hidden, progress, "put torch.no_grad() around all of it, or around none of it")
    read = frozenset().union(*(storages(s) for s in sources)) if sources else frozenset()
    for output in match.outputs:
        if storages(output) & read:
            return Miss(f"{output.name} is a view of an input", output, progress)
    for node in match.nodes:
        first, last = (node, place) if node < place else (place, node)
        barrier = scope.barrier_between(first, last)
        if barrier is not None:
            return Miss(f"{barrier.name} lies between the matched nodes", barrier, progress)
        touched = storages(node).union(*(storages(s) for s in node.all_input_nodes))
        write = scope.write_between(first, last, touched)
        if write is not None:
            what = f"{write.name} writes to a value that {node.name} reads or makes"
            return Miss(what, write, progress, "compute a new tensor there instead of writing in place")
    for bound in match.bindings.values():
        # A variable bound behind a cast or view that others share: it was read before, it will be read at `place`.
        if isinstance(bound, Node) and bound not in match.nodes and bound not in sources and bound.op != "get_attr":
            write = scope.write_between(bound, place, storages(bound))
            if write is not None:
                return Miss(
                    f"{write.name} writes to {bound.name} before the replacement would read it", write, progress
                )
    return None


def _cut_off(match: Match, sources: list[Node], scope: Scope) -> Node | None:
    """A node without gradients between what the match reads and a variable that is bound behind it, or None."""
    if not scope.without_gradients:
        return None
    bound = {node for node in match.bindings.values() if isinstance(node, Node)}
    work = [(source, source) for source in sources if source in scope.without_gradients and source not in bound]
    seen = set()
    while work:
        node, cut = work.pop()
        for parent in node.all_input_nodes:
            if parent in bound and parent not in scope.without_gradients:
                return cut
            if parent not in seen and parent not in bound:
                seen.add(parent)
                work.append((parent, cut))
    return None


def _place(match: Match, sources: list[Node], outside: list[Node]) -> Node | Miss:
    """The node before which the replacement can stand: after every input, before every user."""
    end = max(match.outputs)
    first_user = min(outside, default=None)
    if first_user is None or end < first_user:
        return end
    late = [source for source in sources if not source < first_user]
    if late:
        return Miss(
            f"{first_user.name} uses a result before the input {late[0].name} is there", late[0], len(match.nodes)
        )
    return first_user
