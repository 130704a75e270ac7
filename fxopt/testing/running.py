"""Running a program through the backend as a test wants it: quickly, with one fusion, with its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from fxopt.rewrite.fusion import Fusion
from fxopt.rewrite.plugins import fusions, register, unregister
from fxopt.view.record import record
from fxopt.view.report import Report


@contextmanager
def without_inductor() -> Iterator[None]:
    """Rewritten graphs run through AOTAutograd only: Inductor takes seconds a graph, and is not what is tested."""
    from torch._decomp import core_aten_decompositions
    from torch._dynamo.backends.debugging import aot_eager

    import fxopt.backend
    from fxopt.lower.after_aot import run_after_aot

    def after_aot(module: Any, inputs: Any, options: Any, rewrite: Any, identity: Any) -> Any:
        return run_after_aot(module, inputs, rewrite, core_aten_decompositions())

    torch._dynamo.reset()
    with (
        mock.patch.object(fxopt.backend, "compile_graph", lambda module, inputs, options: aot_eager(module, inputs)),
        mock.patch.object(fxopt.backend, "compile_after_aot", after_aot),
    ):
        yield
    torch._dynamo.reset()


@contextmanager
def registered(fusion: Fusion) -> Iterator[None]:
    """The fusion is registered inside of the block, and after it what was there before is."""
    known = fusions().get(fusion.name)
    if known == fusion:
        yield
        return
    register(fusion)
    try:
        yield
    finally:
        unregister(fusion.name)


def run(fusion: Fusion, program: Callable[..., Any], inputs: Sequence[Any], **options: Any) -> tuple[Any, Report]:
    """What `program` returns when it is compiled afresh with this fusion (and all raising rules), and the report."""
    torch._dynamo.reset()
    with registered(fusion), record() as report:
        settings = {"fusions": [fusion.name], **options}
        result = torch.compile(program, backend="fxopt", options=settings)(*inputs)
    return result, report
