"""The backend: what `torch.compile(model, backend="fxopt")` calls for every graph that Dynamo captures.

    Dynamo graph -> gate -> retrace -> canonicalise -> fuse (find, replace, verify) -> place -> Inductor

A graph that the gate or the retrace turns away goes to Inductor as Dynamo made it, and the report says why. So does a
graph in which nothing fused: fxopt then adds nothing and changes nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo
from torch.fx import GraphModule

from fxopt.graph.canonical import canonicalise
from fxopt.graph.gate import refusal
from fxopt.graph.retrace import RetraceError, retrace
from fxopt.lower.compile import compile_graph, gradients_flow, missing_compiler, run_eagerly, uses_cuda_graphs
from fxopt.lower.implementations import Choice, place_implementations
from fxopt.ops import ANYWHERE, Target
from fxopt.options import Options
from fxopt.rewrite import verdicts
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.fusion import Fusion, Precision, Verdict
from fxopt.rewrite.plugins import fusions
from fxopt.rewrite.verify import Verifier
from fxopt.view.record import publish, recording
from fxopt.view.report import GraphReport, Site

log = logging.getLogger(__name__)

_numbers = itertools.count()


def fxopt(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured. `mode` and `options` are those given to torch.compile.

    Raises fxopt.options.OptionError for an option that does not exist. Nothing else that goes wrong in fxopt itself
    reaches the caller: the graph is then compiled as Dynamo made it, with a warning.
    """
    known = fusions()
    chosen = Options.parse(mode, options, known)
    report = GraphReport(name=f"graph {next(_numbers)}", nodes=len(module.graph.nodes))
    report.lowering = f"inductor, mode={chosen.mode}"
    try:
        run = _rewritten(module, example_inputs, known, chosen, report)
    except torch._dynamo.exc.RestartAnalysis:
        raise  # Dynamo is asked to capture the graph again: this one never was
    except Exception as error:
        # Nothing of the user's is lost: the graph that Dynamo made is still there, untouched.
        report.reason = f"{type(error).__name__}: {error}"
        report.normalized, report.sites, run = False, [], None
        log.warning("fxopt compiles %s as Dynamo made it: %s", report.name, report.reason, exc_info=True)
    if run is None:
        run = _compile(module, example_inputs, chosen, report)
    publish(report)
    return run


def reset() -> None:
    """Forget what was learnt in this process (torch._dynamo.reset() calls this)."""
    verdicts.clear()


fxopt.reset = reset  # type: ignore[attr-defined]


def _rewritten(
    module: GraphModule,
    example_inputs: Sequence[Any],
    known: Mapping[str, Fusion],
    options: Options,
    report: GraphReport,
) -> Callable[..., Any] | None:
    """The graph with its fusions applied, compiled; None where it is turned away or nothing fused."""
    normal = _normalise(module, example_inputs, report)
    if normal is None:
        return None
    compiled = missing_compiler(example_inputs) is None
    target = replace(
        ANYWHERE,
        training=gradients_flow(example_inputs),
        compiled=compiled,
        opaque=options.tune != "off",
        cuda_graphs=compiled and uses_cuda_graphs(options),
    )
    verifier = Verifier(options.verify, target=target)
    if not _fuse(normal, _selected(known, options), verifier, report):
        return None
    _place(normal, target, report)
    return _compile(normal, example_inputs, options, report)


def _normalise(module: GraphModule, example_inputs: Sequence[Any], report: GraphReport) -> GraphModule | None:
    report.reason = refusal(module, example_inputs)
    if report.reason is not None:
        return None
    try:
        with _timed(report, "retrace"):
            normal = retrace(module, example_inputs)
    except RetraceError as error:
        report.reason = str(error)
        return None
    with _timed(report, "canonicalise"):
        canonicalise(normal)
    report.normalized = True
    if recording():
        report.before = _text(normal)
    return normal


def _fuse(normal: GraphModule, selected: Sequence[Fusion], verifier: Verifier, report: GraphReport) -> int:
    """Apply the fusions to the normal form, in place; the number of applications that stand."""
    outcome = run_fusions(normal, selected, verifier)
    report.steps, report.misses = outcome.steps, outcome.misses
    report.seconds |= outcome.seconds
    return outcome.fused


def _place(fused: GraphModule, target: Target, report: GraphReport) -> None:
    """Settle how each fused op is computed, in place, and say so in the report."""
    if recording():
        report.after = _text(fused)
    with _timed(report, "place"):
        choices = place_implementations(fused, target)
    report.sites = [_site(choice) for choice in choices]
    report.generated = {f"{choice.op}, {choice.implementation}": choice.code for choice in choices}


def _compile(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, report: GraphReport
) -> Callable[..., Any]:
    reason = missing_compiler(example_inputs)
    with _timed(report, "lower"):
        if reason is not None:
            report.lowering = f"eager: {reason}"
            return run_eagerly(module, reason)
        return compile_graph(module, example_inputs, options)


def _selected(known: Mapping[str, Fusion], options: Options) -> list[Fusion]:
    """The fusions to run. Raising rules run with whatever is named in `fusions`: what they make is undone if unused."""
    named = options.fusions
    return [
        fusion
        for name, fusion in known.items()
        if name not in options.disable
        and (name in named if named is not None and fusion.stage == "fuse" else True)
        and (fusion.precision is not Precision.APPROXIMATE or (named is not None and name in named))
    ]


def _site(choice: Choice) -> Site:
    made_by = choice.provenance
    return Site(
        fusion=made_by.fusion if made_by else choice.op,
        op=choice.op,
        implementation=choice.implementation,
        source=made_by.sources[-1] if made_by and made_by.sources else None,
        module=made_by.module if made_by else None,
        verdict=made_by.verdict if made_by else Verdict("unchecked"),
        passed_over=choice.passed_over,
    )


def _text(module: GraphModule) -> str:
    return module.print_readable(print_output=False)


@contextlib.contextmanager
def _timed(report: GraphReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[stage] = report.seconds.get(stage, 0.0) + time.perf_counter() - start
