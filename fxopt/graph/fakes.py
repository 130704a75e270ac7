"""Fake tensors by how they look: what code can ask of one before anything runs, and another that looks the same.

What an op returns for fakes depends on how its arguments look and on nothing else, as long as they are static and
nothing is differentiated. So it need not be run again for arguments that look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fxopt.graph.query import storage

#: arguments that their text tells apart
_PLAIN = frozenset(
    {bool, int, float, complex, str, type(None), type(...)}
    | {torch.dtype, torch.device, torch.layout, torch.memory_format}
)


def is_plain(value: Any) -> bool:
    """Whether `value` is a plain fake tensor: strided, its sizes numbers, its elements unknown."""
    return (
        type(value) is FakeTensor
        and value.layout == torch.strided
        and not value._has_symbolic_sizes_strides
        and value.constant is None
        and value.real_tensor is None
    )


def look(leaves: Sequence[Any]) -> Hashable:
    """How the arguments of one call look, and which of them share memory; None where there is more to be seen.

    Equal for two calls only where a function does the same in both, if nothing is differentiated.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(map(is_plain, tensors)):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    memory = [storage(tensor) for tensor in tensors]
    parts = [_part(leaf, tensors, memory) for leaf in leaves]
    if any(part is None for part in parts):
        return None
    return tuple(parts), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _part(leaf: Any, tensors: Sequence[Tensor], memory: Sequence[int | None]) -> Hashable:
    if isinstance(leaf, Tensor):
        which = next(i for i, tensor in enumerate(tensors) if tensor is leaf)
        where = memory.index(memory[which]), leaf.storage_offset(), leaf.shape, leaf.stride()
        flags = leaf.requires_grad, leaf.is_inference(), leaf.is_conj(), leaf.is_neg()
        return which, *where, leaf.dtype, leaf.device, *flags
    if isinstance(leaf, slice):
        parts = leaf.start, leaf.stop, leaf.step
        return ("slice", *parts) if all(part is None or type(part) is int for part in parts) else None
    return (type(leaf), repr(leaf)) if type(leaf) in _PLAIN else None


def fresh(like: FakeTensor) -> FakeTensor:
    """A fake that looks like the static fake `like`, in memory of its own. Nothing is dispatched, nothing traced."""
    with torch._C._DisableTorchDispatch():
        memory = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
    return FakeTensor(like.fake_mode, memory, like.device)


class Results:
    """What functions returned for arguments that looked alike. For functions that return new memory."""

    def __init__(self) -> None:
        """Nothing was called yet."""
        self._known: dict[Hashable, Any] = {}

    def __call__(self, run: Callable[[], Any], function: Any, arguments: Any) -> Any:
        """What `run` returns, which calls `function` with the fakes `arguments`; fresh fakes that look like it."""
        leaves, structure = tree_flatten(arguments)
        looks = look(leaves)
        if looks is None:
            return run()
        key = function, looks, structure
        if key in self._known:
            return tree_map(fresh, self._known[key])
        result = run()
        returned = tree_leaves(result)
        memory = [storage(value) for value in (*leaves, *returned) if isinstance(value, Tensor)]
        apart = len(set(memory)) == len({id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}) + len(returned)
        if apart and all(map(is_plain, returned)):
            self._known[key] = result
        return result
