"""Running a case under eager and under fxopt, and saying how the two differ.

Values must be equal, or as near to a float64 run of the same program as eager is: at most twice eager's own error and a
few ulp. Where eager's error is small by luck, it is measured again on inputs that are an ulp away. What aot_eager gets
wrong in the same way is not fxopt's doing.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import fxopt
from fuzz_patterns import PATTERNS
from fuzz_program import EXACT, Case, Choices, Program, Writer
from fuzz_steps import STEPS

sys.path.append(str(Path(__file__).parents[1] / "shared"))  # pytest has it there; a program of its own has not
import running

#: how many units in the last place of the largest value an error may be beyond twice eager's own
ULPS = 8


@dataclass
class Outcome:
    """What one call did."""

    result: Any
    outputs: list[Tensor]
    inputs: list[Tensor]
    grads: list[Tensor | None]
    grads_raised: bool
    homes: list[int | None]  # the input that each output lives in
    sharing: list[int]  # the first output that each output shares its memory with


class Difference(AssertionError):
    """fxopt's result is not eager's; the message has a script that shows it."""


def write(case: Case) -> Program:
    """The program that the numbers of `case` amount to."""
    with _mode(case):
        w = Writer(case)
        for first, *numbers in case.steps:
            if first % 2:
                rate = (0.0, 0.1, 0.2, 0.5)[numbers[0] % 4 if numbers else 0]
                PATTERNS[first // 2 % len(PATTERNS)](w, Choices(numbers[1:], rate))
            else:
                STEPS[first // 2 % len(STEPS)](w, Choices(numbers))
    # Late values are likelier to depend on all that was done.
    names = list(reversed(w.names))
    return w.finish([names[i % len(names)] for i in case.returns] or [names[0]])


@contextlib.contextmanager
def _mode(case: Case) -> Iterator[None]:
    with {"no_grad": torch.no_grad, "inference": torch.inference_mode, "train": torch.enable_grad}[case.mode]():
        torch.manual_seed(0)
        yield


def call(function: Callable[..., Any], case: Case, inputs: list[Tensor]) -> Outcome:
    """One call, with gradients in training, on these inputs (which it may write to)."""
    with _mode(case):
        result = function(*inputs)
        outputs = running.tensors(result)
        # Before the gradients: autograd may let go of what it kept.
        homes = running.homes(outputs, inputs)
        first: dict[int, int] = {}
        sharing = [first.setdefault(o.untyped_storage()._cdata, i) for i, o in enumerate(outputs)]
        grads: list[Tensor | None] = []
        raised = False
        if case.mode == "train":
            try:
                grads = running.gradients([o for o in outputs if o.is_floating_point()], inputs)
            except RuntimeError:  # what the backward needs was written to, or there is nothing to differentiate
                raised = True
    return Outcome(result, outputs, inputs, grads, raised, homes, sharing)


class Checker:
    """One case: its program, eager's outcome and the bounds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.program = write(case)

    def calls(self) -> list[tuple[tuple[int, ...], int]]:
        """(sizes, seed) of each call: the same sizes with other values, or other sizes where shapes may change."""
        case = self.case
        return [(case.sizes, 1), (case.sizes if case.dynamic == "static" else case.others, 2)]

    def differences(self, backend: str) -> list[str]:
        """How calls of the program compiled with `backend` differ from eager's, in words."""
        torch._dynamo.reset()
        function = self.program.function()
        dynamic = {"static": False, "dynamic": True}.get(self.case.dynamic)
        compiled = torch.compile(self.program.function(), backend=backend, dynamic=dynamic)
        found: list[str] = []
        for number, (sizes, seed) in enumerate(self.calls()):
            try:
                expected = call(function, self.case, self.program.make_inputs(sizes, seed))
            except Exception:
                if number:
                    continue  # a program whose sizes fit the first call only
                return []
            inputs = self.program.make_inputs(sizes, seed)
            if self.case.dynamic == "marked":
                for x in inputs:
                    for dim in range(x.dim()):
                        torch._dynamo.maybe_mark_dynamic(x, dim)
            try:
                actual = call(compiled, self.case, inputs)
            except Exception as error:
                found.append(f"call {number} raised {type(error).__name__}: {str(error)[:1500]}")
                continue
            found += [f"call {number}: {d}" for d in self._compare(expected, actual, sizes, seed)]
        return found

    def _compare(self, expected: Outcome, actual: Outcome, sizes: tuple[int, ...], seed: int) -> Iterator[str]:
        if len(expected.outputs) != len(actual.outputs):
            yield f"{len(actual.outputs)} outputs, not {len(expected.outputs)}"
            return
        if expected.homes != actual.homes:
            yield f"outputs live in the inputs {actual.homes}, not {expected.homes}"
        if expected.sharing != actual.sharing:
            yield f"outputs share memory as {actual.sharing}, not {expected.sharing}"
        bounds = _Bounds(self, sizes, seed)
        for what in ("outputs", "inputs", "grads"):
            before, after = getattr(expected, what), getattr(actual, what)
            if what == "grads" and (expected.grads_raised or actual.grads_raised):
                if not expected.grads_raised:
                    yield "the backward raised"
                continue
            for i, (a, b) in enumerate(zip(before, after, strict=True)):
                difference = _tensors_differ(a, b, what, lambda what=what, i=i: bounds.of(what, i))
                if difference:
                    yield f"{what}[{i}]: {difference}"


class _Bounds:
    """(float64 value, eager's error) of the outputs, inputs and gradients of a call, computed when first asked for."""

    def __init__(self, checker: Checker, sizes: tuple[int, ...], seed: int) -> None:
        self.checker, self.sizes, self.seed = checker, sizes, seed
        self.runs: tuple[Outcome, list[Outcome]] | None = None

    def of(self, what: str, i: int) -> tuple[Tensor, list[Tensor], float] | None:
        """One tensor in float64, eager's on these inputs and on inputs an ulp away, and how large its terms are."""
        program, case = self.checker.program, self.checker.case
        if not program.exact:
            return None
        if self.runs is None:
            try:
                wide = program.make_inputs(self.sizes, self.seed, wide=True)
                exact = call(program.function(EXACT), case, wide)
            except Exception:
                return None
            near = [program.make_inputs(self.sizes, self.seed) for _ in range(4)]
            generator = torch.Generator().manual_seed(3)
            for inputs in near[1:]:
                _nudge(inputs, generator)
            self.runs = exact, [call(program.function(), case, inputs) for inputs in near]
        exact, eager = self.runs
        if exact.grads_raised or any(e.grads_raised for e in eager):
            return None
        # A gradient may be a difference of large terms (that of a norm is): its rounding is that of the terms.
        terms = [*exact.outputs, *exact.grads] if what == "grads" else [getattr(exact, what)[i]]
        return getattr(exact, what)[i], [getattr(e, what)[i] for e in eager], max(map(_largest, terms))


def _nudge(inputs: list[Tensor], generator: torch.Generator) -> None:
    with torch.no_grad():
        for x in inputs:
            if x.is_floating_point() and 0 not in x.stride() and not x.is_inference():
                sign = torch.randint(0, 3, x.shape, generator=generator) - 1
                x.mul_(1 + sign.to(x.dtype) * torch.finfo(x.dtype).eps)


def _tensors_differ(a: Tensor | None, b: Tensor | None, what: str, bound: Callable[[], Any]) -> str | None:
    if a is None or b is None:
        return None if a is b else f"{'is' if b is None else 'is not'} None"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}"
    if what == "outputs":
        if running.layout(a) != running.layout(b):
            return f"strides {b.stride()}, not {a.stride()}"
        if a.requires_grad != b.requires_grad:
            return f"requires_grad is {b.requires_grad}, not {a.requires_grad}"
    a, b = a.detach(), b.detach()
    if torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0)):
        return None
    if not a.is_floating_point():
        return f"{b.tolist()}, not {a.tolist()}"[:400]
    reference = bound()
    if reference is None or reference[0] is None or any(e is None for e in reference[1]):
        return None if torch.allclose(a, b, rtol=1e-2, atol=1e-2, equal_nan=True) else f"{b}, not {a}"[:600]
    return _too_far(b, reference[0].detach().double(), [e.detach() for e in reference[1]], reference[2])


def _largest(value: Tensor | None) -> float:
    """The largest finite magnitude in a tensor."""
    if value is None or not value.is_floating_point() or not value.isfinite().any():
        return 0.0
    return value.detach()[value.isfinite()].abs().max().item()


def _too_far(actual: Tensor, exact: Tensor, eager: list[Tensor], scale: float) -> str | None:
    """Whether `actual` is further from `exact` than the contract allows, by the largest error over the tensor."""
    finite = exact.isfinite()
    for e in eager:
        finite &= e.isfinite()  # where eager itself overflows or not by an ulp, anything may happen
    known = ~exact.isfinite()
    for e in eager:
        known &= e.double().nan_to_num(nan=7e77).eq(exact.nan_to_num(nan=7e77))
    if not torch.equal(actual.double().nan_to_num(nan=7e77)[known], exact.nan_to_num(nan=7e77)[known]):
        return f"not finite in other places: {actual}, exactly {exact}"[:600]
    if not finite.any():
        return None
    error = (actual.double() - exact)[finite].abs()
    ulp = torch.finfo(actual.dtype).eps * scale
    own = max((e.double() - exact)[finite].abs().max().item() for e in eager)
    allowed = 2 * own + ULPS * ulp
    if not error.isfinite().all() or error.max().item() > allowed:
        return f"error {error.max().item():.3g} against float64, allowed {allowed:.3g}, an ulp is {ulp:.3g}"
    return None


def check(case: Case, tally: Counter[str] | None = None) -> None:
    """Raise Difference where fxopt differs from eager in a case that aot_eager gets right, or warns."""
    tally = Counter() if tally is None else tally
    tally["cases"] += 1
    try:
        checker = Checker(case)
    except Exception as error:
        raise RuntimeError(f"no program could be written for {case}") from error
    with running.listening() as messages, fxopt.record() as record:
        found = checker.differences("fxopt")
    tally["graphs"] += len(record.graphs)
    tally["normalised"] += sum(graph.normalized for graph in record.graphs)
    tally["with a fusion"] += bool(record.sites)
    for graph in record.graphs:
        tally.update(f"passed through: {graph.reason.split(' (at ')[0][:100]}" for _ in [0] if graph.reason)
    tally.update(f"site: {site.fusion}" for site in record.sites)
    found += [f"warning: {message[:1500]}" for message in messages]
    if not found:
        return
    # Where AOTAutograd fails on Dynamo's own graph, fxopt's warning that its graph failed says nothing new.
    unexpected = [m for m in messages if not m.startswith("fxopt compiles ")]
    theirs = [] if unexpected else checker.differences("aot_eager")
    if theirs and (not messages or any(" raised " in t for t in theirs)):
        tally["differs under aot_eager too"] += 1
        return
    raise Difference("\n".join([*found, "", checker.program.snippet(), "", repr(case)]))
