"""Running one program in several ways and telling the results apart: shared by the OpInfo sweep and the fuzzer.

fxopt hands a graph in which nothing fused on as Dynamo made it, so a sweep over arbitrary programs would hardly test
anything. `rewritten_always` keeps the retraced, canonical graph instead, fused or not; `lowered_by` swaps Inductor for
a lowering that takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.utils._pytree import tree_leaves, tree_map

import fxopt.backend
from fxopt.lower.after_aot import run_after_aot


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def rewritten_always() -> Iterator[None]:
    """The graph that retrace and canonicalisation made is what runs, even where nothing fused."""
    fuse = fxopt.backend._fuse
    with replaced(fxopt.backend, "_fuse", lambda *args, **kwargs: fuse(*args, **kwargs) or 1):
        yield


@contextlib.contextmanager
def lowered_by(lower: Callable[[Any, Sequence[Any]], Any]) -> Iterator[None]:
    """Rewritten graphs are compiled by `lower(module, example_inputs)`, those after AOTAutograd run op by op."""

    def after_aot(module: Any, inputs: Any, options: Any, rewrite: Any, identity: Any) -> Any:
        return run_after_aot(module, inputs, rewrite, core_aten_decompositions())

    with (
        replaced(fxopt.backend, "compile_graph", lambda module, inputs, options: lower(module, inputs)),
        replaced(fxopt.backend, "compile_after_aot", after_aot),
    ):
        yield


class Warnings(logging.Handler):
    """What fxopt warns of: inside it something failed that it did not expect, though the model still runs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """The warnings that fxopt's loggers emit in the block."""
    handler = Warnings()
    logger = logging.getLogger("fxopt")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def copy_of(values: Any) -> Any:
    """A deep copy of a tree of inputs: values, strides, offsets, which tensors share a storage, requires_grad."""
    storages: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.layout != torch.strided or value.is_quantized or type(value) not in (Tensor, torch.nn.Parameter):
            return value.detach().clone().requires_grad_(value.requires_grad)
        home = value.untyped_storage()
        if home._cdata not in storages:
            storages[home._cdata] = home.clone()
        fresh = torch.empty(0, dtype=value.dtype).set_(
            storages[home._cdata], value.storage_offset(), value.size(), value.stride()
        )
        if value.is_conj():
            fresh = fresh.conj()
        if value.is_neg():
            fresh = torch._neg_view(fresh)
        return fresh.requires_grad_(value.requires_grad)

    return tree_map(copy, values)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def gradients(outputs: Any, inputs: Any, seed: int = 7) -> list[Tensor | None]:
    """The gradients of random cotangents of `outputs` with respect to the `inputs` that ask for them."""
    wanted = [t for t in tensors(inputs) if t.requires_grad and t.is_leaf]
    roots = [t for t in tensors(outputs) if t.requires_grad]
    if not wanted or not roots:
        return []
    generator = torch.Generator().manual_seed(seed)
    cotangents = []
    for root in roots:
        real = torch.randn(root.shape, generator=generator, dtype=torch.float64)
        if root.is_complex():
            real = torch.complex(real, torch.randn(root.shape, generator=generator, dtype=torch.float64))
        cotangents.append(real.to(root.dtype))
    return list(torch.autograd.grad(roots, wanted, cotangents, allow_unused=True))


def homes(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[int | None]:
    """For each output the number of the first input whose storage it lives in."""

    def home(value: Tensor) -> int | None:
        return value.untyped_storage()._cdata if value.layout == torch.strided else None

    first: dict[int | None, int] = {}
    for i, value in enumerate(inputs):
        first.setdefault(home(value), i)
    first.pop(None, None)
    return [first.get(home(value)) for value in outputs]


def layout(value: Tensor) -> tuple[Any, ...]:
    """What of a tensor's strides can be told: those of dimensions with more than one element."""
    if value.layout != torch.strided or not value.numel():
        return ()
    return tuple(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)


def in_a_fork(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """`work`'s result from a process of its own; {"died": why} where it crashed or ran past `limit` seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(work()))
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(status)
    os.close(writer)
    text, deadline = b"", time.monotonic() + limit
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while (left := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            chunk = pipe.read(65536)
            if not chunk:
                break
            text += chunk
        else:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        return json.loads(text)
    killed = os.WIFSIGNALED(status)
    late = time.monotonic() >= deadline
    return {"died": f"no end within {limit:.0f} s" if late else f"signal {os.WTERMSIG(status)}" if killed else "raised"}
