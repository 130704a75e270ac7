"""Stand-in sizes: the same program on tensors small enough to check it in milliseconds.

An identity between tensor programs that holds for every size can be tested at small ones. A graph has its sizes baked
in, though: in shapes, in the literals of `view` and `expand`, in slice bounds. So each distinct size gets a small
stand-in, wherever it occurs, and what relates the sizes has to survive: products across a reshape (4096 = 32 · 128),
ratios (K/2 packed bytes, Hq/Hkv query heads a group, D/2 rotated), order (a window within a sequence). Which relations
a program needs can't be read off it with certainty, so candidates are tried from the smallest on; a run in which
some intermediate shape isn't the original's, mapped, discards its candidate. The last candidate is the real sizes,
but never those of one example alone: symbolic dims then have multiples of their example values.

    sizes up to 16        stay
    symbolic dims         one number a symbol; expressions of symbols follow
    literals              follow where the schema says that they are sizes, and where positions are compared with them
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import val
from fxopt.graph.symbols import hint
from fxopt.rewrite.region import Pair
from fxopt.rewrite.relations import ARANGES, KEEP, Relations, kinds_of

__all__ = ["KEEP", "Sizes", "candidates", "full_width"]


@dataclass
class Sizes:
    """A way to make a program small. Without entries it is the real sizes, symbols at their hints.

    statics  size -> stand-in; a size that isn't in it stays
    symbols  symbol (sympy) -> stand-in; without any, symbols have their hints
    lengths  number that positions are compared with -> stand-in (a window of 4096 is no hidden size of 4096)
    scalars  also map numbers that equal a size where the schema says just "number" (a mean spelled `sum / 4096`)
    """

    statics: dict[int, int] = field(default_factory=dict)
    symbols: dict[Any, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    positions: frozenset[Node] = frozenset()
    scalars: bool = False
    _known: dict[Any, int] = field(default_factory=dict)

    @property
    def real(self) -> bool:
        """Whether these are the real sizes, or an example of them."""
        return not (self.statics or self.symbols or self.lengths)

    def size(self, value: Any) -> int:
        """The stand-in for a size, symbolic or not."""
        if not isinstance(value, SymInt):
            return self.statics.get(value, value)
        expression = value.node.expr
        found = self._known.get(expression)
        if found is None:
            if self.symbols:
                small = {a: sympy.Integer(self.statics.get(int(a), int(a))) for a in expression.atoms(sympy.Integer)}
                chosen = expression.xreplace(small | self.symbols)
                # A symbol that no input has: where its hint doesn't fit the rest, the program says so when it is run.
                found = int(hint(value)) if chosen.free_symbols else int(chosen)
            else:
                found = int(hint(value))
            self._known[expression] = found
        return found

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """The stand-in for a tensor's shape."""
        return tuple(self.size(size) for size in value.shape)

    def number(self, value: Any) -> Any:
        """The stand-in for a number-valued input: sizes follow, other numbers keep an example value."""
        if isinstance(value, SymInt):
            return self.size(value)
        if isinstance(value, SymFloat):
            return float(hint(value, 1))
        if isinstance(value, SymBool):
            return bool(hint(value, 1))
        return value

    def arguments(self, node: Node, values: dict[Node, Any], device: torch.device) -> tuple[tuple[Any, ...], Any]:
        """The arguments of a call at these sizes: values for nodes, stand-ins for literals, `device` for devices."""
        kinds = kinds_of(node, node in self.positions)
        args = tuple(self._argument(a, kinds.get(i, ""), values, device) for i, a in enumerate(node.args))
        kwargs = {k: self._argument(a, kinds.get(k, ""), values, device) for k, a in node.kwargs.items()}
        if node.target in ARANGES and all(isinstance(a, int) for a in args) and len(args) > 1:
            # Not the end is a size but the length: arange(0, 32, 4) counts the bits of a word.
            start, step = args[0], args[2] if len(args) > 2 else 1
            args = (start, start + step * self.shape(val(node))[0], *args[2:])
        return args, kwargs

    def _argument(self, argument: Any, kind: str, values: dict[Node, Any], device: torch.device) -> Any:
        if isinstance(argument, Node):
            return values[argument]
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._argument(a, kind, values, device) for a in argument)
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return slice(*(self._argument(a, kind, values, device) for a in parts))
        if isinstance(argument, (SymInt, SymFloat, SymBool)):
            return self.number(argument)
        if isinstance(argument, torch.device):
            return device
        if isinstance(argument, bool) or kind == "":
            return argument
        if isinstance(argument, int) and kind in ("length", "integer") and argument in self.lengths:
            return self.lengths[argument]
        if isinstance(argument, int) and kind in ("size", "integer"):
            return self.size(argument)
        if self.scalars and kind == "number" and isinstance(argument, (int, float)):
            return self._scalar(argument)
        return argument

    def _scalar(self, number: int | float) -> int | float:
        if number in self.statics:
            return type(number)(self.statics[int(number)])
        if 0 < number < 1:
            for size, small in self.statics.items():
                if math.isclose(number, 1 / size, rel_tol=1e-12):
                    return 1 / small
        return number

    def __str__(self) -> str:
        pairs = [f"{k} as {v}" for k, v in [*self.statics.items(), *self.symbols.items()] if k != v]
        return ", ".join(pairs) or "the real sizes"


def candidates(pair: Pair, *, scalars: bool = False) -> Iterator[Sizes]:
    """Ways to make the program small, the smallest first, then those that keep more; the real sizes last."""
    facts = Relations.of(pair)
    tried: list[tuple[Any, Any]] = []
    # The first candidate with symbols takes primes for them, so that no relation holds by chance. Programs that
    # divide a symbol (patches, chunks) need even ones.
    # The last is for large products: its sizes may be as small as those that stay.
    for ratio, step, least in ((1, 1, KEEP), (3, 4, KEEP), (16, 4, KEEP), (1, 4, 0)):
        statics = facts.solve(ratio, least)
        if statics is None:
            continue
        lengths = facts.short_lengths(statics)
        symbols = facts.symbol_values([*statics.values(), *lengths.values()], max([2, *lengths.values()]), step)
        if (statics, symbols) not in tried:
            tried.append((statics, symbols))
            yield Sizes(statics, symbols, lengths, facts.positions, scalars)
    free = facts.free()
    if not facts.lengths and (free or facts.symbols):  # unmapped windows would reach past every short sequence
        yield Sizes(free, facts.symbol_values([*facts.sizes, *free.values()], 2, 4), {}, facts.positions, scalars)
    if not facts.symbols:
        yield Sizes()
    elif all(symbol in facts.hints for symbol in facts.symbols):
        yield Sizes({}, {s: sympy.Integer(facts.hints[s] * (i + 2)) for i, s in enumerate(facts.symbols)})


def full_width(pair: Pair) -> Iterator[Sizes]:
    """Sizes at which rounding errors grow as they do in use: the real ones, or with fewer rows of the real width."""
    yield Sizes()
    facts = Relations.of(pair)
    widths = {val(n).shape[-1] for n in pair.inputs if isinstance(val(n), Tensor) and val(n).dim()}
    thin = {size: small for size, small in facts.free().items() if size not in widths}
    for statics in (thin, facts.coarse()):
        if statics or facts.symbols:
            yield Sizes(statics, facts.symbol_values([*facts.sizes, *statics.values()], 2, 4))
