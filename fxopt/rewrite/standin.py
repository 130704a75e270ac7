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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import aten, is_reshape, val
from fxopt.graph.symbols import hint
from fxopt.ops import find_op
from fxopt.rewrite.region import Pair

#: sizes up to this one are small enough as they are
KEEP = 16

#: ops on positions (int32 or int64 tensors) whose number operands are lengths, as a sliding window
_POSITION_OPS = frozenset({"add", "sub", "rsub", "lt", "le", "gt", "ge", "floor_divide", "remainder", "clamp"})

_ARANGES = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default})

_BYTES = (torch.int8, torch.uint8, torch.int16)


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

    def size(self, value: Any) -> int:
        """The stand-in for a size, symbolic or not."""
        if not isinstance(value, SymInt):
            return self.statics.get(value, value)
        expression = value.node.expr
        found = self._known.get(expression)
        if found is None:
            if self.symbols:
                small = {a: sympy.Integer(self.statics.get(int(a), int(a))) for a in expression.atoms(sympy.Integer)}
                found = int(expression.xreplace(small | self.symbols))
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
        kinds = _kinds(node, node in self.positions)
        args = tuple(self._argument(a, kinds.get(i, ""), values, device) for i, a in enumerate(node.args))
        kwargs = {k: self._argument(a, kinds.get(k, ""), values, device) for k, a in node.kwargs.items()}
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
    facts = _Facts.of(pair)
    tried: list[tuple[Any, Any]] = []
    # The first candidate with symbols takes primes for them, so that no relation holds by chance. Programs that
    # divide a symbol (patches, chunks) need even ones.
    for ratio, step in ((1, 1), (3, 4), (16, 4)):
        statics = facts.solve(ratio)
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
    facts = _Facts.of(pair)
    widths = {val(n).shape[-1] for n in pair.inputs if isinstance(val(n), Tensor) and val(n).dim()}
    thin = {size: small for size, small in facts.free().items() if size not in widths}
    if thin or facts.symbols:
        yield Sizes(thin, facts.symbol_values([*facts.sizes, *thin.values()], 2, 4))


@dataclass
class _Facts:
    """What the sizes of a program are and how they are related."""

    sizes: set[int]
    literals: set[int]  # those that also occur as plain numbers or in expressions of symbols
    products: list[tuple[list[int], list[int]]]  # sizes whose products are equal, by a reshape
    symbols: list[Any]
    lengths: set[int]  # numbers that positions are compared with or moved by
    positions: frozenset[Node]
    sums: list[tuple[list[int], int]] = field(default_factory=list)  # parts and their whole
    small: set[int] = field(default_factory=set)  # sizes that stay
    hints: dict[Any, int] = field(default_factory=dict)

    @staticmethod
    def of(pair: Pair) -> _Facts:
        facts = _Facts(set(), set(), [], [], set(), _positions(pair))
        for node in pair.nodes:
            for leaf in _leaves(val(node)):
                for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
                    facts._add(size)
            if node in pair.inputs:
                continue
            kinds = _kinds(node, node in facts.positions)
            for key, argument in [*enumerate(node.args), *node.kwargs.items()]:
                for leaf in _leaves(argument):
                    facts._add_literal(leaf, kinds.get(key))
            if is_reshape(node) and isinstance(val(node), Tensor):
                facts._relate(list(val(node.args[0]).shape), list(val(node).shape))
            facts._relate_parts(node)
        return facts

    def _add_literal(self, leaf: Any, kind: str | None) -> None:
        if isinstance(leaf, SymInt) or (kind in ("size", "integer") and isinstance(leaf, int)):
            self._add(leaf)
        elif kind == "length" and isinstance(leaf, int) and abs(leaf) > KEEP:
            self.lengths.add(leaf)
        elif kind == "number" and isinstance(leaf, (int, float)) and math.isfinite(leaf) and leaf == int(leaf):
            self.literals.add(int(leaf))

    def _add(self, size: Any) -> None:
        if isinstance(size, SymInt):
            self.symbols += sorted(size.node.expr.free_symbols - set(self.symbols), key=str)
            self.literals |= {int(a) for a in size.node.expr.atoms(sympy.Integer)}
            if size.node.expr in self.symbols and size.node.expr not in self.hints:
                self.hints[size.node.expr] = int(hint(size))
        elif isinstance(size, int) and not isinstance(size, bool) and KEEP < size < 1 << 62:
            self.sizes.add(size)
        elif isinstance(size, int):
            self.small.add(size)

    def _relate(self, before: list[Any], after: list[Any]) -> None:
        for a, b in _groups(before, after):
            if (a, b) not in self.products:
                self.products.append((a, b))

    def _relate_parts(self, node: Node) -> None:
        """The sizes that a `cat` adds up, or that a split takes apart."""
        many, one = (
            (node.args[0], node) if isinstance(val(node), Tensor) else (val(node), node.args[0] if node.args else 0)
        )
        if not isinstance(many, (tuple, list)) or not isinstance(val(one), Tensor):
            return
        parts = [val(part).shape for part in many if isinstance(val(part), Tensor)]
        whole = val(one).shape
        if len(parts) < 2 or any(len(part) != len(whole) for part in parts):
            return
        for dim, size in enumerate(whole):
            sizes = [part[dim] for part in parts]
            if (
                all(isinstance(s, int) for s in (size, *sizes))
                and sum(sizes) == size
                and (sizes, size) not in self.sums
            ):
                self.sums.append((sizes, size))

    def solve(self, ratio: int) -> dict[int, int] | None:
        """Stand-ins that keep all products, and quotients up to `ratio`; None if there are none."""
        for start in (KEEP + 4, KEEP + 8, KEEP + 24):
            found = self._solve(ratio, start)
            if found is not None:
                return found
        return None

    def _solve(self, ratio: int, start: int) -> dict[int, int] | None:
        known: dict[int, int] = {}
        open_sizes = sorted(self.sizes)
        wholes = {max(a + b) for a, b in self.products} | {total for _, total in self.sums}
        following = start
        while True:
            if not self._propagate(known):
                return None
            open_sizes = [s for s in open_sizes if s not in known]
            if not open_sizes:
                break
            size = min(open_sizes, key=lambda s: (s in wholes, s))
            related = _related(size, known, ratio)
            if related is None:
                step = 4 if size % 4 == 0 else 2 if size % 2 == 0 else 1
                related = -(-following // step) * step
                if step < 4:
                    related += related % 2 == 0 and step == 1
                following = related + 1
            known[size] = related
        values = list(known.values())
        if len(set(values)) < len(values) or any(v < 1 for v in values):
            return None
        return known

    def _propagate(self, known: dict[int, int]) -> bool:
        """Fill in what the products determine; False if they contradict each other."""
        changed = True
        while changed:
            changed = False
            for a, b in self.products:
                for one, other in ((a, b), (b, a)):
                    unknown = [s for s in one if s > KEEP and s not in known]
                    if len(unknown) > 1 or any(s > KEEP and s not in known for s in other):
                        continue
                    rest = math.prod(known.get(s, s) for s in one if s not in unknown)
                    whole = math.prod(known.get(s, s) for s in other)
                    if not unknown:
                        if rest != whole:
                            return False
                    elif whole % rest or whole == 0:
                        return False
                    else:
                        known[unknown[0]] = whole // rest
                        changed = True
            for parts, total in self.sums:
                unknown = [s for s in (*parts, total) if s > KEEP and s not in known]
                rest = sum(known.get(s, s) for s in parts if s not in unknown)
                if not unknown:
                    if rest != known.get(total, total):
                        return False
                elif len(unknown) == 1:
                    known[unknown[0]] = rest if unknown[0] == total else known.get(total, total) - rest
                    changed = True
        return True

    def free(self) -> dict[int, int]:
        """Stand-ins for the sizes that nothing relates to others (sequence lengths, often); the rest stay real."""
        tied = {s for a, b in self.products for s in a + b} | self.literals
        tied |= {s for parts, total in self.sums for s in (*parts, total)}
        free = sorted(s for s in self.sizes - tied)
        found = {}
        following = KEEP + 4
        for size in free:
            if following >= size:
                continue
            found[size] = following
            following += 4
        return found if len(set(found.values()) & (self.sizes - set(found))) == 0 else {}

    def short_lengths(self, statics: dict[int, int]) -> dict[int, int]:
        """Stand-ins for numbers that positions are compared with: in the same order with the sizes, and as near."""
        wholes = {max(a + b) for a, b in self.products}
        plain = {s: small for s, small in statics.items() if s not in wholes}
        found: dict[int, int] = {}
        for length in sorted(self.lengths, key=abs, reverse=True):
            size, sign = abs(length), 1 if length > 0 else -1
            near = [o for o in found if abs(o - size) <= 2]
            around = plain | found
            above = min((small for s, small in around.items() if s > size), default=0)
            below = max((small for s, small in around.items() if 0 < s < size), default=0)
            if near:
                small = found[near[0]] + size - near[0]
            elif size in plain:
                small = plain[size]
            elif above:
                small = max(above - 4, (below + above + 1) // 2)
            else:
                small = max(KEEP, below) + 8
            found[size], found[length] = small, sign * small
        return {length: found[length] for length in self.lengths}

    def symbol_values(self, taken: Iterable[int], above: int, step: int) -> dict[Any, Any]:
        """A stand-in for each symbol, larger than `above` so that windows and offsets lie inside, none in `taken`."""
        values: dict[Any, Any] = {}
        used = self.small.union(taken)
        following = above
        for symbol in self.symbols:
            following = int(sympy.nextprime(following)) if step == 1 else (following // step + 1) * step
            while following in used:
                following = int(sympy.nextprime(following)) if step == 1 else following + step
            values[symbol] = sympy.Integer(following)
        return values


def _related(size: int, known: dict[int, int], ratio: int) -> int | None:
    """The stand-in that keeps a quotient (or a small difference) to a size that has one, or None."""
    best: tuple[int, int] | None = None
    bases = {**{n: n for n in range(3, KEEP + 1)}, **known} if ratio > 3 else known
    for other, small in bases.items():
        found = None
        if size % other == 0 and 1 < size // other <= (ratio if other > KEEP else min(ratio, 8)):
            found = (size // other, size // other * small)
        elif other % size == 0 and 1 < other // size <= ratio and small % (other // size) == 0:
            found = (other // size, small // (other // size))
        elif other > KEEP and abs(size - other) <= 2 and small + size - other > 1:
            found = (1, small + size - other)
        if found is not None and (best is None or found < best):
            best = found
    return best[1] if best is not None else None


def _groups(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The parts of a reshape that split or merge: lists of static sizes with equal products."""
    if any(isinstance(s, SymInt) for s in (*before, *after)):
        # Dimensions that stay are struck out; what remains is one relation if it is static.
        a, b = [_key(s) for s in before], [_key(s) for s in after]
        for key in list(a):
            if key in b:
                a.remove(key)
                b.remove(key)
        if a and b and all(isinstance(s, int) for s in (*a, *b)) and math.prod(a) == math.prod(b):
            yield a, b
        return
    a, b = [s for s in before if s != 1], [s for s in after if s != 1]
    i = j = 0
    while i < len(a) and j < len(b):
        one, other = [a[i]], [b[j]]
        i, j = i + 1, j + 1
        while math.prod(one) != math.prod(other):
            if math.prod(one) < math.prod(other) and i < len(a):
                one.append(a[i])
                i += 1
            elif j < len(b):
                other.append(b[j])
                j += 1
            else:
                return
        if len(one) > 1 or len(other) > 1:
            yield one, other


def _key(size: Any) -> Any:
    return str(size.node.expr) if isinstance(size, SymInt) else size


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, (int, float, SymInt, Tensor)) and not isinstance(value, bool):
        yield value


def _positions(pair: Pair) -> frozenset[Node]:
    """The nodes that do arithmetic on positions: on int32 or int64 values that aren't unpacked from bytes."""
    from_bytes: set[Node] = set()
    found = []
    for node in pair.nodes:
        value = val(node)
        if isinstance(value, Tensor) and value.dtype in _BYTES:
            from_bytes.add(node)
        if node in pair.inputs or not isinstance(value, Tensor):
            continue
        if any(parent in from_bytes for parent in node.all_input_nodes):
            from_bytes.add(node)
            continue
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        tensors = [val(n) for n in node.all_input_nodes if isinstance(val(n), Tensor)]
        if name in _POSITION_OPS and tensors and all(t.dtype in (torch.int32, torch.int64) for t in tensors):
            found.append(node)
    return frozenset(found)


def _kinds(node: Node, is_position: bool) -> dict[Any, str]:
    """Which arguments of a call hold sizes ("size") or numbers of unknown meaning ("number"), by place and name."""
    target: Any = node.target
    key = (target, is_position)
    found = _KINDS.get(key)
    if found is not None:
        return found
    schema = getattr(target, "_schema", None)
    kinds: dict[Any, str] = {}
    if schema is None:
        kinds = dict.fromkeys(range(8), "size") if getattr(target, "__name__", "") != "getitem" else {}
    else:
        numbers = "size" if target in _ARANGES else "length" if is_position else "number"
        fused = find_op(target) is not None
        for i, argument in enumerate(schema.arguments):
            kind = _type_kind(argument.real_type)
            if fused and kind in ("IntType", "SymIntType"):
                kinds[i] = kinds[argument.name] = "integer"
            elif kind == "SymIntType":
                kinds[i] = kinds[argument.name] = "size"
            elif kind in ("NumberType", "FloatType", "TensorType"):  # a number can stand in a tensor's place
                kinds[i] = kinds[argument.name] = numbers
    _KINDS[key] = kinds
    return kinds


_KINDS: dict[Any, dict[Any, str]] = {}


def _type_kind(kind: Any) -> str:
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return str(kind.kind())
