"""The site's page of each bundled fusion, made from the fusion itself: docstring, examples, ops, measurements.

Each example is compiled with that fusion and the raising rules alone. What the page shows is the normal form before and
after, printed from the report; a refusal is the reason that the report gives. Nothing is written by hand, so a page
can't say what the code doesn't do.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch

from fxopt import Fusion, Precision
from fxopt.ops import NAMESPACE, FusedOp, find_op
from fxopt.rewrite.plugins import registered
from fxopt.testing import without_inductor
from fxopt.testing.running import run

HERE = Path(__file__).parent

#: options with which a fusion's examples are shown where it rewrites none with its defaults: those for which a
#: measurement or a GPU is asked
ON = {"most_rows": 16, "devices": ("cpu",)}

PRECISION = {
    Precision.BITWISE: "the same floating-point operations in the same order",
    Precision.ROUNDING: "the same mathematics in another rounding order: at most twice as far from float64 as the"
    " original's own arithmetic, plus one unit in the last place",
    Precision.APPROXIMATE: "other mathematics; runs only if it is asked for by name",
}


@dataclass(frozen=True)
class Shown:
    """One example as the page shows it: the graph before and after, or the reason for which it is left alone."""

    name: str
    before: str
    after: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Page:
    """All that a fusion's page says."""

    name: str
    headline: str
    text: str
    stage: str
    precision: str
    source: str
    options: list[tuple[str, str]]
    shown_with: str
    found: list[Shown]
    refused: list[Shown]
    ops: list[FusedOp]
    measured: str

    def markdown(self) -> str:
        """The page."""
        return _TEMPLATES.get_template("fusion.md.j2").render(page=self, schema=schema, title=_title)


def bundled() -> list[Fusion]:
    """The fusions that come with fxopt, those that fuse first, then the rules that raise, by name."""
    mine = [r.fusion for r in registered() if r.distribution == "fxopt"]
    return sorted(mine, key=lambda fusion: (fusion.stage != "fuse", fusion.name))


def pages(measurements: str) -> Iterator[Page]:
    """The page of every bundled fusion; `measurements` is the text of docs/measurements.md."""
    gains = gains_in(measurements)
    with without_inductor():
        for fusion in bundled():
            yield _page(fusion, gains.get(fusion.name, ""))


def gains_in(measurements: str) -> dict[str, str]:
    """Fusion -> what its row of the table "By fusion" says was measured."""
    _, _, rest = measurements.partition("\n## By fusion\n")
    table = rest.split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))


def schema(op: FusedOp) -> str:
    """The op's schema, in lines, without the hash that its overload is named after."""
    plain = re.sub(r"^([\w:]+)\.\w+\(", r"\1(", str(op.overload._schema))
    arguments = [part.replace(" ", "\N{NO-BREAK SPACE}") for part in plain.split(", ")]
    lines = textwrap.fill(", ".join(arguments), 80, subsequent_indent="    ")
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def _page(fusion: Fusion, measured: str) -> Page:
    given: dict[str, object] = {}
    found, refused, ops = _examples(_standing(fusion))
    fields = dataclasses.fields(fusion)
    if not found:
        given = {key: value for key, value in ON.items() if key in {field.name for field in fields}}
        found, refused, ops = _examples(dataclasses.replace(_standing(fusion), **given))
    headline, _, text = (inspect.getdoc(type(fusion)) or "").partition("\n")
    return Page(
        name=fusion.name,
        headline=" ".join(headline.split()),
        text=text.strip(),
        stage=fusion.stage,
        precision=f"`{fusion.precision.value}`: {PRECISION[fusion.precision]}",
        source=f"passes/{Path(inspect.getfile(type(fusion))).name}",
        options=[(field.name, repr(field.default)) for field in fields],
        shown_with=", ".join(f"{key}={value!r}" for key, value in given.items()),
        found=found,
        refused=refused,
        ops=ops,
        measured=re.sub(r"\]\(#", "](../measurements.md#", measured),
    )


def _examples(fusion: Fusion) -> tuple[list[Shown], list[Shown], list[FusedOp]]:
    """The examples that the fusion rewrites, those that it leaves alone, and the ops that it puts in."""
    found: list[Shown] = []
    refused: list[Shown] = []
    ops: dict[str, FusedOp] = {}
    for i, example in enumerate(fusion.examples()):
        torch.manual_seed(0)
        title = example.name or f"example {i + 1}"
        with torch.no_grad():
            _, report = run(fusion, example.program, example.inputs())
        graphs = [graph for graph in report.graphs if graph.before]
        before = "\n".join(_listing(graph.before) for graph in graphs)
        steps = [step for step in report.steps if step.fusion == fusion.name and step.applied]
        if steps:
            found.append(Shown(title, before, "\n".join(_listing(graph.after) for graph in graphs)))
            ops |= {step.op: _op(step.op) for step in steps if step.op}
        else:
            told = [miss.reason for miss in report.misses if miss.fusion == fusion.name]
            reason = next((r for r in told if example.refused and example.refused in r), next(iter(told), ""))
            refused.append(Shown(title, before, reason=reason))
    return found, refused, list(ops.values())


def _standing(fusion: Fusion) -> Fusion:
    """The fusion; of a raising rule, one whose result stands although nothing fuses it."""
    if fusion.stage == "fuse":
        return fusion
    kind = type(fusion)
    made: type[Fusion] = type(
        kind.__name__, (kind,), {"stage": "fuse", "__doc__": kind.__doc__, "__module__": kind.__module__}
    )
    return made()


def _title(name: str) -> str:
    return (name[:1].upper() + name[1:]).replace('"', "'")


def _op(name: str) -> FusedOp:
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return next(op for op in (find_op(getattr(packet, each)) for each in packet.overloads()) if op is not None)


def _listing(graph: str) -> str:
    """A printed graph, fit to be read: no comments, hashes or bookkeeping, inputs by the program's own names."""
    lines = [re.sub(r";  [\w, =]+ = None$", "", line.strip()) for line in graph.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("#", "class "))]
    text = "\n".join(line for line in kept if not re.fullmatch(r"(\w+) = (\w+)", line) or not _is_alias(line))
    text = re.sub(r"torch\.ops\.|(?<=_v)[0-9a-f]{12}\b", "", text)
    text = re.sub(r"_v\b", "", text).replace(str(sys.maxsize), "END")
    text = re.sub(rf"\b({NAMESPACE}\.\w+)\.\w+\(", r"\1(", text)
    text = re.sub(r"\b(aten\.\w+)\.\w+\(", r"\1(", text)
    text = re.sub(r"\bdef forward\(self, ", "def graph(", text)
    for given in dict.fromkeys(re.findall(r"\b[lL]_(\w+?)_(?!\w)", text)):
        if not re.search(rf"^{given}\b", text, re.MULTILINE):  # no node has that name
            text = re.sub(rf"\b[lL]_{given}_(?!\w)", given, text)
    head, _, body = text.partition("\n")
    return "\n".join([head, *(f"    {line}" for line in body.splitlines())])


def _is_alias(line: str) -> bool:
    """Whether the line only gives a placeholder's lower-case name to it."""
    left, right = line.split(" = ")
    return left == right.lower()


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
    autoescape=False,
)
