"""Turning what the user typed into torch's terms, or into one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fxopt.cli.console import UserError

if TYPE_CHECKING:
    import torch

    from fxopt.demo.models import Loaded, Source

DTYPES = ("float32", "bfloat16", "float16", "float64")
SUFFIXES = (".html", ".json", ".txt")


def known(what: str, given: str, names: Iterable[str], shown: Iterable[str] = ()) -> str:
    """`given` if it is one of `names`; otherwise raises UserError with the nearest one and those `shown` (or all)."""
    names = list(names)
    if given in names:
        return given
    near = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"unknown {what} {given!r}: {hint}known are {', '.join(shown or names) or 'none'}")


def dtype(given: str) -> torch.dtype:
    """The floating-point dtype of that name."""
    import torch

    found: torch.dtype = getattr(torch, known("dtype", given, DTYPES))
    return found


def device(given: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the CPU where there is none."""
    import torch

    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"unknown device {given!r}: give auto, cpu, cuda or cuda:N")
    try:
        found = torch.device(given)
    except RuntimeError:
        raise UserError(f"unknown device {given!r}: give auto, cpu, cuda or cuda:N") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {given}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        )
    return found


def backends(given: str) -> list[str]:
    """Names from a comma-separated list, each a registered torch.compile backend or "eager"."""
    import torch

    registered = ["eager", *torch.compiler.list_backends(exclude_tags=())]
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise UserError("--backends names none: give for example eager,inductor,fxopt")
    if "fxopt" in names and "fxopt" not in registered:
        raise UserError(
            "torch doesn't know the backend fxopt: install the package (pip install -e .); see fxopt doctor"
        )
    usual = dict.fromkeys(["eager", *torch.compiler.list_backends()])  # without those for debugging
    return [known("backend", name, dict.fromkeys(registered), usual) for name in names]


def fusion(given: str) -> str:
    """The name of a registered fusion."""
    from fxopt.rewrite.plugins import fusions

    return known("fusion", given, fusions())


def report_path(given: Path) -> Path:
    """Where a report goes: the file itself, or `fxopt-report.html` in a directory."""
    path = given.expanduser()
    if path.is_dir() or not path.suffix:
        path = path / "fxopt-report.html"
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"can't save a report as {path.name}: give a directory, or a file ending in {', '.join(SUFFIXES)}"
        )
    return path


def model_source(given: str) -> Source:
    """The files of a model, by name or path."""
    from fxopt.demo.models import DemoError, find

    try:
        return find(given)
    except DemoError as error:
        raise UserError(str(error)) from None


def load_model(source: Source, as_dtype: torch.dtype, on: torch.device) -> Loaded:
    """Load a model."""
    from fxopt.demo.models import DemoError, load

    try:
        return load(source, as_dtype, on)
    except DemoError as error:
        raise UserError(str(error)) from None


def mode(given: str | None) -> str | None:
    """One of torch.compile's modes, or None."""
    from fxopt.options import MODES

    return None if given is None else known("mode", given, MODES)
