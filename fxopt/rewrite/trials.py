"""What two functions are compared on: one trial is a value for every input.

Random values alone miss what rewrites get wrong, so the same inputs also come with rows a thousand times larger,
all zero, with dead and finitely masked rows where a mask goes in, and with what the fusion itself proposes. Integers
are drawn in the range of what reads them: an index stays inside, a packed byte takes all its values.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from fxopt.graph.query import aten, is_call, is_cast, is_copy, is_permute, is_reshape, val
from fxopt.match.match import Match
from fxopt.rewrite.draws import Draw
from fxopt.rewrite.evaluate import CPU
from fxopt.rewrite.fusion import Fusion
from fxopt.rewrite.region import Pair, constant, stride_order
from fxopt.rewrite.standin import Sizes

log = logging.getLogger(__name__)

_LAYOUT = frozenset({aten.expand.default, aten.slice.Tensor, aten.select.int, aten.narrow.default})
_SOFTMAXES = (aten.softmax, aten._softmax, aten._safe_softmax, aten.exp, aten.logsumexp)
_SDPA = aten.scaled_dot_product_attention
_BITS = (aten.bitwise_and, aten.bitwise_or, aten.bitwise_right_shift, aten.bitwise_left_shift, aten.__rshift__,
         aten.__and__)  # fmt: skip

#: dtypes of which any bit pattern is a plausible value
_PACKED = (torch.uint8, torch.int8, torch.int16)


@dataclass(frozen=True)
class Trial:
    """Named values: `draws` for tensors, `given` for what isn't drawn (numbers, constants, hostile values)."""

    name: str
    seed: int
    draws: dict[Node, Draw]
    given: dict[Node, Any]
    native: bool = True  # also compared at the real dtypes
    plain: bool = False  # random values only
    smooth: bool = False  # a gradient is well defined
    device: torch.device = CPU

    def values(self) -> dict[Node, Any]:
        """The value of every input in its own dtype, on `device`, which has random numbers of its own."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        drawn = {node: draw.make(generator) for node, draw in self.draws.items()}
        return drawn | {n: v.to(self.device) if isinstance(v, Tensor) else v for n, v in self.given.items()}


def trials(
    fusion: Fusion, match: Match, pair: Pair, sizes: Sizes, seed: int, device: torch.device = CPU
) -> Iterator[Trial]:
    """The trials at the given sizes, the plainest first. Run inside `isolated`."""
    maker = _Maker(pair, sizes, seed, device)
    yield maker.trial("normal", {}, smooth=True)
    yield maker.trial("normal again", {}, wide_integers=True)
    if maker.floats:
        yield maker.trial("large rows", dict.fromkeys(maker.floats, "rows"), native=False)
        yield maker.trial("zeros", dict.fromkeys(maker.floats, "zeros"), native=False)
    masks = [n for n in maker.floats if _is_additive_mask(n, pair, match.moderate)]
    if masks or maker.bools:
        yield maker.trial("masked rows", dict.fromkeys(masks, "mask") | dict.fromkeys(maker.bools, "dead"), smooth=True)
    for i, hostile in enumerate(_adversaries(fusion, match, pair)):
        yield maker.trial(f"adversary {i + 1}", {}, hostile)


class _Maker:
    def __init__(self, pair: Pair, sizes: Sizes, seed: int, device: torch.device) -> None:
        self.sizes = sizes
        self.seed = seed
        self.device = device
        self.count = 0
        self.given: dict[Node, Any] = {}
        self.tensors: list[Node] = []
        self.ranges: dict[Node, int | None] = {}
        for node in pair.inputs:
            value = val(node)
            if not isinstance(value, Tensor):
                self.given[node] = sizes.number(value)
            elif node.op == "get_attr" and _is_real(constant(node)):
                self.given[node] = fit(constant(node), sizes.shape(value), value.dtype)
            else:
                self.tensors.append(node)
                if not (value.is_floating_point() or value.is_complex()):
                    self.ranges[node] = _index_range(node, set(pair.nodes), sizes)
        self.floats = [n for n in self.tensors if n not in self.ranges]
        self.bools = [n for n in self.ranges if val(n).dtype == torch.bool]
        self.bits = [n for n in self.ranges if _is_bits(n, set(pair.nodes))]
        shapes = [sizes.shape(val(n)) for n in pair.nodes if isinstance(val(n), Tensor)]
        self.longest = max([2, *(size for shape in shapes for size in shape)])

    def trial(
        self,
        name: str,
        kinds: dict[Node, str],
        hostile: dict[Node, Tensor] | None = None,
        *,
        wide_integers: bool = False,
        native: bool = True,
        smooth: bool = False,
    ) -> Trial:
        self.count += 1
        given = dict(self.given)
        for node, value in (hostile or {}).items():
            given[node] = fit(value, self.sizes.shape(val(node)), val(node).dtype)
        draws = {n: self._draw(n, kinds.get(n, "normal"), wide_integers) for n in self.tensors if n not in given}
        plain = not kinds and not hostile
        return Trial(name, self.seed * 1009 + self.count, draws, given, native, plain, smooth, self.device)

    def _draw(self, node: Node, kind: str, wide: bool) -> Draw:
        value = val(node)
        shape, order = self.sizes.shape(value), stride_order(value)
        if node not in self.ranges:
            return Draw(shape, value.dtype, order, kind)
        if value.dtype == torch.bool:
            return Draw(shape, value.dtype, order, "dead" if kind == "dead" else "bool")
        limit = self.ranges[node]
        if limit is not None:
            return Draw(shape, value.dtype, order, "int", 0, limit)
        if value.dtype in _PACKED or node in self.bits:
            info = torch.iinfo(value.dtype)
            return Draw(shape, value.dtype, order, "int", info.min, min(info.max, (1 << 62) - 1) + 1)
        # An integer mask of 0 and 1, or positions and lengths: both occur, and neither is known here.
        return Draw(shape, value.dtype, order, "int", 0, self.longest if wide else 2)


def fit(value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`value` cut, repeated or broadcast to `shape`, on the CPU."""
    value = value.detach().cpu().to(dtype)
    while value.dim() > len(shape):
        value = value[0]
    value = value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))
    for dim, size in enumerate(shape):
        have = value.shape[dim]
        if have == 1 or have >= size or have == 0:
            continue
        value = value.repeat([-(-size // have) if d == dim else 1 for d in range(len(shape))])
    for dim, size in enumerate(shape):
        if value.shape[dim] > size:
            value = value.narrow(dim, 0, size)
    return value.expand(shape).contiguous()


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter) and value.device.type != "meta"


def _adversaries(fusion: Fusion, match: Match, pair: Pair) -> Iterator[dict[Node, Tensor]]:
    """The fusion's hostile values, by input node; what isn't an input of the comparison can't be set, and is left."""
    sizes = [s for n in pair.inputs for s in getattr(val(n), "shape", ()) if isinstance(s, SymInt)]
    environments = [s.node.shape_env for s in sizes]
    # A fusion that asks int() of a symbolic size here would otherwise specialise the user's program.
    with environments[0].suppress_guards() if environments else nullcontext():
        try:
            proposed = list(fusion.adversaries(match))
        except Exception as error:  # a plugin's own code
            log.warning("fusion %s: its adversaries raised %s: %s", fusion.name, type(error).__name__, error)
            return
    for values in proposed:
        known = {match.get(name): value for name, value in values.items() if isinstance(match.get(name), Node)}
        hostile = {n: value for n, value in known.items() if n in pair.inputs and isinstance(val(n), Tensor)}
        if hostile:
            yield hostile


def _carriers(node: Node, within: set[Node]) -> Iterator[tuple[Node, Node]]:
    """(reader, value) for everything that reads `node`'s elements, also through casts and layout ops."""
    work, seen = [node], {node}
    while work:
        at = work.pop()
        for user in at.users:
            if user not in within:
                continue
            moves = is_reshape(user) or is_permute(user) or is_copy(user) or is_cast(user) or user.target in _LAYOUT
            if moves and user.args and user.args[0] is at:
                if user not in seen:
                    seen.add(user)
                    work.append(user)
            else:
                yield user, at


def _index_range(node: Node, within: set[Node], sizes: Sizes) -> int | None:
    """The exclusive upper bound of an index tensor, by the dimensions that it indexes, or None if it is no index."""
    bounds = []
    for user, at in _carriers(node, within):
        if is_call(user, aten.embedding) and user.args[1] is at:
            bounds.append((user.args[0], 0))
        elif is_call(user, aten.index, aten.index_put) and len(user.args) > 1:
            bounds += [(user.args[0], dim) for dim, index in enumerate(user.args[1]) if index is at]  # type: ignore
        elif is_call(user, aten.gather, aten.index_select, aten.take_along_dim, aten.scatter, aten.index_add):
            rest = [a for a in user.args[1:] if isinstance(a, int)]
            if rest and at in user.args[1:]:
                bounds.append((user.args[0], rest[0]))
    found = [sizes.shape(val(table))[dim] for table, dim in bounds if isinstance(val(table), Tensor)]
    return min(found) if found else None


def _is_bits(node: Node, within: set[Node]) -> bool:
    return any(is_call(user, *_BITS) for user, _ in _carriers(node, within))


def _is_additive_mask(node: Node, pair: Pair, moderate: Collection[Node]) -> bool:
    """Whether a float input is added to something that goes into a softmax, or is an attention mask.

    What is known to be `moderate` is none.
    """
    within = set(pair.nodes)
    softmaxes = {n for n in pair.old if is_call(n, *_SOFTMAXES)}
    for user, at in _carriers(node, within):
        if at in moderate:
            continue
        if is_call(user, _SDPA) and (at in user.args[3:4] or user.kwargs.get("attn_mask") is at):
            return True
        if is_call(user, aten.add, aten.sub) and user in pair.old and softmaxes and _leads_to(user, softmaxes, within):
            return True
    return False


def _leads_to(node: Node, goals: set[Node], within: set[Node]) -> bool:
    work, seen = [node], {node}
    while work:
        at = work.pop()
        if at in goals:
            return True
        if is_call(at, aten.matmul, aten.bmm, aten.mm, aten.linear, aten.baddbmm):
            continue
        for user in at.users:
            if user in within and user not in seen:
                seen.add(user)
                work.append(user)
    return False
