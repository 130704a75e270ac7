"""Old value against new by what is known without running anything: shape, dtype, device, layout, strides, aliases.

Two values agree if nothing downstream can tell them apart by their metadata for any shape that the compiled code will
serve. Sizes are compared with `known_equal`, so nothing is specialised. Strides are asked about separately: most users
don't care, and the lowering restores them where one does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import storage, val
from fxopt.graph.symbols import known_equal, same_shape


def check_meta(old: Node, new: Node) -> str | None:
    """How the metadata of `new`'s value differs from `old`'s, in words, or None.

    Tensors: rank and sizes (symbolic ones must be known to be equal), dtype, device, layout and whether they are
    sparse, quantised or complex views. Tuples are compared item by item, numbers by kind. `requires_grad` isn't
    compared, for fakes don't carry it through. Strides: see `stride_difference`.
    """
    return _difference(val(old), val(new))


def stride_difference(old: Node, new: Node) -> bool:
    """Whether the strides of the two nodes' tensors differ, or aren't known to be equal, where it can be observed.

    Strides of dimensions of size 1 and of empty tensors address nothing and don't count.
    """
    a, b = val(old), val(new)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.layout != torch.strided or b.layout != torch.strided or a.dim() != b.dim():
        return a.layout != b.layout or a.dim() != b.dim()
    if any(known_equal(size, 0) for size in a.shape):
        return False
    rows = zip(a.shape, a.stride(), b.stride(), strict=True)
    return any(not known_equal(size, 1) and not known_equal(x, y) for size, x, y in rows)


def alias_difference(
    outputs: Sequence[Node], replacements: Sequence[Node], region: Collection[Node], made: Collection[Node]
) -> str | None:
    """How the replacements share memory differently from the outputs that they replace, in words, or None.

    `region` and `made` are the nodes of the original and of the replacement. An output that is a view of a value
    from outside must stay a view of the same value, and the other way round; two outputs that share memory must
    still share it.
    """
    for old, new in zip(outputs, replacements, strict=True):
        before, after = _outside_alias(old, region), _outside_alias(new, made)
        if before is not after and _storage(before) != _storage(after):
            words = [f"shares memory with {n.name}" if n is not None else "is fresh memory" for n in (before, after)]
            return f"{old.name} {words[0]}, its replacement {new.name} {words[1]}"
    for i in range(len(outputs)):
        for j in range(i):
            before_pair = _shared(outputs[i], outputs[j])
            if before_pair != _shared(replacements[i], replacements[j]):
                verb = "share" if before_pair else "don't share"
                return f"{outputs[j].name} and {outputs[i].name} {verb} memory, unlike their replacements"
    return None


def _difference(a: Any, b: Any) -> str | None:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _tensor_difference(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        if len(a) != len(b):
            return f"{len(a)} results became {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            found = _difference(x, y)
            if found is not None:
                return f"result {i}: {found}"
        return None
    if a is None and b is None:
        return None
    for kind in ((int, torch.SymInt), (float, torch.SymFloat)):
        if isinstance(a, kind) and isinstance(b, kind):
            return None if known_equal(a, b) else f"value {a} became {b}"
    return f"a {type(a).__name__} became a {type(b).__name__}"


def _tensor_difference(a: Tensor, b: Tensor) -> str | None:
    if a.dtype != b.dtype:
        return f"dtype {a.dtype} became {b.dtype}"
    if a.device != b.device:
        return f"device {a.device} became {b.device}"
    if a.layout != b.layout:
        return f"layout {a.layout} became {b.layout}"
    if not same_shape(a.shape, b.shape):
        return f"shape {_shape(a)} became {_shape(b)}"
    for name in ("is_conj", "is_neg", "is_quantized"):
        x, y = getattr(a, name), getattr(b, name)
        x, y = (x(), y()) if callable(x) else (x, y)
        if x != y:
            return f"{name} {x} became {y}"
    return None


def _shape(value: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in value.shape) + "]"


def _storage(node: Node | None) -> int | None:
    try:
        return storage(val(node))
    except (RuntimeError, NotImplementedError):  # a wrapper subclass holds tensors, and no memory of its own
        return None


def _shared(a: Node, b: Node) -> bool:
    home = _storage(a)
    return home is not None and home == _storage(b)


def _outside_alias(node: Node, inside: Collection[Node]) -> Node | None:
    """The nearest node outside `inside` that feeds `node` and shares its memory, or None if it is fresh."""
    wanted = _storage(node)
    if wanted is None:
        return None
    seen: set[Node] = set()
    queue = [node]
    while queue:
        at = queue.pop()
        if at in seen or _storage(at) != wanted:
            continue
        seen.add(at)
        if at not in inside:
            return at
        queue.extend(at.all_input_nodes)
    return None
