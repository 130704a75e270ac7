"""Does a replacement compute what it replaces? Asked once for each distinct rewrite, before anything uses it.

    metadata     shapes, dtypes, devices, aliases of every replaced value
    the algebra  original and replacement at small stand-in sizes in float64 (fused ops by their references), on random
                 and hostile inputs: equal to about 1e-9, or the rewrite is wrong; so are gradients, in training
    the kernel   the implementation that will run, at its real dtype on its real device, on a GPU at its real sizes:
                 its error against float64 is at most twice the original's own, plus one unit in the last place

Nothing is specialised, drawn from the global RNG or left behind in the compilation around it. What equal regions gave
before is looked up (see `verdicts`), so a model of 32 equal layers is checked once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from fxopt.graph.query import is_call, val
from fxopt.graph.scope import Scope
from fxopt.match.match import Match
from fxopt.ops import ANYWHERE, Implementation, Target, find_op
from fxopt.rewrite import verdicts
from fxopt.rewrite.budget import SECONDS, budget_of
from fxopt.rewrite.compare import Distance, distance, non_finite
from fxopt.rewrite.evaluate import CPU, Objection, ShapeMismatch, isolated, promote, run_native, run_promoted
from fxopt.rewrite.fusion import Fusion, Precision, Verdict
from fxopt.rewrite.gradients import differentiated, gradient_difference
from fxopt.rewrite.meta_check import alias_difference, check_meta, stride_difference
from fxopt.rewrite.region import Pair, extract, obstacle
from fxopt.rewrite.relations import Relations
from fxopt.rewrite.repro import write_repro
from fxopt.rewrite.standin import Sizes, candidates, full_width
from fxopt.rewrite.trials import Trial, trials

__all__ = ["Verifier", "check_meta", "stride_difference"]

log = logging.getLogger(__name__)

#: how many draws judge a replacement that one draw found less exact than the original
DRAWS = 5

#: how far apart equal algebra may be in float64, relative to the row
TOLERANCE = 1e-9

_MATMULS = frozenset({"matmul", "mm", "bmm", "linear", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"})


class Verifier:
    """Verifies rewrites at one level: "off", "meta", "numeric" or "strict" (numeric without a budget).

    `training` and `compiled` say how the graph will run, which decides what computes a fused op (see `ops.Target`).
    """

    def __init__(self, level: str = "numeric", seed: int = 0, *, target: Target = ANYWHERE) -> None:
        self.level = level
        self.seed = seed
        self.target = target

    def verify(
        self, fusion: Fusion, match: Match, replacements: tuple[Node, ...], scope: Scope | None = None
    ) -> Verdict:
        """What is known of replacing `match.outputs` by `replacements`; the graph isn't changed.

        To be called when the new nodes are in the graph and the old ones still have their users. `scope` is that of
        the graph; without one the graph is looked through.
        """
        if self.level == "off":
            return Verdict("unchecked", "verification is off")
        for old, new in zip(match.outputs, replacements, strict=True):
            difference = check_meta(old, new)
            if difference is not None:
                return Verdict("failed", f"{new.name} in place of {old.name}: {difference}")
        difference = alias_difference(match.outputs, replacements, match.nodes, match.made)
        if difference is not None:
            return Verdict("failed", difference)
        if self.level == "meta":
            return Verdict("meta")
        try:
            return self._numbers(fusion, match, replacements, scope or Scope(match.graph))
        except Exception as error:  # whatever goes wrong here must not cost the user the compilation
            log.warning("verifying %s raised %s: %s", fusion.name, type(error).__name__, error, exc_info=True)
            return Verdict("unchecked", f"verification raised {type(error).__name__}: {error}")

    def _numbers(self, fusion: Fusion, match: Match, replacements: tuple[Node, ...], scope: Scope) -> Verdict:
        cut = partial(
            extract, match.outputs, replacements, match.nodes, match.made, scope=scope,
            place=match.insert_before or max(match.outputs),
        )  # fmt: skip
        pair = cut()
        found = obstacle(pair)
        if found is not None:
            return Verdict("unchecked", found)
        target = replace(self.target, device=_device(pair))
        chosen = _choose(pair, target)
        wanted = [pair.inputs.index(n) for n in differentiated(pair)] if target.training else []
        setting = (self.level, self.seed, wanted)
        signature, on_disk = verdicts.signature(pair, fusion, chosen.values(), target, setting)
        known = verdicts.lookup(signature, disk=on_disk)
        if known is None:
            with isolated(target.device):
                known = torch._dynamo.disable(self._check)(fusion, match, pair, cut, target, chosen)
            verdicts.store(signature, known, disk=on_disk)
        return known

    def _check(
        self,
        fusion: Fusion,
        match: Match,
        pair: Pair,
        cut: Callable[..., Pair],
        target: Target,
        chosen: dict[Node, Implementation],
    ) -> Verdict:
        failure: _Failure | None = None
        reason = ""
        for attempt, scalars in self._attempts(pair, cut):
            check = _Check(fusion, match, attempt, self)
            outcome = check.algebra(chosen, scalars=scalars)
            if isinstance(outcome, _Equal):
                return check.kernel(outcome, target, chosen)
            if isinstance(outcome, _Failure):
                failure = failure or outcome
            else:
                reason = reason or outcome
        return Verdict("unchecked", reason) if failure is None else failure.verdict(fusion)

    def _attempts(self, pair: Pair, cut: Callable[..., Pair]) -> Iterator[tuple[Pair, bool]]:
        """Readings of the same rewrite, the plainest first; one under which it holds is enough.

        They differ in what a number that equals a size means, and in whether inputs that both sides read are tied
        to each other as they are in the graph.
        """
        yield pair, False
        yield pair, True
        wide = cut(widen=True)
        if wide != pair and obstacle(wide) is None:
            yield wide, False
            yield wide, True


@dataclass(frozen=True)
class _Equal:
    """The algebra holds at `sizes`; `rest` are the candidates not tried."""

    sizes: Sizes
    rest: tuple[Sizes, ...]
    error: float
    trials: int


@dataclass(frozen=True)
class _Failure:
    detail: str
    pair: Pair
    sizes: Sizes
    trial: Trial
    error: float | None = None

    def verdict(self, fusion: Fusion) -> Verdict:
        detail = f"{self.detail}; inputs: {self.trial.name}; sizes: {self.sizes}"
        path = write_repro(fusion.name, detail, self.pair, self.sizes, self.trial)
        return Verdict("failed", f"{detail}; repro: {path}" if path else detail, self.error)


@dataclass(frozen=True)
class _Measured:
    """The errors of the original and of the replacement in one output of one trial, and a unit in the last place."""

    output: int
    trial: Trial
    before: Distance
    after: Distance
    unit: float


class _Check:
    """One reading of one rewrite, compared in float64 and then at its own dtypes."""

    def __init__(self, fusion: Fusion, match: Match, pair: Pair, verifier: Verifier) -> None:
        self.fusion = fusion
        self.match = match
        self.pair = pair
        self.seed = verifier.seed
        self.strict = verifier.level == "strict"
        self.differentiated = differentiated(pair) if verifier.target.training else ()

    def algebra(self, chosen: dict[Node, Implementation], *, scalars: bool) -> _Equal | _Failure | str:
        """Whether both sides agree in float64 at the first sizes at which they can be run; a reason if none can."""
        found: _Failure | None = None
        reason = "no sizes fit the program"
        options = list(candidates(self.pair, scalars=scalars))
        for i, sizes in enumerate(options):
            over = None if self.strict else _over_budget(self.pair, sizes)
            if over is not None:
                reason = f"{reason}; {over}"
                continue
            try:
                outcome = self._compare(sizes, chosen)
            except (ShapeMismatch, _Unrunnable) as error:
                reason = str(error)
                continue
            if isinstance(outcome, _Failure):
                found = found or outcome
                continue
            return _Equal(sizes, tuple(options[i + 1 :]), *outcome)
        return found or reason

    def _compare(self, sizes: Sizes, chosen: dict[Node, Implementation]) -> _Failure | tuple[float, int]:
        worst, count = 0.0, 0
        for trial in trials(self.fusion, self.match, self.pair, sizes, self.seed):
            values = {n: promote(v) for n, v in trial.values().items()}
            try:
                old = self._outputs(run_promoted(self.pair.old, values, sizes, check=count == 0), self.pair.outputs)
            except ShapeMismatch:
                raise
            except Exception as error:
                raise _Unrunnable(f"the original can't be run in float64: {_one_line(error)}") from error
            try:
                new = self._outputs(
                    run_promoted(self.pair.new, values, sizes, check=count == 0), self.pair.replacements
                )
            except Exception as error:
                if sizes.real:
                    return _Failure(f"the replacement raised {_one_line(error)}", self.pair, sizes, trial)
                # Sizes can be baked into it in a way that nothing here sees; it must not count as another value.
                raise _Unrunnable(f"the replacement can't be run with {sizes}: {_one_line(error)}") from error
            for i, (a, b) in enumerate(zip(old, new, strict=True)):
                apart = distance(a, b)
                if apart.error > TOLERANCE and not self._within_conditioning(apart, i, a, values, sizes):
                    where = f"output {i} ({self.pair.outputs[i].name}) {apart.words}"
                    detail = f"other values in float64: {where}, relative error {apart.error:.3g}"
                    return _Failure(detail, self.pair, sizes, trial, apart.error)
                worst = max(worst, apart.error if math.isfinite(apart.error) else 0.0)
            if trial.smooth and self.differentiated and self.fusion.precision is not Precision.APPROXIMATE:
                differ = gradient_difference(
                    self.pair, self.differentiated, chosen, values, sizes, TOLERANCE, self.seed
                )
                if differ is not None:
                    return _Failure(f"other gradients in float64: {differ}", self.pair, sizes, trial)
            count += 1
        return worst, count

    def _within_conditioning(
        self, apart: Distance, output: int, truth: Any, values: dict[Node, Any], sizes: Sizes
    ) -> bool:
        """Whether a difference is no more than what float64's own rounding of ill-conditioned inputs can make."""
        if not math.isfinite(apart.error) or self.fusion.precision is Precision.APPROXIMATE:
            return math.isfinite(apart.error)
        generator = torch.Generator().manual_seed(self.seed)
        nudged = dict(values)
        for node, value in values.items():
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                nudged[node] = value * (1 + 1e-10 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        moved = self._outputs(run_promoted(self.pair.old, nudged, sizes, check=False), self.pair.outputs)[output]
        sensitivity = distance(truth, moved).error
        # 1e-10 is 4.5e5 units in the last place; a few hundred of them are lost to the order of operations.
        return math.isfinite(sensitivity) and apart.error <= 1e-3 * sensitivity

    def kernel(self, equal: _Equal, target: Target, chosen: dict[Node, Implementation]) -> Verdict:
        """The error of what will run, at its own dtypes, against the original's own; both against float64."""
        holds = f"algebra: {equal.trials} trials within {max(equal.error, 1e-16):.0e} with {equal.sizes}"
        reason, worst, ran = "", 0.0, False
        for group in _groups(self.pair, equal, target):
            for sizes in group:
                over = None if self.strict else _over_budget(self.pair, sizes, _where(sizes, target))
                try:
                    found = over or self._errors(sizes, target, chosen)
                except (Objection, ShapeMismatch, _Unrunnable) as error:
                    found = _one_line(error)
                if isinstance(found, _Failure):
                    return found.verdict(self.fusion)
                if isinstance(found, float):
                    ran, worst = True, max(worst, found)
                    break
                reason = reason or found
        if not ran:
            return Verdict("unchecked", f"{holds}; the kernel did not run: {reason}")
        how = ", ".join(sorted({i.name for i in chosen.values()})) or "aten"
        if self.fusion.precision is Precision.APPROXIMATE:
            return Verdict("meta", f"{holds}; {how}: approximate, error {worst:.2g} of the original's", worst)
        return Verdict("equal", f"{holds}; {how}: error {worst:.2g} of the original's", worst)

    def _errors(self, sizes: Sizes, target: Target, chosen: dict[Node, Implementation]) -> _Failure | float:
        """The largest error of the replacement in the original's own; or what is wrong with it.

        Where few elements are drawn the original can be exact by luck. So what fails is judged once more, by DRAWS
        times as many: the largest errors of all draws of a kind, on both sides.
        """
        first = self._measured(sizes, target, chosen, self.seed)
        judged = first if isinstance(first, _Failure) else self._judged(first, sizes)
        if isinstance(first, _Failure) or not isinstance(judged, _Failure):
            return judged
        together = list(first)
        for i in range(1, DRAWS):
            more = self._measured(sizes, target, chosen, self.seed + i * 1000)
            if isinstance(more, _Failure):
                return more
            together += more
        return self._judged(together, sizes)

    def _measured(
        self, sizes: Sizes, target: Target, chosen: dict[Node, Implementation], seed: int
    ) -> list[_Measured] | _Failure:
        pair = self.pair
        found: list[_Measured] = []
        where = _where(sizes, target)
        for trial in trials(self.fusion, self.match, pair, sizes, seed, where):
            if not trial.native:
                continue
            values = trial.values()
            promoted = {n: promote(v) for n, v in values.items()}
            there = {n: v.to(target.device) if isinstance(v, Tensor) else v for n, v in values.items()}
            try:
                exact = run_promoted(pair.old, promoted, sizes, check=True, device=where)
                truth = self._outputs(exact, pair.outputs)
                old = self._outputs(run_native(pair.old, there, sizes, target.device, {}, target), pair.outputs)
            except ShapeMismatch:
                raise
            except Exception as error:
                raise _Unrunnable(f"the original can't be run on {target.device}: {_one_line(error)}") from error
            try:
                results = run_native(pair.new, there, sizes, target.device, chosen, target)
                new = self._outputs(results, pair.replacements)
            except Objection:
                raise
            except Exception as error:
                if sizes.real and not isinstance(error, torch.OutOfMemoryError):
                    return _Failure(f"the kernel raised {_one_line(error)}", pair, sizes, trial)
                raise _Unrunnable(f"the kernel raised with {sizes}: {_one_line(error)}") from error
            for i in range(len(truth)):
                measured = self._measure(truth[i], old[i], new[i])
                if isinstance(measured, str):
                    return _Failure(f"output {i} ({pair.outputs[i].name}) {measured}", pair, sizes, trial)
                found.append(_Measured(i, trial, *measured))
        return found

    def _judged(self, found: Sequence[_Measured], sizes: Sizes) -> _Failure | float:
        plain: dict[int, float] = {}  # the original's error on plain inputs counts throughout
        kinds: dict[tuple[int, str], float] = {}
        for one in found:
            key = one.output, one.trial.name
            kinds[key] = max(kinds.get(key, 0.0), one.before.error)
            if one.trial.plain:
                plain[one.output] = max(plain.get(one.output, 0.0), one.before.error)
        worst = 0.0
        for one in found:
            own = max(kinds[one.output, one.trial.name], plain.get(one.output, 0.0))
            if not one.after.error <= 2 * own + one.unit and self.fusion.precision is not Precision.APPROXIMATE:
                detail = (
                    f"output {one.output} ({self.pair.outputs[one.output].name}) is less exact than the original: "
                    f"relative error {one.after.error:.3g}, the original's is {own:.3g}, one unit in the last place "
                    f"{one.unit:.3g}; {one.after.words}"
                )
                return _Failure(detail, self.pair, sizes, one.trial, one.after.error / max(own, one.unit))
            worst = max(worst, one.after.error / max(own, one.unit))
        return worst

    def _measure(self, truth: Any, old: Any, new: Any) -> tuple[Distance, Distance, float] | str:
        """The errors of the original and of the replacement and a unit in the last place; or what is plainly wrong."""
        if not isinstance(truth, Tensor) or not isinstance(new, Tensor):
            return (Distance(0.0), Distance(0.0), 1.0) if truth == new else f"is {new}, not {truth}"
        if new.dtype != old.dtype:
            return f"is {new.dtype}, not {old.dtype}"
        if self.fusion.precision is Precision.BITWISE and distance(old, new).error != 0:
            return f"is not the same bit for bit: {distance(old, new).words}"
        if not (old.is_floating_point() or old.is_complex()):
            apart = distance(truth if distance(truth, old).error == 0 else old, new)
            return (Distance(0.0), apart, 1.0) if apart.error == 0 else f"differs in integers: {apart.words}"
        # Where the original overflowed the replacement is free, unless that is what the mathematics says.
        overflowed = non_finite(old).to(truth.device) & ~non_finite(truth)
        unit = max(torch.finfo(old.dtype).eps, TOLERANCE / 2)
        return distance(truth, old, overflowed), distance(truth, new, overflowed), unit

    @staticmethod
    def _outputs(values: dict[Node, Any], nodes: Sequence[Node]) -> list[Any]:
        return [values[n] for n in nodes]


class _Unrunnable(Exception):
    """One side can't be run at these sizes."""


def _device(pair: Pair) -> torch.device:
    devices = [v.device for n in pair.nodes if isinstance(v := val(n), Tensor)]
    return next((d for d in devices if d.type != "cpu"), CPU)


def _choose(pair: Pair, target: Target) -> dict[Node, Implementation]:
    """What will compute each fused op, at the real sizes."""
    chosen = {}
    for node in (*pair.old, *pair.new):
        op = find_op(node.target)
        if op is not None and node not in chosen:
            chosen[node] = op.select(target, *tree_map(val, op.bind(*node.args, **node.kwargs)))[0]
    return chosen


def _groups(pair: Pair, equal: _Equal, target: Target) -> Iterator[Iterable[Sizes]]:
    """Sizes to run the kernel at; of each group the first that can be run.

    On a GPU the real ones, where memory and time allow that: what is compiled for them is what will run. Otherwise once
    small, where every branch is reached, and once at the real width, where rounding errors add up.
    """
    real = Sizes()
    static = target.device.type != "cpu" and not Relations.of(pair).symbols
    if static and _over_budget(pair, real, target.device) is None:
        yield (real, equal.sizes, *equal.rest)
        return
    yield (equal.sizes, *equal.rest)
    yield full_width(pair)


def _where(sizes: Sizes, target: Target) -> torch.device:
    """Where the original is computed in float64: small sizes on the CPU, real ones where the graph runs."""
    return target.device if sizes.real else CPU


def _over_budget(pair: Pair, sizes: Sizes, device: torch.device = CPU) -> str | None:
    elements = flops = 0
    for node in pair.nodes:
        for leaf in _tensors(val(node)):
            count = math.prod(sizes.shape(leaf))
            elements += count
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if name in _MATMULS or find_op(node.target) is not None or is_call(node, torch.ops.aten.convolution):
                operands = [math.prod(sizes.shape(v)) for a in node.all_input_nodes for v in _tensors(val(a))]
                # For A [m, k] times B [k, n] this is m · k · n.
                if len(operands) > 1:
                    a, b = sorted(operands)[-2:]
                    flops += 2 * int(math.sqrt(a * b * max(count, 1)))
    budget = budget_of(device)
    if 2 * 8 * elements > budget.bytes:
        return f"{2 * 8 * elements >> 20} MiB at {sizes}, over the budget of {budget.bytes >> 20} MiB"
    seconds = 6 * (elements * budget.seconds_an_element + flops * budget.seconds_a_flop)
    if seconds > SECONDS:
        return f"about {seconds:.1f} s at {sizes}, over the budget of {SECONDS} s"
    return None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
