"""How the sizes of a program are related, and small numbers that are related in the same way.

    products   of a reshape: 4096 = 32 · 128          sums       of a cat or split: 3072 = 2048 + 512 + 512
    quotients  of sizes that are near: K/2, 3 · D     order      of the lengths that positions are compared with

Products and sums are read off the ops and hold exactly; quotients are guesses, tried one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_reshape, val
from fxopt.graph.symbols import hint
from fxopt.ops import find_op
from fxopt.rewrite.region import Pair

#: sizes up to this one are small enough as they are
KEEP = 16

#: ops on positions (int32 or int64 tensors) whose number operands are lengths, as a sliding window
_POSITION_OPS = frozenset({"add", "sub", "rsub", "lt", "le", "gt", "ge", "floor_divide", "remainder", "clamp"})

#: ops that take their second dimension apart into a number of groups, which is no size of any tensor
_GROUPED = frozenset({aten.group_norm.default, aten.native_group_norm.default})

ARANGES = frozenset({aten.arange.start, aten.arange.start_step})

_BYTES = (torch.int8, torch.uint8, torch.int16)


@dataclass
class Relations:
    """What the sizes of a program are and how they are related; `sizes` are those that get stand-ins."""

    sizes: set[int]
    literals: set[int]  # those that also occur as plain numbers or in expressions of symbols
    products: list[tuple[list[int], list[int]]]  # sizes whose products are equal, by a reshape
    symbols: list[Any]
    lengths: set[int]  # numbers that positions are compared with or moved by
    positions: frozenset[Node]
    sums: list[tuple[list[int], int]] = field(default_factory=list)  # parts and their whole
    pinned: set[int] = field(default_factory=set)  # sizes in strings, which nothing rewrites, and sizes in groups
    small: set[int] = field(default_factory=set)  # sizes that stay
    hints: dict[Any, int] = field(default_factory=dict)

    @staticmethod
    def of(pair: Pair) -> Relations:
        facts = Relations(set(), set(), [], [], set(), _positions(pair))
        for node in pair.nodes:
            for leaf in _leaves(val(node)):
                for size in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
                    facts._add(size)
            if node in pair.inputs:
                continue
            kinds = kinds_of(node, node in facts.positions)
            for key, argument in [*enumerate(node.args), *node.kwargs.items()]:
                for leaf in _leaves(argument):
                    facts._add_literal(leaf, kinds.get(key))
                if isinstance(argument, str):  # the name of a layout: "low/128"
                    facts.pinned |= {int(number) for number in re.findall(r"\d+", argument)}
            if is_reshape(node) and isinstance(val(node), Tensor):
                facts._relate(list(val(node.args[0]).shape), list(val(node).shape))
            if node.target in _GROUPED:
                given = arguments(node)
                counts = val(given["input"]).shape[1], given.get("num_groups", given.get("group"))
                facts.pinned |= {count for count in counts if isinstance(count, int)}
            facts._relate_parts(node)
            facts._relate_repeats(node)
        facts._substitute()
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

    def _relate_repeats(self, node: Node) -> None:
        """The sizes that a repetition multiplies."""
        if node.target not in (aten.repeat_interleave.self_int, aten.repeat.default):
            return
        before, after = val(node.args[0]).shape, val(node).shape
        for size, total in zip(reversed(before), reversed(after), strict=False):
            if isinstance(size, int) and isinstance(total, int) and 0 < size < total:
                relation = ([size, total // size], [total])
                if relation not in self.products:
                    self.products.append(relation)

    def _substitute(self) -> None:
        """Further products that follow: a size that is itself a product is replaced by its factors."""
        factors = {a[0]: b for a, b in self.products if len(a) == 1} | {
            b[0]: a for a, b in self.products if len(b) == 1
        }
        for a, b in list(self.products):
            if len(a) > 1 and len(b) > 1:
                one = [f for size in a for f in factors.get(size, [size])]
                other = [f for size in b for f in (factors.get(size, [size]) if size not in one else [size])]
                for size in list(one):
                    if size in other:
                        one.remove(size)
                        other.remove(size)
                if one and other and (one, other) not in self.products:
                    self.products.append((one, other))

    def coarse(self) -> dict[int, int]:
        """Sizes that kernels accept: counts become few, widths up to 256 stay, larger ones become multiples of 128."""
        known = {size: size for size in self.sizes & self.pinned}
        used, following = set(self.small), 128
        while self._propagate(known):
            rest = [s for s in self.sizes if s not in known]
            if not rest:
                return known if len(set(known.values())) == len(known) else {}
            wholes = {max(a + b) for a, b in self.products} | {total for _, total in self.sums}
            size = min(rest, key=lambda s: (s in wholes, s))
            if size <= 64:
                known[size] = next(n for n in range(3, 64) if n not in used)
                used.add(known[size])
            elif size <= 256:
                known[size] = size
            else:
                following += 128
                known[size] = min(following, size)
        return {}

    def solve(self, ratio: int, least: int) -> dict[int, int] | None:
        """Stand-ins above `least` that keep all products, and quotients up to `ratio`; None if there are none."""
        for start in (least + 4, least + 8, least + 24):
            found = self._solve(ratio, start)
            if found is not None:
                return found
        return None

    def _solve(self, ratio: int, start: int) -> dict[int, int] | None:
        known = {size: size for size in self.sizes & self.pinned}
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
                while related in self.small:
                    related += max(step, 2)
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
        tied = {s for a, b in self.products for s in a + b} | self.literals | self.pinned
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


def kinds_of(node: Node, is_position: bool) -> dict[Any, str]:
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
        numbers = "size" if target is aten.arange.default else "length" if is_position else "number"
        numbers = "" if target in ARANGES else numbers
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
