"""The arguments of a fused op's call as Python source, so that a report can say, and a file repeat, what it ran on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor

from fxopt.graph.symbols import hint, hinted_shape


def written(values: Sequence[Any]) -> tuple[str, ...]:
    """Each value as an expression, such as `tensor(shape, strides, dtype)`; symbolic sizes are the first call's."""
    return tuple(map(_written, values))


def _written(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor({hinted_shape(value)!r}, {tuple(map(hint, value.stride()))!r}, {value.dtype!r})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, SymInt):
        return repr(hint(value))
    if isinstance(value, (SymFloat, SymBool)):
        known = value.node.hint if value.node.has_hint() else None
        return repr(known if known is not None else 1e-6 if isinstance(value, SymFloat) else False)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(value) if value is None or isinstance(value, (bool, int, float, str, torch.dtype)) else "None"
