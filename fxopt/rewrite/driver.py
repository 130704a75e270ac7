"""Running fusions over a graph: raise, fuse, to a fixpoint; every application checked, recorded and undoable.

One application is: find -> legality -> the fusion's own check -> make the replacement beside the original -> compare
shapes and dtypes -> verify numbers -> only then let the users see the replacement. Whatever fails before the last step
erases the replacement, and the graph is as it was.

Raised forms (stage "raise") keep their original nodes in the graph as shadows; what no fusion consumed is undone at the
end, so a model gets its own arithmetic back, bit for bit, wherever nothing was gained.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import NodeSource, NodeSourceAction

from fxopt.graph.fakes import Results
from fxopt.graph.query import SHADOW, is_mutable, module_path, source_line, storage, val, written_arguments
from fxopt.graph.scope import Scope
from fxopt.match.legality import illegality
from fxopt.match.match import Match
from fxopt.match.miss import NEAR, Miss, NearMiss
from fxopt.ops import find_op
from fxopt.rewrite import quota
from fxopt.rewrite.fusion import Fusion, Step, Verdict
from fxopt.rewrite.guard import GraphBroken, Ledger, Watch
from fxopt.rewrite.meta_check import check_meta
from fxopt.rewrite.verify import Verifier

log = logging.getLogger(__name__)

#: what was found and what nearly was, one message each: TORCH_LOGS=+fxopt.match
found_log = logging.getLogger("fxopt.match")

#: sweeps over all fusions before the driver stops looking for more (a pair of rules that undo each other ends here)
MAX_SWEEPS = 8

#: applications of one fusion for each node of the graph as it came (a rule that feeds on its own results ends here)
MAX_APPLICATIONS = 2

#: meta key: the fake value that a fusion's result stands in for (the lowering gives its strides back where they matter)
STANDS_FOR = "fxopt_stands_for"

#: meta key of a node made by a fusion
PROVENANCE = "fxopt"


@dataclass(frozen=True)
class Rewrite:
    """Provenance of a node that a fusion made."""

    fusion: str
    rule: str  # file:line of the fusion
    replaced: tuple[str, ...]  # names of the nodes it stands for
    sources: tuple[str, ...]  # the user's source lines of those nodes
    module: str | None  # the nn.Module that they came from
    verdict: Verdict


@dataclass
class Outcome:
    """What the fusions did to one graph."""

    steps: list[Step] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"match": 0.0, "rewrite": 0.0, "verify": 0.0})

    @property
    def fused(self) -> int:
        """Number of applications that stand."""
        return sum(step.applied for step in self.steps)


def run_fusions(module: GraphModule, fusions: Iterable[Fusion], verifier: Verifier) -> Outcome:
    """Apply `fusions` to the normalised graph of `module`, in place, to a fixpoint.

    Raises GraphBroken where a fusion changed the graph by itself: the graph is then of no more use.
    """
    with Watch() as watch:
        return _Driver(module.graph, list(fusions), verifier, watch).run()


class _Driver:
    def __init__(self, graph: Graph, fusions: list[Fusion], verifier: Verifier, watch: Watch) -> None:
        self.graph = graph
        self.watch = watch
        self.fusions = fusions
        self.verifier = verifier
        self.scope = Scope(graph)
        self.outcome = Outcome()
        self.raised: list[tuple[int, Match, tuple[Node, ...]]] = []  # (index of its step, match, what replaced it)
        self.misses: dict[tuple[str, Node], Miss] = {}
        self.given_up: set[tuple[str, Node]] = set()  # (fusion, anchor) whose rewrite failed: not tried again
        self.applied: Counter[str] = Counter()
        self.limit = MAX_APPLICATIONS * len(graph.nodes)
        self.ledger: Ledger | None = None  # of the sweep under way, from its first application on
        self.results = Results()
        self.told: set[tuple[str, str]] = set()  # (fusion, failure) that was warned of: layers fail alike

    def run(self) -> Outcome:
        for stage in ("raise", "fuse"):
            self._to_fixpoint([f for f in self.fusions if f.stage == stage])
        self._undo_unused_raises()
        self.graph.lint()
        best: dict[tuple[str, Node], Miss] = {k: m for k, m in self.misses.items() if k[1].graph is self.graph}
        alive = set(self.graph.nodes)
        near = [NearMiss.of(name, anchor, miss) for (name, anchor), miss in best.items() if anchor in alive]
        self.outcome.misses = sorted(near, key=lambda m: (-m.share, -m.progress, m.fusion, m.anchor))
        for miss in self.outcome.misses:
            found_log.debug("%s at %s: not matched: %s (%s)", miss.fusion, miss.anchor, miss.reason, miss.source)
        return self.outcome

    def _to_fixpoint(self, fusions: Sequence[Fusion]) -> None:
        for _ in range(MAX_SWEEPS):
            before = Counter(self.applied)
            for fusion in fusions:
                self._sweep(fusion)
            if self.applied == before:
                return
        for fusion in fusions:
            if self.applied[fusion.name] != before[fusion.name]:
                self._warn(fusion, f"still applied after {MAX_SWEEPS} sweeps; stopped there")

    def _sweep(self, fusion: Fusion) -> None:
        try:
            anchors = self.watch(lambda: fusion.anchors)  # of a pattern that is traced now
        except Exception as error:
            self._warn(fusion, "raised when asked for its anchors", error)
            return
        self.ledger = None
        self._apply_at(fusion, anchors)
        if self.ledger is not None and (harm := self.ledger.damage()) is not None:
            raise GraphBroken(fusion.name, harm)

    def _apply_at(self, fusion: Fusion, anchors: Iterable[object]) -> None:
        for anchor in self.scope.find(anchors):
            key = (fusion.name, anchor)
            if key in self.given_up or anchor.meta.get(SHADOW) or anchor._erased:
                continue
            if self.applied[fusion.name] >= self.limit:
                self._warn(fusion, f"stopped after {self.limit} applications: does it apply to its own results?")
                return
            if fusion.stage != "raise" and quota.exhausted():
                return
            start = time.perf_counter()
            match = self._match(fusion, anchor)
            self.outcome.seconds["match"] += time.perf_counter() - start
            if isinstance(match, Match):
                found_log.debug("%s at %s: %d nodes, %s", fusion.name, anchor.name, len(match.nodes), match.tags)
                self.misses.pop(key, None)
                self._apply(fusion, anchor, match, start)
            elif isinstance(match, Miss) and match.share > NEAR:
                self.misses[key] = match

    def _match(self, fusion: Fusion, anchor: Node) -> Match | Miss | None:
        size = len(self.graph.nodes)
        try:
            found = self.watch(self._find, fusion, anchor)
            if len(self.graph.nodes) != size:
                raise GraphBroken(fusion.name, f"changed the graph while it looked at {anchor.name}")
            return found
        except GraphBroken:
            raise
        except Exception as error:  # a fusion's own code can raise anything; the model must still run
            self._warn(fusion, f"raised while matching at {anchor.name}", error)
            self.given_up.add((fusion.name, anchor))
            hint = f'leave it out with options={{"disable": ["{fusion.name}"]}}, and tell its author'
            return Miss(f"the fusion raised {type(error).__name__}: {error}", anchor, hint=hint)

    def _find(self, fusion: Fusion, anchor: Node) -> Match | Miss | None:
        found = fusion.find(anchor, self.scope)
        if not isinstance(found, Match):
            return found
        return illegality(found, self.scope) or fusion.check(found) or found

    def _apply(self, fusion: Fusion, anchor: Node, match: Match, start: float) -> None:
        began = time.perf_counter()
        ledger = self.ledger = self.ledger or Ledger(self.graph)
        size = len(self.graph.nodes)
        match.results = self.results
        try:
            made = self.watch(fusion.rewrite, match)
            replacements = made if isinstance(made, tuple) else (made,)
            verdict = _compare(match, replacements)
        except Exception as error:
            self._warn(fusion, f"raised while rewriting at {anchor.name}", error)
            replacements, verdict = (), Verdict("failed", f"the fusion raised {type(error).__name__}: {error}")
        ledger.allow(match.made)
        if len(self.graph.nodes) != size + len(match.made) or any(node._erased for node in match.made):
            harm = ledger.damage() or f"erased what it had made ({len(match.made)} nodes)"
            raise GraphBroken(fusion.name, harm)
        checked = time.perf_counter()
        if verdict.status != "failed":
            verdict = self._verify(fusion, match, replacements)
        verified = time.perf_counter()
        applied = verdict.status != "failed" and not (verdict.status == "unchecked" and self.verifier.level == "strict")
        step = _describe(fusion, match, verdict, applied, (checked - start) * 1e6)
        if applied:
            _annotate(fusion, match, step)
            self._commit(fusion, match, replacements)
            self.applied[fusion.name] += 1
            if fusion.stage != "raise":
                quota.take(step)
        else:
            self._undo(match)
            self.given_up.add((fusion.name, anchor))
            self._warn(fusion, f"undone: {verdict.detail}")
        self.outcome.steps.append(step)
        log.debug("%s: %s -> %s: %s", fusion.name, " ".join(step.replaced), " ".join(step.made), verdict.status)
        self.outcome.seconds["rewrite"] += (checked - began) + (time.perf_counter() - verified)
        self.outcome.seconds["verify"] += verified - checked

    def _verify(self, fusion: Fusion, match: Match, replacements: tuple[Node, ...]) -> Verdict:
        try:
            return self.verifier.verify(fusion, match, replacements, self.scope)
        except Exception as error:  # what can't be verified for a fault of ours is not done either
            self._warn(fusion, "its verification failed", error)
            return Verdict("failed", f"the verification raised {type(error).__name__}: {error}")

    def _warn(self, fusion: Fusion, what: str, error: Exception | None = None) -> None:
        key = (fusion.name, str(error) if error is not None else what)
        if key not in self.told:
            self.told.add(key)
            log.warning("fusion %s %s%s", fusion.name, what, f": {error}" if error else "", exc_info=error)

    def _commit(self, fusion: Fusion, match: Match, replacements: tuple[Node, ...]) -> None:
        if fusion.stage == "raise":
            for node in match.nodes:
                node.meta[SHADOW] = True
            self.raised.append((len(self.outcome.steps), match, replacements))
        assert self.ledger is not None
        for old, new in zip(match.outputs, replacements, strict=True):
            self.ledger.allow(old.users)
            new.meta[STANDS_FOR] = old.meta.get(STANDS_FOR, old.meta["val"])
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in match.nodes)
        if fusion.stage != "raise":
            self._erase_dead(match.nodes)

    def _undo(self, match: Match) -> None:
        for node in reversed(match.made):
            self.graph.erase_node(node)

    def _undo_unused_raises(self) -> None:
        for index, match, replacements in reversed(self.raised):
            for node in match.nodes:
                node.meta.pop(SHADOW, None)
            used = any(node._erased for node in match.made)  # a fusion took some of what was raised
            if not used and any(new.users for new in replacements):
                for old, new in zip(match.outputs, replacements, strict=True):
                    new.replace_all_uses_with(old)
                step = self.outcome.steps[index]
                verdict = Verdict(step.verdict.status, "undone: nothing fused the result")
                self.outcome.steps[index] = replace(step, applied=False, verdict=verdict)
            self._erase_dead(match.made)
            self._erase_dead(match.nodes)

    def _erase_dead(self, nodes: Iterable[Node]) -> None:
        """Erase the pure ones of `nodes` that nothing uses, and then what only they used."""
        work = sorted(nodes)
        while work:
            node = work.pop()
            if node._erased or node.users or not self.scope.is_pure(node):
                continue
            work += sorted(node.all_input_nodes)
            if self.ledger is not None:
                self.ledger.allow([node])
            self.graph.erase_node(node)


def _compare(match: Match, replacements: tuple[Node, ...]) -> Verdict:
    if len(replacements) != len(match.outputs):
        return Verdict("failed", f"{len(match.outputs)} values to replace, {len(replacements)} replacements made")
    known = {n for n in match.bindings.values() if isinstance(n, Node)} | set(match.made)
    known |= {source for node in match.nodes for source in node.all_input_nodes}
    for made in match.made:
        for source in made.all_input_nodes:
            if source not in known:
                return Verdict("failed", f"the replacement reads {source.name}, which the match did not name")
        written = [node for node in written_arguments(made) if not _is_fresh(node, match)] if is_mutable(made) else []
        if written:
            return Verdict("failed", f"the replacement writes to {written[0].name}, which is not its own")
    for old, new in zip(match.outputs, replacements, strict=True):
        difference = check_meta(old, new)
        if difference is not None:
            return Verdict("failed", f"{new.name} in place of {old.name}: {difference}")
    return Verdict("meta")


def _is_fresh(node: Node, match: Match) -> bool:
    """Whether a value that the replacement made shares no memory with one from outside of it."""
    outside = {
        storage(val(source)) for made in match.made for source in made.all_input_nodes if source not in match.made
    }
    return node in match.made and storage(val(node)) not in outside


def _describe(fusion: Fusion, match: Match, verdict: Verdict, applied: bool, microseconds: float) -> Step:
    ordered = sorted(match.nodes)
    lines = dict.fromkeys(line for line in map(source_line, ordered) if line)
    op = next((getattr(n.target, "__name__", str(n.target)) for n in match.made if find_op(n.target)), "")
    return Step(
        fusion=fusion.name,
        rule=fusion.location,
        op=op.split(".")[0],
        replaced=tuple(name for n in ordered for name in _stands_for(n)),
        made=tuple(n.name for n in match.made),
        sources=tuple(lines),
        module=module_path(max(match.outputs)),
        microseconds=microseconds,
        verdict=verdict,
        applied=applied,
        tags={k: str(v) for k, v in match.tags.items()},
    )


def _stands_for(node: Node) -> tuple[str, ...]:
    """The nodes of the user's program behind a matched node: its own name, or what a raised node replaced."""
    made_by = node.meta.get(PROVENANCE)
    return made_by.replaced if made_by is not None else (node.name,)


def _annotate(fusion: Fusion, match: Match, step: Step) -> None:
    """Give the new nodes the stack trace, module and origin of what they replace."""
    last = max(match.outputs)
    rewrite = Rewrite(step.fusion, step.rule, step.replaced, step.sources, step.module, step.verdict)
    origins = [_origin(n, f"fxopt.{fusion.name}") for n in sorted(match.nodes)]
    for node in match.made:
        for key in ("stack_trace", "nn_module_stack", "seq_nr"):
            if key in last.meta:
                node.meta[key] = last.meta[key]
        node.meta["from_node"] = origins
        node.meta[PROVENANCE] = rewrite


def _origin(node: Node, by: str) -> NodeSource:
    """NodeSource(node, by, REPLACE), which copies the whole chain behind `node`; nobody changes that."""
    source = NodeSource(None, by, NodeSourceAction.REPLACE)
    source.node_info = NodeSource.NodeInfo(node.name, str(node.target), id(node.graph))
    source.from_node = node.meta.get("from_node", [])
    return source
