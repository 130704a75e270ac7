"""`fxopt demo`: a real model through eager mode, Inductor and fxopt, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxopt.cli import inputs
from fxopt.cli.console import Narrator, Steps, UserError, console, table

if TYPE_CHECKING:
    from rich.console import Console

    from fxopt.demo.embed import Embeddings
    from fxopt.demo.generate import Generation
    from fxopt.demo.models import Loaded
    from fxopt.view.report import Report

PROMPTS = (
    "What is a compiler?",
    "Write one sentence about the sea at night.",
    "List three uses of a paper clip, other than holding paper.",
)
SENTENCES = (
    "A compiler turns source code into machine code.",
    "Programs are translated before they run.",
    "The sea is calm tonight.",
    "Waves were breaking on the beach, one after the other, long after the storm had gone.",
)


def demo(
    model: Annotated[
        str, typer.Option(help="smollm2 (generates text), minilm (embeds sentences), or a local model's path.")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt or sentence; give it again for more.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backends: Annotated[
        str, typer.Option(help="Backends to compare; the first is the yardstick.")
    ] = "eager,inductor,fxopt",
    mode: Annotated[str | None, typer.Option(help="torch.compile's mode, for example reduce-overhead.")] = None,
    output: Annotated[
        Path, typer.Option(help="Where the report goes: a directory, or a .html, .json or .txt file.")
    ] = Path("fxopt-report.html"),
) -> int:
    """Run a real model with each backend and compare: results, times, and what fxopt fused."""
    out = console()
    began = time.perf_counter()
    out.print(f"fxopt demo: {model} with {backends}", style="bold", markup=False)
    path = inputs.report_path(output)
    with Narrator(Steps(out)) as say:
        say("loading torch")
        names, where, as_dtype = inputs.backends(backends), inputs.device(device), inputs.dtype(dtype)
        chosen_mode = inputs.mode(mode)
        source = inputs.model_source(model)
        say(f"reading {source.name} from {source.gguf or source.directory.name}")
        loaded = inputs.load_model(source, as_dtype, where)
    _introduce(out, loaded, dtype)
    show = _show_generation if loaded.kind == "generation" else _show_embeddings
    failed, report = show(out, loaded, names, tokens, prompt, chosen_mode)
    if "fxopt" in names and "fxopt" not in failed:
        out.print(f"Report: {report.save(path)}", markup=False, soft_wrap=True)
    out.print(f"Done in {time.perf_counter() - began:.0f} s.")
    return 1 if failed else 0


def _introduce(out: Console, loaded: Loaded, dtype: str) -> None:
    import torch

    on = (
        torch.cuda.get_device_name(loaded.device)
        if loaded.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    millions = loaded.parameters / 1e6
    out.print(f"{type(loaded.model).__name__}, {millions:.0f} M parameters, {dtype}, {on}\n", markup=False)


def _show_generation(
    out: Console, loaded: Loaded, names: list[str], tokens: int, prompts: list[str] | None, mode: str | None
) -> tuple[dict[str, str], Report]:
    from fxopt.demo.generate import encode, generate
    from fxopt.demo.models import DemoError, first_line
    from fxopt.view.record import record

    asked = list(prompts or PROMPTS)
    runs: list[Generation] = []
    failed: dict[str, str] = {}
    with record() as report, Narrator(Steps(out)) as say:
        try:
            ids = [encode(loaded, p) for p in asked]
            for name in names:
                try:
                    runs.append(generate(loaded, ids, tokens, name, mode, say))
                except DemoError:
                    raise
                except Exception as error:  # a backend that fails must not take the others' results with it
                    failed[name] = first_line(error)
        except DemoError as error:
            raise UserError(str(error)) from None
    if runs:
        _generation_table(out, runs)
        _texts(out, loaded, runs, asked)
    _failures(out, failed)
    return failed, report


def _generation_table(out: Console, runs: Sequence[Generation]) -> None:
    from fxopt.demo.compare import tally_text

    right = ("compile", "first token", "tokens/s", "graphs", "breaks")
    made = table("backend", f"tokens as {runs[0].backend}'s", *right, right=right)
    for run in runs:
        compiled = run.backend != "eager"
        made.add_row(
            run.backend,
            _equal(run, runs[0]),
            _compiling(run.compiling, run.cached, run.graphs) if compiled else "-",
            f"{run.first_token * 1e3:.1f} ms",
            f"{run.tokens_per_second:.1f}",
            str(run.graphs) if compiled else "-",
            str(run.breaks) if compiled else "-",
        )
    out.print()
    out.print(made)
    for run in runs:
        if run.prefill.graphs or run.decode.graphs:
            out.print(f"Fused (of the sites found) in the prefill: {tally_text(run.prefill)}")
            out.print(f"                           in the decode:  {tally_text(run.decode)}\n")


def _equal(run: Generation, yardstick: Generation) -> str:
    from fxopt.demo.compare import first_difference

    if run is yardstick:
        return "-"
    pairs = zip(run.answers, yardstick.answers, strict=True)
    parted = [first_difference(ours.tokens, theirs.tokens) for ours, theirs in pairs]
    if all(at is None for at in parted):
        return f"all {len(parted)} equal"
    return ", ".join("equal" if at is None else f"differ from token {at + 1}" for at in parted)


def _texts(out: Console, loaded: Loaded, runs: Sequence[Generation], asked: Sequence[str]) -> None:
    from fxopt.demo.generate import decode_text

    made = table("prompt", "backend", "text")
    for i, prompt in enumerate(asked):
        spoken: dict[tuple[int, ...], list[str]] = {}
        for run in runs:
            spoken.setdefault(run.answers[i].tokens, []).append(run.backend)
        for j, (said, by) in enumerate(spoken.items()):
            who = "all" if len(by) == len(runs) > 1 else ", ".join(by)
            made.add_row(*map(_plain, ("" if j else elide(prompt, 40), who, elide(decode_text(loaded, said), 180))))
    out.print(made)


def _show_embeddings(
    out: Console, loaded: Loaded, names: list[str], tokens: int, prompts: list[str] | None, mode: str | None
) -> tuple[dict[str, str], Report]:
    from fxopt.demo.embed import embed
    from fxopt.demo.models import first_line
    from fxopt.view.record import record

    sentences = list(prompts or SENTENCES)
    runs: list[Embeddings] = []
    failed: dict[str, str] = {}
    with record() as report, Narrator(Steps(out)) as say:
        for name in names:
            try:
                runs.append(embed(loaded, sentences, name, mode, say))
            except Exception as error:
                failed[name] = first_line(error)
    if runs:
        _embedding_tables(out, runs, sentences)
    _failures(out, failed)
    return failed, report


def _embedding_tables(out: Console, runs: Sequence[Embeddings], sentences: Sequence[str]) -> None:
    from fxopt.demo.compare import largest_error, tally_text, worst_cosine

    yardstick = runs[0]
    right = (f"cosine to {yardstick.backend}'s", "largest error", "compile", "batch", "graphs", "breaks")
    made = table("backend", *right, right=right)
    for run in runs:
        compiled = run.backend != "eager"
        made.add_row(
            run.backend,
            "-" if run is yardstick else f"{worst_cosine(run.vectors, yardstick.vectors):.7f}",
            "-" if run is yardstick else f"{largest_error(run.vectors, yardstick.vectors):.1e}",
            _compiling(run.compiling, run.cached, run.graphs) if compiled else "-",
            f"{run.seconds * 1e3:.2f} ms",
            str(run.graphs) if compiled else "-",
            str(run.breaks) if compiled else "-",
        )
    out.print()
    out.print(made)
    for run in runs:
        if run.report.graphs:
            out.print(f"Fused (of the sites found): {tally_text(run.report)}\n")
    likeness = runs[-1].vectors @ runs[-1].vectors.T
    made = table("sentence", *(str(i + 1) for i in range(len(sentences))), right=tuple("123456789"))
    for i, sentence in enumerate(sentences):
        made.add_row(_plain(f"{i + 1}  {elide(sentence, 60)}"), *(f"{x:.2f}" for x in likeness[i].tolist()))
    out.print(f"Cosine similarity of the sentences, by {runs[-1].backend}:")
    out.print(made)


def _compiling(seconds: float, cached: int, graphs: int) -> str:
    note = f" ({cached} of {graphs} cached)" if cached else ""
    return f"{seconds:.1f} s{note}"


def _failures(out: Console, failed: dict[str, str]) -> None:
    for name, why in failed.items():
        out.print(f"!! {name} failed: {why}", style="red", markup=False)


def elide(text: str, length: int) -> str:
    """`text` on one line and at most `length` characters long, its end replaced by "..." if need be."""
    words = " ".join(text.split())
    return words if len(words) <= length else words[: length - 3].rstrip() + "..."


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
