"""`fxopt explain` and `fxopt inspect`: what fused in a model, what did not, and why; in words, as a page, as data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxopt.cli import inputs
from fxopt.cli.console import Narrator, Steps, UserError, console
from fxopt.cli.subject import subject

if TYPE_CHECKING:
    from fxopt.view.explain import Explanation
    from fxopt.view.report import GraphReport, Report

Model = Annotated[
    str,
    typer.Argument(
        help="smollm2, minilm, a local model's path, a configuration's name with --random, module:function that "
        "returns (model, inputs), or a report saved as .json."
    ),
]
Random = Annotated[bool, typer.Option("--random", help="MODEL is a configuration's name: random weights, cut down.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of a random model.")]
Prompt = Annotated[str | None, typer.Option(help="What to run the model on.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


def explain(
    model: Model,
    fusion: Annotated[str | None, typer.Option(help="Tell about this fusion only.")] = None,
    random: Random = False,
    layers: Layers = 2,
    prompt: Prompt = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> int:
    """Compile a model with fxopt, run it once, and say what fused, what did not and why."""
    from fxopt.view.explain import Explanation

    saved = Path(model).suffix.lower() == ".json"
    if fusion is not None and not saved:
        fusion = inputs.fusion(fusion)
    told = _told(model, random, layers, prompt, dtype, device)
    if fusion is not None:
        told = Explanation(only(told.report, fusion), told.breaks)
    console().print(str(told), markup=False, soft_wrap=True)
    return 0


def inspect(
    model: Model,
    html: Annotated[Path | None, typer.Option(help="Write a page to step through the rewrites.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the same as data.")] = None,
    graph: Annotated[Path | None, typer.Option(help="Write the rewritten graphs, as .graphml or .dot.")] = None,
    kernels: Annotated[Path | None, typer.Option(help="Write each kernel as a file that checks itself, here.")] = None,
    random: Random = False,
    layers: Layers = 2,
    prompt: Prompt = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> int:
    """Compile a model with fxopt, run it once, and show what was rewritten: a table, a page, data."""
    out = console()
    for path, suffixes in ((html, (".html",)), (json, (".json",)), (graph, (".graphml", ".dot"))):
        if path is not None and path.suffix.lower() not in suffixes:
            raise UserError(f"can't write {path.name} there: its name must end in {' or '.join(suffixes)}")
    report = _told(model, random, layers, prompt, dtype, device).report
    out.print(report)
    for path in (html, json, graph):
        if path is not None:
            try:
                out.print(f"written: {report.save(path.expanduser())}", markup=False, soft_wrap=True)
            except OSError as error:
                raise UserError(f"can't write {path}: {error.strerror or error}") from None
            except (ImportError, ValueError) as error:  # no networkx; nothing was drawn
                raise UserError(f"can't write {path}: {error}") from None
    if kernels is not None:
        try:
            for written in report.kernels(kernels.expanduser()):
                out.print(f"written: {written}", markup=False, soft_wrap=True)
        except OSError as error:
            raise UserError(f"can't write to {kernels}: {error.strerror or error}") from None
        except ValueError as error:
            raise UserError(f"can't write kernels: {error}") from None
    return 0


def diff(
    before: Annotated[Path, typer.Argument(help="A report saved as .json.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
) -> int:
    """Compare two reports: sites and near misses that came or went. Exit code 1 where they differ."""
    from fxopt.view.diff import differences

    lines = differences(saved_report(before), saved_report(after))
    console().print("\n".join(lines) or "no difference", markup=False, soft_wrap=True)
    return 1 if lines else 0


def only(report: Report, fusion: str) -> Report:
    """The report with what concerns `fusion` and nothing else."""
    from fxopt.rewrite.plugins import fusions
    from fxopt.view.report import Report

    expected = getattr(fusions().get(fusion), "expected", ())

    def part(graph: GraphReport) -> GraphReport:
        lists: dict[str, Any] = {
            field: [item for item in getattr(graph, field) if item.fusion == fusion]
            for field in ("sites", "steps", "misses")
        }
        # The drawings say which of its ops are left; what belongs to steps by their number goes.
        parts = [dataclasses.replace(drawn, steps=(0, 0), savings={}) for drawn in graph.parts if expected]
        return dataclasses.replace(graph, parts=parts, **lists)

    return Report([part(graph) for graph in report.graphs], report.kernel_sources)


def saved_report(path: Path | str) -> Report:
    """The report in a file. Raises UserError where there is none."""
    from fxopt.view.report import Report

    try:
        return Report.from_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the report {path}: {' '.join(str(error).split())}") from None


def _told(model: str, random: bool, layers: int, prompt: str | None, dtype: str, device: str) -> Explanation:
    """What there is to tell of MODEL: read from a report, or found out by compiling it."""
    from fxopt.view.explain import Explanation, explain

    if Path(model).suffix.lower() == ".json":
        return Explanation(saved_report(model))
    with Narrator(Steps(console())) as say:
        say("loading torch")
        import torch

        found = subject(model, random=random, layers=layers, prompt=prompt, dtype=dtype, device=device, say=say)
        say(f"compiling {found.name} with fxopt")
        with torch.no_grad() if ":" in model else torch.inference_mode():
            try:
                return explain(found.model, *found.args, **found.kwargs)
            except Exception as error:
                words = " ".join(str(error).split())[:300]
                raise UserError(f"{found.name} can't be run: {type(error).__name__}: {words}") from error
