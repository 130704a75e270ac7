"""A plugin on disk whose files are edited between processes: one op a file, each with one place to edit.

Each fusion replaces one unary op of ATen by a fused op that is deliberately not its equal: with `verify="off"` the
result says which version of the file ran. Only the gradient needs Inductor to generate code, so that runs are short.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

_OP = '''
import fxopt, torch
from dataclasses import dataclass
from fxopt import Fusion, Match, fused_op
{imports}

@fused_op("{name}(Tensor x, float times) -> Tensor"{sources})
def {name}(x, times):
    return x * times * {reference}

@{name}.fake
def _(x, times):
    return {fake}

{implementation}

@dataclass(frozen=True)
class Fuse{name}(Fusion):
    """{aten}(x) -> {name}(x)"""

    times: float = 1.0
    anchors = (torch.ops.aten.{aten}.default,)
    name = "{name}"

    def find(self, node, scope):
        return Match((node,), frozenset({{node}}), {{"x": node.args[0]}})

    def rewrite(self, match):
        return match.call({name}, match["x"], {times})

fxopt.register(Fuse{name}({options}))
'''

_OPAQUE = """
@{name}.implementation("kernel", opaque=True)
def _(x, times):
    return {kernel}
"""

#: the place to edit -> the ATen op of the program that the fusion replaces
PLACES = {
    "kernel": "erf",
    "fake": "erfc",
    "backward": "expm1",
    "decomposition": "log1p",
    "source": "lgamma",
    "elsewhere": "sinh",
    "fusion": "cosh",
    "option": "asinh",
}


def write(folder: Path, edited: bool) -> None:
    """Write all files; after the edit each says 7 in the place that it is about, where it said 3 before."""
    number = "7.0" if edited else "3.0"
    for place, aten in PLACES.items():
        name = f"cached_{place}"
        fields = {
            "name": name, "aten": aten, "imports": "", "sources": "", "reference": "3.0", "times": "self.times",
            "fake": "torch.empty_like(x)", "options": "",
        }  # fmt: skip
        kernel = "x * times * 3.0"
        if place == "kernel":
            kernel = f"x * times * {number}"
        elif place == "fake" and edited:  # another layout; code compiled for the old one notices
            fields["fake"] = "x.new_empty(x.shape[::-1]).t()"
            kernel = "(x * times * 7.0).t().contiguous().t()"
        elif place == "backward":  # the gradient is the reference's: the kernel stays what it is
            fields["reference"] = number
        elif place == "source":
            (folder / "cached_helper.py").write_text(f"FACTOR = {number}\n")
            fields |= {"imports": "import cached_helper", "sources": ", sources=[cached_helper.__file__]"}
            kernel = "x * times * cached_helper.FACTOR"
        elif place == "fusion":
            fields["times"] = number
        elif place == "option":
            fields["options"] = f"times={number}"
        implementation = _OPAQUE.format(name=name, kernel=kernel)
        if place == "decomposition":  # traced into the graph
            inlined = f"torch.addmm(x, x, x, beta={number}, alpha=0.0)"
            implementation = _OPAQUE.format(name=name, kernel=inlined).replace(", opaque=True", "")
        elif place == "elsewhere":  # an implementation in another file than its op
            extension = f"from {name} import {name}\n" + _OPAQUE.format(name=name, kernel=f"x * times * {number}")
            (folder / "cached_extension.py").write_text(extension)
            implementation = ""
        (folder / f"{name}.py").write_text(textwrap.dedent(_OP).format(**fields, implementation=implementation))
