"""Inductor's output code: what it made of a graph, and which of its Triton kernels hold the nodes of a fused op.

A fused op that was spelled out again has no kernel of its own. Inductor writes above each launch of a Triton kernel the
names of the graph's nodes that it computes; read backwards that says in which kernels an op ended up. Its C++ has no
such comments: there only the whole is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock


@dataclass(frozen=True)
class Compiled:
    """A Triton kernel of Inductor's: its name, its source, and the graph's nodes that its launches compute."""

    name: str
    source: str
    nodes: set[str] = field(default_factory=set)


@contextmanager
def output_code(wanted: bool = True) -> Iterator[list[str]]:
    """Collects what Inductor writes while the block runs, from its caches too; nothing where torch has no such hook."""
    from torch._inductor.graph import GraphLowering

    written: list[str] = []
    with ExitStack() as stack:
        before = getattr(GraphLowering, "save_output_code", None)
        if wanted and hasattr(GraphLowering, "save_output_code"):

            def save(code: str) -> None:
                written.append(code)
                if before is not None:
                    before(code)

            stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", save))
        yield written


_DEFINED = re.compile(r"^(\w+) = async_compile\.triton\('\w+', r?'''\n(.*?)'''", re.MULTILINE | re.DOTALL)
_LINES = re.compile(r"^ +# (?:Topologically Sorted |Unsorted )?Source Nodes: \[(.*?)\]|^ +(\w+)\.run\(", re.MULTILINE)


def kernels(code: str) -> list[Compiled]:
    """The Triton kernels that `code` defines and launches, in order."""
    found = {name: Compiled(name, source.strip("\n")) for name, source in _DEFINED.findall(code)}
    nodes: list[str] = []
    for named, launched in _LINES.findall(code):
        if launched:
            if launched in found:
                found[launched].nodes.update(nodes)
            nodes = []
        else:
            nodes = [name.strip() for name in named.split(",")]
    return [kernel for kernel in found.values() if kernel.nodes]


def holding(nodes: Iterable[str], found: Iterable[Compiled]) -> list[Compiled]:
    """Those of the kernels that compute one of the nodes."""
    wanted = set(nodes)
    return [kernel for kernel in found if not wanted.isdisjoint(kernel.nodes)]
