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

from fxopt.graph import autocast
from fxopt.graph.canonical import canonicalise, merge_masks
from fxopt.graph.gate import refusal
from fxopt.graph.normalise import normal_forms
from fxopt.graph.retrace import RetraceError
from fxopt.lower.after_aot import compile_after_aot, run_after_aot, serves
from fxopt.lower.compile import (
    compile_graph,
    gradients_flow,
    launches,
    missing_compiler,
    patches,
    run_eagerly,
    start_compilers,
    uses_cuda_graphs,
    warn_once,
)
from fxopt.lower.counters import count_together
from fxopt.lower.identity import pass_identity
from fxopt.lower.implementations import Choice, place_implementations
from fxopt.lower.integers import without_integers
from fxopt.lower.outer import multiply_outer
from fxopt.lower.outline_compile import describe, outlined
from fxopt.ops import ANYWHERE, Target
from fxopt.options import Options
from fxopt.rewrite import verdicts
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.fusion import Fusion, Precision, Verdict
from fxopt.rewrite.guard import GraphBroken
from fxopt.rewrite.plugins import fusions
from fxopt.rewrite.verify import Verifier
from fxopt.tune import session, store
from fxopt.undisturbed import undisturbed
from fxopt.view.inductor import output_code
from fxopt.view.recall import keep, recall
from fxopt.view.record import drawn, publish, recording
from fxopt.view.report import AFTER_AOT, GraphReport, Site

log = logging.getLogger(__name__)

_numbers = itertools.count()


@undisturbed
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
        with output_code(recording()) as written:
            run = _without_broken(module, example_inputs, known, chosen, report)
        report.compiled = "\n".join(written)
    except torch._dynamo.exc.RestartAnalysis:
        raise  # Dynamo is asked to capture the graph again: this one never was
    except Exception as error:
        # Nothing of the user's is lost: the graph that Dynamo made is still there, untouched.
        report.reason = f"{type(error).__name__}: {error}"
        report.normalized, report.sites, run = False, [], None
        # Some errors Dynamo answers with a graph break (a size that depends on data): its own graph raises them too.
        level = (
            logging.INFO if isinstance(error, torch._dynamo.exc.exceptions_allowed_to_be_fallback) else logging.WARNING
        )
        log.log(level, "fxopt compiles %s as Dynamo made it: %s", report.name, report.reason, exc_info=True)
    if run is None:
        run = _compile(module, example_inputs, chosen, report)
    publish(report)
    return run


def reset() -> None:
    """Forget what was learnt in this process (torch._dynamo.reset() calls this)."""
    verdicts.clear()
    store.clear()


fxopt.reset = reset  # type: ignore[attr-defined]


def _without_broken(
    module: GraphModule,
    example_inputs: Sequence[Any],
    known: Mapping[str, Fusion],
    options: Options,
    report: GraphReport,
) -> Callable[..., Any] | None:
    """`_rewritten`, begun again without a fusion that changed the graph by itself."""
    while True:
        try:
            return _rewritten(module, example_inputs, known, options, report)
        except GraphBroken as error:
            log.warning("fxopt compiles %s without a fusion: %s", report.name, error)
            known = {name: fusion for name, fusion in known.items() if name != error.fusion}
            clean = GraphReport(report.name, nodes=report.nodes, lowering=report.lowering)
            clean.notes = [*report.notes, f"left out: {error}"]
            vars(report).update(vars(clean))


def _rewritten(
    module: GraphModule,
    example_inputs: Sequence[Any],
    known: Mapping[str, Fusion],
    options: Options,
    report: GraphReport,
) -> Callable[..., Any] | None:
    """The graph with its fusions applied, compiled; None where it is turned away or nothing fused."""
    compiled = missing_compiler(example_inputs) is None
    if compiled:
        start_compilers(example_inputs)
    target = replace(
        ANYWHERE,
        training=gradients_flow(module, example_inputs),
        compiled=compiled,
        opaque=options.tune != "off",
        cuda_graphs=compiled and uses_cuda_graphs(options),
    )
    verifier = Verifier(options.verify, target=target)
    selected = _selected(known, options)
    parts = _normalise(module, example_inputs, report)
    with session(options.tune, target, patches(options)):
        if not parts:
            return _after_aot(module, example_inputs, selected, options, verifier, report)
        with autocast.off() as run_without:  # the normal form holds its casts
            if not sum([_fuse(part, selected, verifier, report) for part in parts]):
                return None
            _place(parts, target, report)
            if not target.training:
                multiply_outer(parts[0])
                if launches(example_inputs):
                    count_together(parts[0])
            counted = without_integers(parts[0], example_inputs) if target.cuda_graphs and not target.training else None
            if isinstance(counted, str):
                report.notes.append(f"a CUDA graph is recorded for each value of its integers: {counted}")
            if counted is None or isinstance(counted, str):
                return run_without(_compile_outlined(parts[0], example_inputs, options, target.training, report))
            run = _compile_outlined(counted.module, counted.inputs, options, target.training, report)
            return run_without(counted.wrapped(run))


def _normalise(module: GraphModule, example_inputs: Sequence[Any], report: GraphReport) -> list[GraphModule]:
    """The normal form of the graph, then those of the graphs inside it; empty where it is turned away."""
    report.reason = refusal(module, example_inputs)
    if report.reason is not None:
        return []
    try:
        with _timed(report, "retrace"):
            parts = normal_forms(module, example_inputs)
    except RetraceError as error:
        report.reason = str(error)
        return []
    with _timed(report, "canonicalise"):
        for part in parts:
            canonicalise(part)
    report.normalized = True
    if recording():
        report.before = _text(parts)
    return parts


def _after_aot(
    module: GraphModule,
    example_inputs: Sequence[Any],
    selected: Sequence[Fusion],
    options: Options,
    verifier: Verifier,
    report: GraphReport,
) -> Callable[..., Any] | None:
    """The second entry: the graph is rewritten between AOTAutograd and Inductor. None where it has a backward."""
    if not serves(module, example_inputs):
        return None

    def rewrite(normal: GraphModule) -> bool:
        nonlocal selected
        drawn_before = report.before
        with _timed(report, "canonicalise"):
            canonicalise(normal)
        if recording():
            report.before += _text([normal])
        with autocast.off():  # AOTAutograd has made casts of it
            try:
                if not _fuse(normal, selected, verifier, report):
                    return False
            except GraphBroken as error:  # AOTAutograd's own graph is still there, to begin again with
                selected = [fusion for fusion in selected if fusion.name != error.fusion]
                report.before = drawn_before
                report.notes.append(f"left out: {error}")
                raise
            _place([normal], verifier.target, report)
        return True

    reason = missing_compiler(example_inputs)
    with _timed(report, "lower"):
        if reason is not None:
            report.lowering = f"eager: {reason}"
            warn_once(reason)
            run, _ = run_after_aot(module, example_inputs, rewrite)
        else:
            identity = pass_identity(selected, (options.verify, verifier.target, options.tune, store.fingerprint()))
            key = f"{identity} {options!r} {_text([module])}"
            run, graphs = compile_after_aot(module, example_inputs, options, rewrite, identity)
            if graphs:
                keep(report, key)
            elif not recall(report, key):
                report.notes.append("the compiled code came from a cache, and what was fused in it is not known here")
    report.entry, report.turned_away, report.reason = AFTER_AOT, report.reason, None
    report.normalized = True
    return run


def _fuse(part: GraphModule, selected: Sequence[Fusion], verifier: Verifier, report: GraphReport) -> int:
    """Apply the fusions to a normal form, in place; the number of applications that stand."""
    with drawn(part, report):
        outcome = run_fusions(part, selected, verifier)
        report.steps += outcome.steps
    if outcome.fused:
        merge_masks(part.graph)  # what layers share of their masks, fusions make for each of them
        part.recompile()
    report.misses += outcome.misses
    for stage, seconds in outcome.seconds.items():
        report.seconds[stage] = report.seconds.get(stage, 0.0) + seconds
    return outcome.fused


def _place(parts: Sequence[GraphModule], target: Target, report: GraphReport) -> None:
    """Settle how each fused op is computed, in place, and say so in the report."""
    if recording():
        report.after += _text(parts)
    with _timed(report, "place"):
        choices = [choice for part in parts for choice in place_implementations(part, target)]
    for choice in choices:
        name = _code_name(report.generated, choice)
        report.generated[name] = choice.code
        report.sites.append(_site(choice, name))


def _compile(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, report: GraphReport
) -> Callable[..., Any]:
    reason = missing_compiler(example_inputs)
    with _timed(report, "lower"):
        if reason is not None:
            report.lowering = f"eager: {reason}"
            return run_eagerly(module, reason)
        return compile_graph(module, example_inputs, options)


def _compile_outlined(
    module: GraphModule, example_inputs: Sequence[Any], options: Options, training: bool, report: GraphReport
) -> Callable[..., Any]:
    """Compile with layers that repeat compiled once; as the graph is where they don't, or where that goes wrong."""
    if missing_compiler(example_inputs) is None:
        try:
            with _timed(report, "outline"):
                found = outlined(module, options, training=training)
            report.notes += [f"not outlined: {objection}" for objection in found.objections]
            if found.bodies:
                with _timed(report, "lower"):
                    run = compile_graph(found.module, example_inputs, options)
                report.outlined = describe(found)
                return run
        except torch._dynamo.exc.RestartAnalysis:
            raise
        except Exception as error:
            report.notes.append(f"not outlined: {type(error).__name__}: {error}")
            log.warning("fxopt compiles the layers of %s one by one: %s", report.name, error, exc_info=True)
    return _compile(module, example_inputs, options, report)


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


def _code_name(generated: Mapping[str, str], choice: Choice) -> str:
    """The name under which the code of `choice` is, or will be: sites that are computed alike share one."""
    plain = f"{choice.op}, {choice.implementation}"
    names = itertools.chain([plain], (f"{plain} ({i})" for i in itertools.count(2)))
    return next(name for name in names if generated.get(name, choice.code) == choice.code)


def _site(choice: Choice, code: str) -> Site:
    made_by = choice.provenance
    return Site(
        fusion=made_by.fusion if made_by else choice.op,
        op=choice.op,
        implementation=choice.implementation,
        source=made_by.sources[-1] if made_by and made_by.sources else None,
        module=made_by.module if made_by else None,
        verdict=made_by.verdict if made_by else Verdict("unchecked"),
        passed_over=choice.passed_over,
        node=choice.node,
        arguments=choice.arguments,
        code=code,
        opaque=choice.opaque,
        placed=choice.placed,
    )


def _text(parts: Sequence[GraphModule]) -> str:
    return "\n".join(part.print_readable(print_output=False) for part in parts)


@contextlib.contextmanager
def _timed(report: GraphReport, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[stage] = report.seconds.get(stage, 0.0) + time.perf_counter() - start
