"""The command line: `fxopt demo | inspect | explain | diff | passes | new-pass | doctor`.

What is wrong with the user's input is said in one line, with what to do, and ends with exit code 2. torch and
transformers are imported inside the commands: `fxopt --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer

from fxopt.cli import demo, doctor, explain, new_pass, passes
from fxopt.cli.console import UserError

app = typer.Typer(
    name="fxopt",
    help="A torch.compile backend that rewrites a model's graph, checks the result and says what it did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("inspect")(explain.inspect)
app.command("explain")(explain.explain)
app.command("diff")(explain.diff)
app.command("passes")(passes.passes)
app.command("new-pass")(new_pass.new_pass)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from fxopt import __version__

        typer.echo(f"fxopt {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's own) and exit with its status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # we say what is going on; transformers' GGUF reader has no other switch
    warnings.filterwarnings("ignore", message="skipped the fxopt plugin")  # it is logged as well: once is enough
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 done, 1 something failed, 2 wrong input, 130 interrupted."""
    try:
        status = app(args=arguments, prog_name="fxopt", standalone_mode=False)
    except UserError as error:
        return _complain(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)
    except Exception as error:
        # click's own errors; recent versions of typer carry a copy of click under another name
        if not hasattr(error, "format_message"):
            raise
        words = " ".join(error.format_message().split())
        if not words:  # no command was given: typer has shown the help
            return 2
        return _complain(f"{words.rstrip('.')} (see fxopt --help)", 2)
    if status == 130:  # recent versions of typer answer an interrupt by themselves
        return _complain("interrupted", 130)
    return status if isinstance(status, int) else 0


def _complain(words: str, status: int) -> int:
    print(f"fxopt: {words}", file=sys.stderr)
    return status
