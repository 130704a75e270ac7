"""`fxopt explain`: what fused in a model, what did not, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxopt.cli import inputs
from fxopt.cli.console import Narrator, Steps, UserError, console
from fxopt.cli.demo import PROMPTS, SENTENCES

if TYPE_CHECKING:
    from fxopt.demo.models import Loaded
    from fxopt.view.report import GraphReport, Report


def explain(
    model: Annotated[str, typer.Argument(help="smollm2, minilm, a local model's path, or a report saved as .json.")],
    fusion: Annotated[str | None, typer.Option(help="Tell about this fusion only.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to run the model on.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> int:
    """Compile a model with fxopt, run it once, and say what fused, what did not and why."""
    out = console()
    from fxopt.view.explain import Explanation

    if Path(model).suffix.lower() == ".json":
        told = Explanation(_saved(model))
        name = fusion
    else:
        with Narrator(Steps(out)) as say:
            say("loading torch")
            where, as_dtype = inputs.device(device), inputs.dtype(dtype)
            name = inputs.fusion(fusion) if fusion is not None else None
            source = inputs.model_source(model)
            say(f"reading {source.name} from {source.gguf or source.directory.name}")
            loaded = inputs.load_model(source, as_dtype, where)
            say("compiling it with fxopt")
            told = _explain(loaded, prompt)
    if name is not None:
        told = Explanation(only(told.report, name), told.breaks)
    out.print(str(told), markup=False, soft_wrap=True)
    return 0


def only(report: Report, fusion: str) -> Report:
    """The report with what concerns `fusion` and nothing else."""
    from fxopt.view.report import Report

    def part(graph: GraphReport) -> GraphReport:
        lists: dict[str, Any] = {
            field: [item for item in getattr(graph, field) if item.fusion == fusion]
            for field in ("sites", "steps", "misses")
        }
        return dataclasses.replace(graph, **lists)

    return Report([part(graph) for graph in report.graphs])


def _saved(path: str) -> Report:
    from fxopt.view.report import Report

    try:
        return Report.from_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"can't read the report {path}: {' '.join(str(error).split())}") from None


def _explain(loaded: Loaded, prompt: str | None) -> Any:
    import torch

    from fxopt.demo.generate import encode
    from fxopt.demo.models import DemoError
    from fxopt.view.explain import explain

    with torch.inference_mode():
        try:
            if loaded.kind == "generation":
                return explain(loaded.model, encode(loaded, prompt or PROMPTS[0]), use_cache=False)
            batch = loaded.tokenizer([prompt or SENTENCES[0]], return_tensors="pt").to(loaded.device)
            return explain(loaded.model, batch["input_ids"], attention_mask=batch["attention_mask"])
        except DemoError as error:
            raise UserError(str(error)) from None
