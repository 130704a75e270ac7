"""What the commands share: the console, the error for wrong input, and steps that say what is going on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class UserError(Exception):
    """The user's input is wrong; the message is one line that says what to do. Exit code 2."""


def console() -> Console:
    """A console on the present standard output, 120 columns wide where that is no terminal."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=120)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` are aligned there."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


class Steps:
    """Says what is being done, with a running clock in a terminal and as plain lines elsewhere."""

    def __init__(self, out: Console) -> None:
        """`out` is where to say it."""
        self.out = out
        self.start = time.perf_counter()

    @contextmanager
    def step(self, words: str) -> Iterator[None]:
        """One step: its name at once, its duration when it is done."""
        began = time.perf_counter()
        if not self.out.is_terminal:
            self.out.print(f"{began - self.start:6.1f} s  {words} ...", markup=False)
            yield
            return
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        spinner = Spinner("dots")

        def line() -> Table:
            grid = Table.grid(padding=(0, 1))
            grid.add_row(spinner, Text(words), Text(f"{time.perf_counter() - began:.1f} s", style="dim"))
            return grid

        with Live(get_renderable=line, console=self.out, transient=True, refresh_per_second=8):
            yield
        done = Text.assemble(("+ ", "green"), words, (f"  {time.perf_counter() - began:.1f} s", "dim"))
        self.out.print(done)


class Narrator(ExitStack):
    """Turns announcements into steps: each ends where the next begins, the last with the `with` block."""

    def __init__(self, steps: Steps) -> None:
        """Announcements go to `steps`."""
        super().__init__()
        self._steps = steps

    def __call__(self, words: str) -> None:
        """End the step that is open, if any, and begin another."""
        self.close()
        self.enter_context(self._steps.step(words))
