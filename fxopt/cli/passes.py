"""`fxopt passes`: the fusions that the backend would run, and where each comes from."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

from fxopt.cli.console import console, table


def passes() -> int:
    """List the registered fusions: stage, precision, what each rewrites, its package and its file."""
    from rich.markup import escape

    from fxopt.rewrite.plugins import registered

    out = console()
    made = table("fusion", "stage", "precision", "rewrites", "from", "defined in")
    for item in registered():
        fusion = item.fusion
        what = (inspect.getdoc(type(fusion)) or "").strip().split("\n")[0]
        row = (fusion.name, fusion.stage, fusion.precision.value, what, item.distribution, _short(fusion.location))
        made.add_row(*map(escape, row))
    if not made.row_count:
        out.print("No fusion is registered: install the package (pip install -e .); see fxopt doctor.")
        return 1
    out.print(made)
    return 0


def _short(location: str) -> str:
    """A file:line below the working directory or the package folder, without what leads there."""
    path, _, line = location.rpartition(":")
    for root in (os.getcwd(), str(Path(inspect.getfile(inspect.getmodule(console) or os)).parents[2])):
        if path.startswith(root + os.sep):
            return f"{os.path.relpath(path, root)}:{line}"
    return location
