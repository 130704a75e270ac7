"""Equal values are not equal gradients: the two sides of a rewrite differentiated in float64, by autograd.

Only with respect to inputs that a gradient will be asked of: a mask read as a condition has none, and needs none. The
implementation that was chosen is differentiated itself where autograd sees into it; the backward of an opaque one is
the reference's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import val
from fxopt.graph.scope import needs_gradient, without_gradients
from fxopt.ops import Implementation
from fxopt.rewrite.compare import Distance, distance
from fxopt.rewrite.evaluate import run_promoted
from fxopt.rewrite.region import Pair
from fxopt.rewrite.standin import Sizes

#: what rounding leaves where a gradient is zero, of the largest gradient or of 1 (the size of values and cotangents)
_ROUNDING = 1e-13


def differentiated(pair: Pair) -> tuple[Node, ...]:
    """The inputs of both sides that gradients will be asked of, where they run with gradients on."""
    graph = pair.outputs[0].graph
    switched = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled, sort=False)
    if switched and any(node in without_gradients(graph) for node in pair.outputs):
        return ()
    return tuple(n for n in pair.inputs if _is_float(val(n)) and needs_gradient(n))


def gradient_difference(
    pair: Pair,
    inputs: Sequence[Node],
    chosen: Mapping[Node, Implementation],
    values: dict[Node, Any],
    sizes: Sizes,
    tolerance: float,
    seed: int,
) -> str | None:
    """How the gradients of random cotangents with respect to `inputs` differ between the sides, in words, or None.

    `values` are those of all inputs, in float64. None also where the original can't be differentiated.
    """
    seen = {node: way for node, way in chosen.items() if not way.opaque}
    try:
        old = _gradients(pair.old, pair.outputs, inputs, {}, values, sizes, seed)
    except Exception:  # then training raises it too, and isn't told otherwise here
        return None
    try:
        new = _gradients(pair.new, pair.replacements, inputs, seen, values, sizes, seed)
    except Exception as error:
        return f"the gradient of the replacement raised {type(error).__name__}: {error}"
    largest = max((float(g.abs().nan_to_num(0, 0, 0).max()) for g in old if g.numel()), default=0.0)
    largest = max(largest, 1.0)
    for node, a, b in zip(inputs, old, new, strict=True):
        apart = distance(a, b)
        if apart.error > tolerance and not _is_rounding(apart, a, b, largest):
            return f"the gradient of {node.name} {apart.words}, relative error {apart.error:.3g}"
    return None


def _is_rounding(apart: Distance, a: Tensor, b: Tensor, largest: float) -> bool:
    return apart.error < float("inf") and bool(((a - b).abs().nan_to_num(0) <= _ROUNDING * largest).all())


def _gradients(
    nodes: Iterable[Node],
    ends: Sequence[Node],
    inputs: Sequence[Node],
    chosen: Mapping[Node, Implementation],
    values: dict[Node, Any],
    sizes: Sizes,
    seed: int,
) -> list[Tensor]:
    leaves = {node: values[node].detach().clone().requires_grad_() for node in inputs}
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        results = run_promoted(nodes, values | leaves, sizes, check=False, chosen=chosen)
        roots, cotangents = [], []
        for end in ends:
            value = results[end]
            if isinstance(value, Tensor):
                cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                if value.requires_grad:
                    roots.append(value)
                    cotangents.append(cotangent.to(value.dtype))
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if roots:
            found = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
    given = zip(found, leaves.values(), strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in given]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
