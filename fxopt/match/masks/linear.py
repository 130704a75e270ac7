"""Values that grow linearly along the keys: a · (c · j + rest), with neither a nor the rest depending on the key.

ALiBi's `slopes[:, None, None] * (j - i)` is one. It is found by following products, quotients and casts down to the one
linear form that holds the coordinates. Each op on the way must compute in float32 or wider: then a slope times a
distance, whoever multiplies them, is the same number but for roundings of that precision. What a model rounds to
bfloat16 is a staircase, no line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxopt.graph.query import aten
from fxopt.match.masks.conditions import TRUE
from fxopt.match.masks.forms import Apply, Atom, Form, integer, single
from fxopt.match.masks.values import Cases, Operand, Scalar, atoms, replaced

_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Line:
    """A value `slope` · (j - i) + what is the same for all keys of a row.

    `by_distance`: there is nothing beside that product. `by_key`: the value does not depend on the row.
    """

    slope: Cases
    by_distance: bool
    by_key: bool


def line(value: Cases, coordinates: tuple[Form, ...]) -> Line | None:
    """The value as a line along the keys, or None where it is not certainly one that is computed in float32 or wider.

    `coordinates` are (batch, heads, rows, keys); neither of the last two may be a dimension of one element.
    """
    row, key = coordinates[-2].atom, coordinates[-1].atom
    if row is None or key is None:
        return None
    form = _form(value, frozenset((row, key)))
    step = 0 if form is None else form.coefficient(key)
    if form is None or step == 0:
        return None
    rest = form - single(key) * step  # what the form is beside the key
    if any(k % step for _, k in rest.terms) or rest.constant % step:
        return None
    # Where the form is `step` the value is that times its factor: the slope.
    at = Form.of(tuple((atom, -k // step) for atom, k in rest.terms), 1 - rest.constant // step)
    slope = replaced(value, {key: at})
    if not isinstance(slope, Cases) or not {row, key}.isdisjoint(atoms(slope)):
        return None
    return Line(slope, rest + single(row) * step is integer(0), form.coefficient(row) == 0)


def _form(value: Any, places: frozenset[Atom]) -> Form | None:
    """The linear form in `places` that the value is a multiple of."""
    if not isinstance(value, Cases) or len(value.pieces) != 1 or value.pieces[0][1] is not TRUE:
        return None
    scalar: Scalar = value.pieces[0][0]
    if isinstance(scalar, Form):
        inside = [atom for atom, _ in scalar.terms if atom not in places]
        return scalar if all(single(atom).atoms.isdisjoint(places) for atom in inside) else None
    if not isinstance(scalar, Apply) or scalar.dtype not in _WIDE or scalar.keywords:
        return None
    packet = getattr(scalar.target, "overloadpacket", None)
    holders = [i for i, o in enumerate(scalar.operands) if isinstance(o, Operand) and not o.atoms.isdisjoint(places)]
    product = packet is aten.mul or (packet in (aten.div, aten.neg, aten.to) and holders == [0])
    if not product or len(holders) != 1:
        return None
    return _form(scalar.operands[holders[0]].value, places)
