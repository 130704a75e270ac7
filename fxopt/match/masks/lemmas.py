"""What is known of numbered segments: the one fact about masks that is not algebra.

Packed sequences are numbered by counting the breaks in their positions,

    segment = cumsum(positions[k] - positions[k - 1] != 1)

so where segment[i] = segment[j], no break lies between, and positions[j] - positions[i] is j - i: within a segment,
causality of positions is causality of places. A cumulative sum of booleans never falls: a segment's keys lie together.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from fxopt.graph.query import arguments, aten, val
from fxopt.match.masks.conditions import Condition, Eq, all_of, conjuncts, eq, le, negate, replace
from fxopt.match.masks.forms import Atom, Form, Read, coordinate, single
from fxopt.match.masks.lift import Lifter
from fxopt.match.masks.reads import SUMMAND, summand
from fxopt.match.masks.values import Cases, Opaque, Value, numbers


def with_segments(lifter: Lifter, live: Condition) -> tuple[Condition, frozenset[Read]]:
    """The condition with positions in a segment replaced by places, and the segment numbers that never fall."""
    parts = list(conjuncts(live))
    ordered: set[Read] = set()
    for part in parts:
        pair = _same_segment(part)
        if pair is None:
            continue
        a, b = pair
        try:
            varies, found = _summand(lifter, a)
        except Opaque:
            continue
        if found is None:
            continue
        ordered |= {a, b}
        if isinstance(varies, Cases):
            continue
        replacements = _places(lifter, a, b, varies, [p for p in parts if p is not part])
        if replacements:
            rest = [replace(p, replacements) for p in parts if p is not part]
            parts = [part, *rest]
            return all_of(parts), frozenset(ordered)
    return live, frozenset(ordered)


def _same_segment(part: Condition) -> tuple[Read, Read] | None:
    """The two elements of one cumulative sum that an equation says are equal."""
    if not isinstance(part, Eq) or part.form.constant or len(part.form.terms) != 2:
        return None
    (a, k), (b, m) = part.form.terms
    if not isinstance(a, Read) or not isinstance(b, Read) or abs(k) != 1 or k != -m:
        return None
    if a.node is not b.node or a.epoch != b.epoch or a.node.target is not aten.cumsum.default:
        return None
    return a, b


def _dim(node: Node) -> int:
    return int(arguments(node)["dim"]) % val(node).dim()


def _summand(lifter: Lifter, read: Read) -> tuple[Value, Form | None]:
    """What is added up at the coordinate k, and k where it is never negative."""
    node = read.node
    if val(node).dtype.is_floating_point or lifter.epoch(node, None) != lifter.epoch(node, node):
        raise Opaque("a sum that is written to, or of floats")
    k = coordinate(SUMMAND, lifter.size(val(node).shape[_dim(node)]))
    found = summand(lifter, node, read.index, k)
    pieces = numbers(found, val(node).dtype).pieces
    return found, k if all(isinstance(s, Form) and s.least >= 0 for s, _ in pieces) else None


def _places(lifter: Lifter, a: Read, b: Read, breaks: Condition, parts: Sequence[Condition]) -> dict[Atom, Form]:
    """positions[b] as positions[a] + b - a, where the segments' breaks are steps of positions other than 1."""
    node, dim = a.node, _dim(a.node)
    if any(x is not y for d, (x, y) in enumerate(zip(a.index, b.index, strict=True)) if d != dim):
        return {}
    k = coordinate(SUMMAND, lifter.size(val(node).shape[dim]))
    if k.atom is None:
        return {}
    step = conjuncts(all_of([negate(breaks), le(-k + 1)]))  # no break at k >= 1
    found: dict[Atom, Form] = {}
    for part in step:
        pair = [atom for atom, _ in part.form.terms] if isinstance(part, Eq) else []
        if len(pair) != 2:
            continue
        for after, before in (pair, pair[::-1]):
            if not isinstance(after, Read) or not isinstance(before, Read) or not _moved(after, before, k):
                continue
            if part is eq(single(after) - single(before) - 1):
                there, here = (Read.of(after.node, _put(after.index, k, x.index[dim]), after.epoch) for x in (b, a))
                found[there] = single(here) + b.index[dim] - a.index[dim]
    return found


def _moved(after: Read, before: Read, k: Form) -> bool:
    """Whether the two are elements k and k - 1 of the same row."""
    if after.node is not before.node or after.epoch != before.epoch or after.index.count(k) != 1:
        return False
    return before.index == _put(after.index, k, k - 1)


def _put(index: tuple[Form, ...], k: Form, form: Form) -> tuple[Form, ...]:
    return tuple(form if i is k else i for i in index)
