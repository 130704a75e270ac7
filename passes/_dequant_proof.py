"""What a dequantising chain computes: found by running it, accepted only where every number is exactly equal.

The claim is, with q unpacked from the root in one of the known layouts,

    w[n, k] = (q[n, k] - offset - zero[n, k // g]) * scale[n, k // g] + minimum[n, k // g]

Ops in a chain are polynomial in the floats and act on integers bit by bit or by plain arithmetic, and the values drawn
are dyadic, so that float64 computes both sides without rounding: equality at random points is a proof for all
practical purposes, and a wrong layout, a group along the wrong dimension, a sign or a wrap-around can't pass.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import val
from fxopt.kernels._int4 import candidates, unpack
from fxopt.passes._dequant_chain import Chain, integer_range

#: tables of a dequantisation and the value that makes each disappear
NEUTRAL = {"scale": 1.0, "zero": 0.0, "minimum": 0.0}


@dataclass(frozen=True)
class Formula:
    """What was proven. `forms` says for each table how its elements lie: see `table`."""

    layout: str  # "int8", or a layout of fxopt.kernels._int4
    group_size: int
    offset: float
    forms: tuple[tuple[str, str], ...]


def table(form: str, value: Tensor, outputs: int) -> Tensor:
    """A table of any shape as [outputs, groups]: its elements are outputs first ("n,g"), groups first, or one."""
    if form == "g,n":
        return value.reshape(-1, outputs).t()
    return value.reshape(outputs, -1) if form == "n,g" else value.reshape(1, 1).expand(outputs, 1)


def as_rows(root: Tensor, axis: int, outputs: int) -> Tensor:
    """The root as [outputs, words of a row]."""
    return root.t() if axis == 1 else root.reshape(outputs, -1)


def prove(chain: Chain, root: Node, tables: dict[str, Node], inputs: int, negated: bool = False) -> Formula | str:
    """The formula of `chain` for a weight of `inputs` inputs, or why there is none, in words.

    With `negated` the minimum is subtracted: the formula is that of its negative.
    """
    proof = _Proof(chain, root, tables, inputs, -1.0 if negated else 1.0)
    ranges = tuple(integer_range(n) for n in tables.values() if not val(n).dtype.is_floating_point)
    key = (chain.signature([root, *tables.values()]), tuple(tables), inputs, negated, ranges)
    if key not in _PROVEN:
        _PROVEN[key] = proof.run()
    return _PROVEN[key]


_PROVEN: dict[Any, Formula | str] = {}  # structure -> verdict: layers that are alike are proven once


class _Proof:
    def __init__(self, chain: Chain, root: Node, tables: dict[str, Node], inputs: int, sign: float) -> None:
        self.chain, self.root, self.tables, self.inputs, self.sign = chain, root, tables, inputs, sign
        # Enough values to meet every byte, few enough to take a millisecond.
        self.rows = min(chain.outputs, max(8, -(-4096 // inputs)))
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> Formula | str:
        packed = self._packed()
        plain = self._weight({self.root: packed, **self._neutral()})
        rows = self._rows(packed)
        groups = [self._groups(node) for node in self.tables.values()]
        if any(count is None or count > self.inputs or self.inputs % count for count in groups):
            return self._bad_table(groups)
        group_size = self.inputs // max((g for g in groups if g is not None), default=1)
        layout = self._layout(plain, rows, group_size)
        if layout is None:
            return "the unpacked values follow none of the known layouts of packed weights"
        name, offset = layout
        choices = [self._forms(node) for node in self.tables.values()]
        for forms in itertools.product(*choices):
            named = tuple(zip(self.tables, forms, strict=True))
            if all(self._agrees(name, offset, named) for _ in range(2)):
                return Formula(name, group_size, offset, named)
        return self._why_not(name, offset)

    def _agrees(self, layout: str, offset: float, forms: tuple[tuple[str, str], ...]) -> bool:
        """Whether chain and formula agree on random values of everything."""
        packed = self._packed()
        given = {self.root: packed} | {node: self._draw(role, node) for role, node in self.tables.items()}
        w = self._unpacked(self._rows(packed), layout) - offset
        spread = {role: self._spread(form, given[self.tables[role]]) for role, form in forms}
        w = (w - spread.get("zero", 0.0)) * spread.get("scale", 1.0) + self.sign * spread.get("minimum", 0.0)
        return torch.equal(self._weight(given), w.expand(self.rows, self.inputs))

    def _rows(self, packed: Tensor) -> Tensor:
        axis = self.chain.axes[self.root]
        assert axis is not None
        return as_rows(packed, axis[0], self.rows)

    def _neutral(self) -> dict[Node, Tensor]:
        return {n: self._full(n, NEUTRAL[r]) for r, n in self.tables.items()}

    def _spread(self, form: str, value: Tensor) -> Tensor:
        """A table as [rows, inputs] in float64."""
        small = table(form, value, self.rows).to(torch.float64)
        return small.repeat_interleave(self.inputs // small.shape[1], 1)

    def _unpacked(self, rows: Tensor, layout: str) -> Tensor:
        return (rows if layout == "int8" else unpack(rows, layout)).to(torch.float64)

    def _layout(self, plain: Tensor, rows: Tensor, group: int) -> tuple[str, float] | None:
        """The layout and offset that explain the chain's values where all tables are neutral."""
        eight = rows.shape[1] == self.inputs
        for name in ["int8"] if eight else candidates(rows.dtype, self.inputs, group):
            gap = self._unpacked(rows, name) - plain
            if bool((gap == gap[0, 0]).all()):
                return name, float(gap[0, 0])
        return None

    def _weight(self, given: dict[Node, Tensor]) -> Tensor:
        weight = self.chain.evaluate(given, self.rows)
        axis = self.chain.axes[self.chain.weight]
        return weight if axis is not None and axis[0] == 0 else weight.t()

    def _packed(self) -> Tensor:
        """Random words, every byte value among them where there is room."""
        info = torch.iinfo(val(self.root).dtype)
        shape = self.chain.shape(self.root, self.rows)
        drawn = torch.randint(info.min, info.max + 1, shape, generator=self.generator, dtype=torch.int64)
        if info.bits == 8 and drawn.numel() >= 256:
            drawn.view(-1)[torch.randperm(drawn.numel(), generator=self.generator)[:256]] = torch.arange(
                info.min, info.max + 1
            )
        return drawn.to(val(self.root).dtype)

    def _full(self, node: Node, value: float) -> Tensor:
        return torch.full(self.chain.shape(node, self.rows), value, dtype=self._dtype(node))

    def _dtype(self, node: Node) -> torch.dtype:
        dtype: torch.dtype = val(node).dtype
        return torch.float64 if dtype.is_floating_point else dtype

    def _draw(self, role: str, node: Node) -> Tensor:
        """Dyadic numbers that float64 adds and multiplies without rounding; all values an integer can take."""
        shape = self.chain.shape(node, self.rows)
        if val(node).dtype.is_floating_point:
            low, high, step = {"scale": (1, 65, 16), "zero": (-60, 61, 4), "minimum": (-64, 65, 32)}[role]
            return torch.randint(low, high, shape, generator=self.generator).to(torch.float64) / step
        low, high = (max(min(bound, 2**20), -(2**20)) for bound in integer_range(node))
        drawn = torch.randint(low, high + 1, shape, generator=self.generator)
        usual = torch.randint(max(low, 0), max(min(high, 15), low, 0) + 1, shape, generator=self.generator)
        mixed = torch.where(torch.rand(shape, generator=self.generator) < 0.5, usual, drawn)
        if mixed.numel() >= 2:
            mixed.view(-1)[0], mixed.view(-1)[-1] = low, high
        return mixed.to(val(node).dtype)

    def _groups(self, node: Node) -> int | None:
        """Entries of a table for each output (1 for a single number), or None if it has none of its own."""
        count = int(val(node).numel())
        if count == 1:
            return 1
        return count // self.chain.outputs if self.chain.axes.get(node) is not None else None

    def _forms(self, node: Node) -> list[str]:
        if val(node).numel() == 1:
            return ["1"]
        return ["n,g", "g,n"] if self._groups(node) != 1 else ["n,g"]

    def _bad_table(self, groups: list[int | None]) -> str:
        for (role, node), count in zip(self.tables.items(), groups, strict=True):
            if count is None:
                shape = tuple(val(node).shape)
                return (
                    f"the {role} {shape} differs along the inputs ({self.inputs}) and not along the outputs"
                    f" ({self.chain.outputs}): it can't be taken out of the sum"
                )
        return f"the groups don't divide the {self.inputs} inputs evenly"

    def _why_not(self, layout: str, offset: float) -> str:
        """Which table breaks the formula: the rest are made neutral."""
        for role, node in self.tables.items():
            packed = self._packed()
            given = self._neutral() | {self.root: packed, node: self._draw(role, node)}
            got = self._weight(given)
            q = self._unpacked(self._rows(packed), layout) - offset
            for form in self._forms(node):
                spread = self._spread(form, given[node])
                expected = {"scale": q * spread, "zero": q - spread, "minimum": q + self.sign * spread}[role]
                if torch.equal(got, expected):
                    break
            else:
                wraps = role == "zero" and not val(node).dtype.is_floating_point
                detail = ", or the subtraction wraps around in its dtype" if wraps else ""
                return f"the {role} is not one number for each output and group of consecutive inputs{detail}"
        return "scale, zero point and minimum are combined in another order"
