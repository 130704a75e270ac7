"""Inserting what was read of a mask: forms, conditions and values over [batch, heads, rows, keys], in a match.

Sizes are read off tensors that the match has bound, elements off the nodes that hold them. What does not depend on a
coordinate has one element along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import aten, val
from fxopt.graph.symbols import Dim
from fxopt.match.masks import insert
from fxopt.match.masks.forms import Form, Read
from fxopt.match.masks.values import Opaque, Value
from fxopt.match.masks.values import atoms as value_atoms
from fxopt.match.match import Match
from fxopt.match.region import size_source


class Inserter:
    """Inserts forms and values over `coordinates` of these `sizes`; symbolic sizes are read off `sources`.

    `again`: nodes to read elements from in place of those that hold them.
    """

    def __init__(
        self,
        match: Match,
        coordinates: Sequence[Form],
        sizes: Sequence[Dim],
        sources: Sequence[Node],
        again: Mapping[Node, Node] | None = None,
    ) -> None:
        self.match = match
        self.coordinates, self.lengths = coordinates, sizes
        self.sources = [s for s in sources if isinstance(val(s), Tensor)]
        self.device = next(val(s).device for s in self.sources)
        self.again = again or {}
        self.sizes: dict[str, Any] = {}

    def insert(self, value: Form | Value, dtype: torch.dtype = torch.bool) -> Node:
        """A form (int64), condition (boolean) or value (`dtype`). Raises Opaque where it can't be spelled out."""
        atoms = value.atoms if isinstance(value, Form) else value_atoms(value)
        lengths = [
            self.size(n) if form.atom in atoms or _reads(form, atoms) else 1
            for form, n in zip(self.coordinates, self.lengths, strict=True)
        ]
        return insert(
            value, self.coordinates, lengths, self.match.call, self.device,
            size=self._of_expression, element=lambda read: self.again.get(read.node, read.node), dtype=dtype,
        )  # fmt: skip

    def row(self, form: Form) -> Node:
        """One number a row: a form without the key, [batch, heads, rows] or broadcast to it."""
        found = self.insert(form)
        return found if val(found).dim() == 0 else self.match.call(aten.squeeze.dim, found, -1)

    def size(self, n: Dim) -> Any:
        """A size as a number or a node."""
        if not isinstance(n, SymInt):
            return n
        key = str(n.node.expr)
        if key not in self.sizes:
            found = size_source(n, self.sources)
            if found is None:
                raise _unknown(n)
            self.sizes[key] = self.match.call(aten.sym_size.int, *found)
        return self.sizes[key]

    def _of_expression(self, expression: Any) -> Any:
        """A size given by its sympy expression, as a number or a node."""
        for source in self.sources:
            for n in val(source).shape:
                if isinstance(n, SymInt) and n.node.expr == expression:
                    return self.size(n)
        raise _unknown(expression)


def _reads(form: Form, atoms: Any) -> bool:
    return any(isinstance(a, Read) and any(form.atom in i.atoms for i in a.index) for a in atoms)


def _unknown(size: Any) -> Opaque:
    return Opaque(f"no tensor of the match has the size {size}")
