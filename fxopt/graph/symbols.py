"""Questions about dimensions that may be symbolic, answered without specialising any of them.

A guard added here would make the compiled code serve fewer shapes than the user's own program does, so every question
is asked with `statically_known_true`: "not known" is a possible answer, and reads as False.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

Dim = int | SymInt


def known_true(condition: Any) -> bool:
    """Whether `condition` (a bool or SymBool) holds for every shape that the compiled code will serve."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes (or scalars) are equal for every shape that the compiled code will serve."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if type(a) is type(b) and a.node.expr == b.node.expr:
        return True  # a hundred times faster than asking
    return known_true(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes have the same rank and known-equal sizes."""
    return len(a) == len(b) and all(known_equal(x, y) for x, y in zip(a, b, strict=True))


def is_static(value: Any) -> bool:
    """Whether a size or scalar is a plain number."""
    return not isinstance(value, (SymInt, SymFloat, torch.SymBool))


def hint(value: Any, default: int = 7) -> Any:
    """An example value for a size, for estimates only: what the first call had, or `default` if data-dependent."""
    if is_static(value):
        return value
    if free_unbacked_symbols(value):
        return default
    return value.node.hint if value.node.hint is not None else default


def hinted_shape(value: Tensor) -> tuple[int, ...]:
    """An example shape for a fake tensor, for estimates only."""
    return tuple(hint(size) for size in value.shape)
