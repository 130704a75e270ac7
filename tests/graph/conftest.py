from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fxopt.graph import autocast
from fxopt.graph.canonical import canonicalise
from fxopt.graph.gate import refusal
from fxopt.graph.normalise import normal_forms
from fxopt.graph.retrace import RetraceError


@dataclass
class Captured:
    """Runs the normal form of whatever Dynamo captures and keeps it; what is turned away runs as it is."""

    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        reason = refusal(module, example_inputs)
        if reason is None:
            try:
                parts = normal_forms(module, example_inputs)
            except RetraceError as error:
                reason = str(error)
        if reason is not None:
            self.reasons.append(reason)
            return aot_eager(module, example_inputs)
        for part in parts:
            canonicalise(part)
            part.graph.lint()
        self.graphs += parts
        with autocast.off() as run_without:
            return run_without(aot_eager(parts[0], example_inputs))

    def run(self, program: Any, *inputs: Any, dynamic: bool | None = None) -> Any:
        torch._dynamo.reset()
        return torch.compile(program, backend=self, dynamic=dynamic)(*inputs)

    def targets(self) -> list[Any]:
        return [n.target for g in self.graphs for n in g.graph.nodes if n.op == "call_function"]


@pytest.fixture
def captured() -> Captured:
    return Captured()
