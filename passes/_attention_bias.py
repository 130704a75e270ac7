"""Biases that are read: what is added to the scores by distance, or by key, as the numbers that it holds.

    bias(b, h, j - i)   ->   [bias(b, h, i at j = 0) for i = M - 1 ... 1] + [bias(b, h, j at i = 0) for j = 0 ... N - 1]
    bias(b, h, j)       ->   itself, with one row
    slope(b, h) · (j - i)   ->   slope, and no table: the kernels multiply (`masks.linear`)

The model's own expression is evaluated along the first column and the first row, so nothing of M x N elements is made.
That it is the same along diagonals is proved by moving row and key by one (`MaskProgram.bias_depends`), never guessed.

A bias stands beside masks. Where those hold finfo.min they can be told apart from it only if it is of moderate size
(`masks.magnitude`): else it might take a row's last key out, or bring a masked one back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fxopt.graph.query import SHARED, aten, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import Dim, known_equal
from fxopt.match.masks import MaskProgram, addends, read_mask
from fxopt.match.masks.conditions import TRUE
from fxopt.match.masks.forms import Coordinate, Form, integer
from fxopt.match.masks.linear import line
from fxopt.match.masks.magnitude import WEIGHT, is_moderate
from fxopt.match.masks.values import Cases, replaced
from fxopt.match.match import Match
from fxopt.passes._attention_mask import Placed, make_mask, placed_shape
from fxopt.passes._attention_operands import emit, place_term
from fxopt.passes._attention_program import BATCH, HEADS, KEYS, ROWS, Add, Cast, Fill, Scale

#: numbers that scores are scaled by after a bias was added
MOST_SCALE = 1e3


@dataclass(frozen=True)
class Bias:
    """What live positions of a mask hold: `value`, by distance or by key. `own`: the mask itself holds just that.

    `slope`: it is as good as slope · (j - i).
    """

    step: Placed
    value: Cases
    by_distance: bool
    depends: frozenset[str]
    own: bool
    moderate: bool
    slope: Cases | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes it."""
        assert self.step.tensor is not None
        dtype: torch.dtype = val(self.step.tensor).dtype
        return dtype

    @property
    def alpha(self) -> Any:
        """The number, perhaps known at run time only, that the scores get it times."""
        return getattr(self.step.instruction, "alpha", 1)


def read_bias(
    step: Placed, program: MaskProgram, sizes: Sequence[Dim], *, tables: bool = True, slopes: bool = False, sink: bool
) -> Bias | None:
    """The bias that a mask's program holds; None if it depends on rows and keys in another way.

    With `slopes` a slope times the distance is one, with `tables` all others are. Beside a `sink` what is the same for
    all keys of a row counts.
    """
    assert program.bias is not None
    depends = program.bias_depends
    if "i" in depends or not isinstance(program.coordinates[KEYS].atom, Coordinate):
        return None
    slope = _slope(step, program, sizes, sink) if slopes else None
    if slope is None and not tables:
        return None
    own = slope is None and program.live is TRUE and "j-i" not in depends and known_equal(placed_shape(step)[ROWS], 1)
    alpha = getattr(step.instruction, "alpha", 1)
    if not own and not known_equal(alpha, 1):
        return None
    moderate = is_moderate(program.bias, max(1.0, abs(alpha)) if isinstance(alpha, (int, float)) else WEIGHT)
    return Bias(step, program.bias, slope is None and "j-i" in depends, depends, own, moderate, slope)


def _slope(step: Placed, program: MaskProgram, sizes: Sequence[Dim], sink: bool) -> Cases | None:
    """The slope of a bias that is one times j - i, but for what rows have in common.

    What is dropped must not have kept numbers small: of as many keys as rows the distance is no larger than the key.
    """
    assert program.bias is not None
    if not known_equal(getattr(step.instruction, "alpha", 1), 1):
        return None
    found = line(program.bias, program.coordinates)
    if found is None or not (found.by_distance or (found.by_key and not sink and known_equal(*sizes[ROWS:]))):
        return None
    return found.slope


def split(steps: Sequence[Placed]) -> tuple[tuple[Placed, ...], tuple[Placed, ...]]:
    """The steps up to the last that is neither added, filled nor cast, and those after it."""
    last = max((i for i, s in enumerate(steps) if not isinstance(s.instruction, (Add, Fill, Cast))), default=-1)
    return tuple(steps[: last + 1]), tuple(steps[last + 1 :])


def apart(steps: Sequence[Placed], sizes: Sequence[Dim]) -> tuple[Placed, ...]:
    """The steps with sums that are added to the scores taken apart: a position bias and a mask, say."""
    result: list[Placed] = []
    for step in steps:
        instruction = step.instruction
        parts = addends(instruction.term) if isinstance(instruction, Add) and known_equal(instruction.alpha, 1) else ()
        moves = [place_term(val(part).shape, instruction.layout, sizes) for part in parts]  # type: ignore[union-attr]
        if len(parts) > 1 and None not in moves:
            result += [Placed(replace(instruction, term=p), m) for p, m in zip(parts, moves, strict=True)]  # type: ignore
        else:
            result.append(step)
    return tuple(result)


def is_bias(steps: Sequence[Placed], scope: Scope, sizes: Sequence[Dim], at: Node) -> bool:
    """Whether steps on the mask add up to a bias by key, of moderate size."""
    for step in steps:
        instruction = step.instruction
        if isinstance(instruction, Scale):
            if not isinstance(instruction.by, (int, float)) or not 1 / MOST_SCALE < abs(instruction.by) < MOST_SCALE:
                return False
        elif isinstance(instruction, Add):
            assert step.tensor is not None
            program = read_mask(step.tensor, scope, sizes, at=at, moves=step.moves)
            if not isinstance(program, MaskProgram) or program.live is not TRUE or program.bias is None:
                return False
            found = read_bias(step, program, sizes, sink=True)
            if found is None or not found.own or not found.moderate:
                return False
        elif not isinstance(instruction, Cast):
            return False
    return True


def make_bias(
    match: Match,
    before: Sequence[Placed],
    biases: Sequence[Bias],
    coordinates: Sequence[Form],
    sources: Sequence[Node],
    insert: Callable[..., Node],
    size: Callable[[int], Any],
) -> Node | None:
    """Insert the sum of steps `before`, which are a bias by key, and of `biases` of one kind: the op's `bias`.

    Layers that add the same share it. `insert(value, dtype)` inserts a value, `size(d)` gives coordinate d's size as a
    number or node.
    """
    call, already = match.call, len(match.made)

    def whole(value: Cases, bias: Bias, along: int | None = None) -> Node:
        """[B or 1, Hq or 1, M, 1] or [.., .., 1, N] of a value that varies along one of rows and keys, or neither."""
        shape = [size(d) if name in bias.depends else 1 for d, name in ((BATCH, "b"), (HEADS, "h"))]
        shape += [size(d) if d == along else 1 for d in (ROWS, KEYS)]
        wide = torch.promote_types(bias.dtype, torch.float32) if along is None else bias.dtype
        return call(aten.expand.default, insert(value, wide), shape)

    total: Node | None = None
    parts: list[Node] = []
    if before:
        mask = make_mask(match, before, sources)
        assert mask is not None
        parts.append(_four_dims(match, mask))
    for bias in biases:
        if bias.own:
            assert bias.step.tensor is not None
            part = _four_dims(match, emit(match, bias.step.tensor, bias.step.moves, sources))
            parts.append(part if known_equal(bias.alpha, 1) else call(aten.mul.Tensor, part, bias.alpha))
        elif bias.slope is not None:
            one = whole(bias.slope, bias)
            parts.append(call(aten.squeeze.dim, call(aten.squeeze.dim, one, KEYS), ROWS))
        elif bias.by_distance:
            row, key = (_at_first(bias.value, coordinates[d]) for d in (KEYS, ROWS))
            behind = call(aten.flip.default, call(aten.squeeze.dim, whole(row, bias, ROWS), KEYS), [2])
            ahead = call(aten.squeeze.dim, whole(key, bias, KEYS), ROWS)
            parts.append(call(aten.cat.default, [call(aten.slice.Tensor, behind, 2, 0, -1), ahead], 2))
        else:
            parts.append(whole(bias.value, bias, KEYS))
    for part in parts:
        total = part if total is None else call(aten.add.Tensor, total, part)
    for node in match.made[already:]:
        node.meta[SHARED] = True
    return total


def _at_first(value: Cases, coordinate: Form) -> Cases:
    """The value at the first row, or key."""
    assert coordinate.atom is not None
    found = replaced(value, {coordinate.atom: integer(0)})
    assert isinstance(found, Cases)
    return found


def _four_dims(match: Match, mask: Node) -> Node:
    while val(mask).dim() < 4:
        mask = match.call(aten.unsqueeze.default, mask, 0)
    return mask
