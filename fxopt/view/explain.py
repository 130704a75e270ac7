"""Why did this fuse, and why did that not? Compile a model afresh, run it once, and say it in words.

    print(fxopt.explain(model, x))

The user's own compiled code is left alone: the model is called from a frame made for this one explanation, so what is
compiled is cached there and goes with it, and where the graph breaks inside the model's own frames the backend has an
identity of its own, which keeps the pieces apart from those compiled before or after.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import external_utils
from torch._dynamo.eval_frame import OptimizedModule, innermost_fn
from torch._dynamo.utils import graph_break_reasons
from torch.fx import GraphModule

from fxopt.view import text
from fxopt.view.record import record
from fxopt.view.report import Report

_explained = itertools.count()


@dataclass(frozen=True)
class Explanation:
    """What fused in a model, what did not and why. `str` gives it in words; `report` has the data.

    Attributes:
        report: the same as data
        breaks: one line for each place where the graph broke, in order, without repetition
    """

    report: Report
    breaks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.report.graphs:
            return "no graph was captured: the call ran no tensor operations that torch.compile could see"
        return text.explanation(self.report, self.breaks, left(self.report))


def explain(model: Callable[..., Any], /, *inputs: Any, **kwargs: Any) -> Explanation:
    """Compile `model` with the fxopt backend, call it once on `inputs`, and return what fused, what did not and why.

    `model` is a module or function; if torch.compile made it, what was compiled is taken. The call runs in the caller's
    grad mode, with static shapes (but dimensions marked dynamic), and leaves the random number generators as they were;
    what the model itself writes (buffers, a KV cache among the inputs) is written. Raises whatever the call raises.
    """
    before = len(graph_break_reasons)
    # Static shapes, as at a first call: which dimensions vary is known only from calls that this one hasn't seen.
    static = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with record() as report, static, torch.random.fork_rng(devices=_devices()):
        compiled_afresh(model)(*inputs, **kwargs)
    breaks = [f"{_first_line(r.reason)} ({_place(r.user_stack)})" for r in graph_break_reasons[before:]]
    # Dynamo's own numbering counts every frame compiled in the process; here the same model gives the same text.
    graphs = [dataclasses.replace(graph, name=f"graph {i}") for i, graph in enumerate(report.graphs)]
    return Explanation(Report(graphs), list(dict.fromkeys(breaks)))


def left(report: Report) -> list[str]:
    """Ops that a fusion should take (`Fusion.expected`) and that are left without even a near miss, in words."""
    from fxopt.rewrite.plugins import fusions

    takers = {str(op).removeprefix("aten."): name for name, fusion in fusions().items() for op in fusion.expected}
    found: Counter[tuple[str, str, str]] = Counter()
    for graph in report.graphs:
        told = {name for miss in graph.misses for name in (miss.anchor, miss.node)}
        for node in (node for part in graph.parts for node in part.after if node.name not in told):
            taker = takers.get(node.op) or takers.get(node.op.rpartition(".")[0])
            if taker is not None:
                found[node.op, taker, text.short_source(node.source)] += 1
    times = {key: f", {n} times" if n > 1 else "" for key, n in found.items()}
    return [f"{op}{times[op, taker, at]}: nothing around it looks like {taker}, at {at}" for (op, taker, at) in found]


def compiled_afresh(model: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`model` with the fxopt backend, sharing nothing with what was compiled of it before.

    If torch.compile made `model`, what it was given is taken. `settings` are the backend's `mode` and `options`.
    """
    from fxopt.backend import fxopt

    model = _original(model)

    def backend(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return fxopt(graph, inputs, **settings)

    def frame(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # "self": names then read as in a module
        return self(*args, **kwargs)

    # Dynamo caches per code object, and remembers the shapes seen per name: both are new at each call. It leaves frames
    # of its own wrappers out of stack traces; in their file's name, no node seems to come from here.
    code = frame.__code__.replace(co_name=f"explained_{next(_explained)}", co_filename=external_utils.__file__)
    # torch 2.13 can also keep the pieces of a broken graph from counting towards the user's recompile limit.
    known = inspect.signature(torch.compile).parameters
    isolated: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    compiled = torch.compile(types.FunctionType(code, frame.__globals__), backend=backend, **isolated)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(model, *args, **kwargs)

    return call


def _original(model: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.compile was given, if it made `model`."""
    return model._orig_mod if isinstance(model, OptimizedModule) else innermost_fn(model)


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _first_line(reason: str) -> str:
    return next((line.strip() for line in reason.splitlines() if line.strip()), "unknown reason")


def _place(stack: Any) -> str:
    frames = list(stack or ())
    if not frames:
        return "place unknown"
    last = frames[-1]
    return text.short_source(f"{last.filename}:{last.lineno} in {last.name}: {last.line or ''}".rstrip(": "))
