"""A failed comparison as a Python script that shows it: the inputs, the original, the replacement, the difference."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxopt import cachedir
from fxopt.graph.query import val
from fxopt.ops import find_op
from fxopt.rewrite import draws
from fxopt.rewrite.region import Pair
from fxopt.rewrite.standin import Sizes
from fxopt.rewrite.trials import Trial

_CHECK = """
inputs = make_inputs()
old, new = original(*inputs), replacement(*inputs)
for i, (a, b) in enumerate(zip(old, new)):
    a, b = a.double(), b.double()
    print(f"output {i} {list(a.shape)}: largest difference {(a - b).abs().nan_to_num(0).max():.3g},",
          f"largest element {a.abs().nan_to_num(0).max():.3g}, NaN {int(a.isnan().sum())} -> {int(b.isnan().sum())}")
"""


def write_repro(name: str, detail: str, pair: Pair, sizes: Sizes, trial: Trial) -> str | None:
    """Write the script for one failed trial to the cache directory; its path, or None if there is nowhere to put it."""
    folder = cachedir.cachedir("repro")
    if folder is None:
        return None
    text = script(name, detail, pair, sizes, trial)
    path = folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:10]}.py"
    return str(path) if cachedir.write(path, text.encode()) else None


def script(name: str, detail: str, pair: Pair, sizes: Sizes, trial: Trial) -> str:
    """The script's text. It runs both sides on the CPU, in the dtypes of the model."""
    modules = sorted({op.reference.__module__ for n in pair.nodes if (op := find_op(n.target)) is not None})
    parts = [
        f'"""{name}: the replacement differs from the original.\n\n{detail}\n"""',
        *(f"import {module}  # noqa: F401 (defines the fused op)" for module in modules if module != "__main__"),
        inspect.getsource(draws).split('"""', 2)[2].replace("from __future__ import annotations", "").strip(),
        "device = torch.device\ninf = math.inf\nnan = math.nan",
        _inputs(pair, trial),
        _function("original", pair, pair.old, pair.outputs, sizes),
        _function("replacement", pair, pair.new, pair.replacements, sizes),
        _CHECK.strip(),
    ]
    return "\n\n\n".join(parts) + "\n"


def _inputs(pair: Pair, trial: Trial) -> str:
    # The draws share one generator, so they are made in the trial's order and handed over in the inputs'.
    generator = f"torch.Generator({str(trial.device)!r}).manual_seed({trial.seed})"
    lines = ["def make_inputs():", f"    generator = {generator}"]
    for node, draw in trial.draws.items():
        lines.append(f"    {_name(node)} = {draw!r}.make(generator).cpu()")
    for node, value in trial.given.items():
        lines.append(f"    {_name(node)} = {_literal(value)}")
    lines.append(f"    return [{', '.join(_name(n) for n in pair.inputs)}]")
    return "\n".join(lines)


def _name(node: Node) -> str:
    return f"in_{node.name}"


def _literal(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"torch.tensor({value.tolist()!r}, dtype={value.dtype})"
    return repr(value)


def _function(name: str, pair: Pair, nodes: tuple[Node, ...], ends: tuple[Node, ...], sizes: Sizes) -> str:
    graph = Graph()
    values: dict[Node, Any] = {n: graph.placeholder(_name(n)) for n in pair.inputs}
    for node in nodes:
        args, kwargs = sizes.arguments(node, values, torch.device("cpu"))
        values[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        shape = sizes.shape(val(node)) if isinstance(val(node), Tensor) else None
        values[node].meta["shape"] = shape
    graph.output(tuple(values[n] for n in ends))
    code = GraphModule({}, graph).code.strip()
    return code.replace("def forward(self, ", f"def {name}(", 1).replace("def forward(self)", f"def {name}()", 1)
