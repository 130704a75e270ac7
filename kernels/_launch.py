"""Launches that come again.

Of every call Triton binds all arguments anew and asks of each what it may be specialised to, its kind, whether it is 1
or divisible by 16: of the fifty of the attention kernels that is more host time than all else in a call together. Where
everything that decides on it is as it was in an earlier call (`likeness`) only the pointers differ, and the compiled
kernel is launched with them directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: launches that are remembered; with more of them, sizes seldom come again
MOST = 1024


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched, and its arguments behind the tensors."""

    compiled: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]

    def again(self, *tensors: Tensor) -> None:
        """Launch it with other tensors that are alike."""
        self.compiled[self.grid](*tensors, *self.rest)


def launch(kernel: Any, grid: Sequence[int], tensors: Sequence[Tensor], *numbers: Any, **flags: Any) -> Launch | None:
    """Launch a kernel whose parameters are tensors, numbers and constexprs, in this order (and Triton's options).

    Returns it as it was compiled; None where nothing is (Triton's interpreter).
    """
    compiled = kernel[tuple(grid)](*tensors, *numbers, **flags)
    if compiled is None:
        return None
    constants = (flags[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    return Launch(compiled, (*grid, 1, 1)[:3], (*numbers, *constants))  # type: ignore[arg-type]


def likeness(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What tensors must have in common so that one launch serves both: all but where exactly they lie."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)


class Launches:
    """Launches by what decides on them."""

    def __init__(self) -> None:
        self._known: dict[Any, Launch] = {}

    def find(self, key: Any) -> Launch | None:
        """The launch that was kept for this key."""
        return self._known.get(key)

    def keep(self, key: Any, launched: Launch | None) -> None:
        """Keep a launch, if there is one."""
        if launched is None:
            return
        if len(self._known) >= MOST:
            self._known.clear()
        self._known[key] = launched
