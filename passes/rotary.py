"""Rotary embeddings in every spelling: found by what becomes of each lane, not by how the program writes it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import is_call, is_cast, is_permute, is_reshape, is_tensor, is_widening_cast, users, val
from fxopt.graph.symbols import is_static, known_equal, same_shape
from fxopt.kernels import rotary as ops
from fxopt.match import hints
from fxopt.match.legality import illegality
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.spelling import origin
from fxopt.passes._rotary_lanes import PARTS, Reader, Value
from fxopt.rewrite.fusion import Example, Fusion

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope

aten = torch.ops.aten

#: ops that take lanes from their argument: x is looked for below them
_TAKES = (aten.neg.default, aten.slice.Tensor, aten.select.int, aten.transpose.int, operator.getitem, *PARTS)
#: ops that make lanes of other values' lanes: the end of a rotation is looked for above them
_MAKES = (aten.cat.default, aten.stack.default, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)

#: how many nodes are tried as x, and as the end of the rotation
_REACH = 24


@dataclass(frozen=True)
class Rotation:
    """`out` is x rotated by the tables; `nodes` compute it, and `options` are the op's arguments after the tables.

    `moves` are permutations between x and what is rotated.
    """

    x: Node
    moves: tuple[Node, ...]
    cos: Node
    sin: Node
    out: Node
    nodes: frozenset[Node]
    options: tuple[Any, ...]


@dataclass(frozen=True)
class FuseRotary(Fusion):
    """x * cos + rotate_half(x) * sin   ->   fxopt::rotary(x, cos, sin), and fxopt::rotary_pair for q and k together

    Pairs of lanes may be halves apart or neighbours, all lanes rotated or some at either end, tables as wide as x or
    with a number a pair, the product one of complex numbers; x may be cast before and the result after it.

    Refused where the lanes' number is not static, or what is done to them is no rotation of pairs.
    """

    anchors = (aten.cat.default, aten.stack.default, aten.view_as_complex.default)

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The rotation around `node`, together with another by the same tables where there is one."""
        if is_call(node, aten.view_as_complex.default):
            return _find_complex(node)
        if not _turns(node):
            return None
        if not is_static(val(node.args[0][0]).shape[-1]):  # type: ignore[index]
            return Miss("the number of lanes is dynamic", node, 1, hints.STATIC)
        found = rotation_around(node)
        if not isinstance(found, Rotation):
            return found
        alone = _match(found)
        for user in users(found.sin):
            if is_call(user, aten.mul.Tensor) and user not in found.nodes:
                other = rotation_around(user)
                if isinstance(other, Rotation) and _same_tables(found, other):
                    both = _match(*sorted((found, other), key=lambda r: r.out))
                    return alone if illegality(both, scope) is not None else both
                return alone
        return alone

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """One call of rotary or rotary_pair."""
        cos, sin = match.get("cos"), match.get("sin")
        if "angles" in match.bindings:
            tables = match.call(aten.view_as_real.default, match["angles"])
            cos, sin = (match.call(aten.select.int, tables, -1, i) for i in (0, 1))
        options, (x, *k) = match.tags["options"], (_moved(match, name) for name in ("x", "k") if name in match.bindings)
        if not k:
            return match.call(ops.rotary, x, cos, sin, *options)
        both = match.call(ops.rotary_pair, x, *k, cos, sin, *options)
        return match.item(both, 0), match.item(both, 1)

    def examples(self) -> Iterable[Example]:
        """The forms of Llama, GPT-NeoX, GPT-J, GPT-OSS, DeepSeek; and what is no rotation."""

        def inputs() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)

        def narrow() -> tuple[Tensor, ...]:
            return torch.randn(2, 3, 5, 8), torch.randn(5, 4), torch.randn(5, 4)

        yield Example(lambda x, c, s: x * c + _turned(x) * s, inputs, name="Llama")
        yield Example(_both, inputs, name="q and k")
        yield Example(_partial, narrow, name="GPT-NeoX, partial")
        yield Example(lambda x, c, s: x * c + _swapped(x) * s, inputs, name="GPT-J, interleaved")
        yield Example(_direct, narrow, name="GPT-OSS, tables of pairs")
        yield Example(_complex, narrow, name="complex numbers")
        yield Example(
            lambda x, c, s: x * c + torch.cat((x[..., 4:], x[..., :4]), -1) * s,
            inputs,
            sites=0,
            name="halves exchanged",
        )
        yield Example(
            lambda x, c, s: x * c + torch.cat((-x[..., 2:4], x[..., :2], -x[..., 6:], x[..., 4:6]), -1) * s,
            inputs, sites=0, refused="no rotation of pairs", name="quarters",
        )  # fmt: skip


def _turns(node: Node) -> bool:
    """Whether some part that `node` joins is negated, or a difference: a rotation has one."""
    parts = node.args[0]
    return isinstance(parts, (list, tuple)) and any(
        is_call(origin(part), aten.neg.default, aten.sub.Tensor) for part in parts
    )


def rotation_around(node: Node) -> Rotation | Miss | None:
    """The rotation that `node` is part of, with all that belongs to it; a Miss where the lanes are otherwise mixed."""
    miss: Miss | None = None
    above = _above(node)
    for x in _below(node):
        ends = [out for out in above if same_shape(val(out).shape, val(x).shape)]
        reader = Reader(x)
        for out in ends:
            value = reader.read(out)
            if value is None or len(set(value) - {None}) != 2:
                continue
            options = _options(value)
            if options is None:
                miss = miss or Miss("the lanes are mixed, but by no rotation of pairs", out, 3)
                continue
            found = _finish(reader, out, *options)
            if isinstance(found, Rotation):
                return found
            miss = found
    return miss


def _below(node: Node) -> list[Node]:
    """What could be x: tensors that `node` takes lanes from, farthest first."""
    found = [node]
    for at in found:
        if len(found) < _REACH and (at is node or _continues(at) or is_call(at, *_TAKES)):
            found += [before for before in at.all_input_nodes if before not in found]
    return [n for n in reversed(found[1:]) if is_tensor(n) and val(n).dim() and is_static(val(n).shape[-1])]


def _above(node: Node) -> list[Node]:
    """What could be the end of the rotation, outermost first."""
    found = [node]
    for at in found:
        if len(found) < _REACH:
            found += [u for u in users(at) if u not in found and is_tensor(u) and _continues(u)]
    return sorted(found, reverse=True)


def _continues(node: Node) -> bool:
    return is_call(node, *_MAKES) or is_reshape(node) or is_cast(node)


def _options(value: Value) -> tuple[Node, Node, dict[str, Any]] | None:
    """(cos, sin, the op's options by name) where the lanes of `value` are rotated pairs, else None."""
    first, second = (table for table in value if table is not None)
    kept = value.get(None)
    lanes = value[first].sign.shape
    if len(lanes) != 1 or not np.array_equal(value[first].sign != 0, value[second].sign != 0):
        return None
    turned = np.flatnonzero(value[first].sign)
    rest = np.flatnonzero(value[first].sign == 0)
    width = len(turned)
    if width == 0 or width % 2 or turned[-1] - turned[0] != width - 1:
        return None
    start = int(turned[0])
    last = start > 0
    if start not in (0, lanes[0] - width) or (kept is None) != (width == lanes[0]):
        return None
    if kept is not None and not (
        np.all(kept.sign[turned] == 0) and np.all(kept.sign[rest] == 1) and np.array_equal(kept.lane[rest], rest)
    ):
        return None
    for cos, sin in ((first, second), (second, first)):
        assert cos is not None
        assert sin is not None
        c, s = (value[t].each(lambda a: a[turned]) for t in (cos, sin))
        options = _pairing(c.lane - start, s.lane - start, c.sign, s.sign, c.place, s.place, val(cos), val(sin))
        if options is not None:
            return cos, sin, options | {"last": last}
    return None


def _pairing(
    straight: Any, crossed: Any, c_sign: Any, s_sign: Any, c_place: Any, s_place: Any, cos: Tensor, sin: Tensor
) -> dict[str, Any] | None:
    """How the lanes are paired, and where the tables hold a lane's number, or None."""
    width = len(straight)
    half = width // 2
    lane = np.arange(width)
    for pairs, (read, written) in ops.PAIRS.items():
        pair, second = (lane % half, lane >= half) if written == "halves" else (lane // 2, lane % 2 == 1)
        a, b = (pair, pair + half) if read == "halves" else (2 * pair, 2 * pair + 1)
        if not (np.array_equal(straight, np.where(second, b, a)) and np.array_equal(crossed, np.where(second, a, b))):
            continue
        turn = np.where(second, 1, -1)
        if not np.all(c_sign == 1) or not (np.array_equal(s_sign, turn) or np.array_equal(s_sign, -turn)):
            continue
        for half_tables, place in ((False, lane), (True, pair)):
            count = half if half_tables else width
            wide = known_equal(cos.shape[-1], count) and known_equal(sin.shape[-1], count)
            if wide and np.array_equal(c_place, place) and np.array_equal(s_place, place):
                return {"pairs": pairs, "half_tables": half_tables, "inverse": not np.array_equal(s_sign, turn)}
    return None


def _finish(reader: Reader, out: Node, cos: Node, sin: Node, options: dict[str, Any]) -> Rotation | Miss:
    """The rotation with the casts around it."""
    nodes = reader.nodes(out)
    for node in nodes - {out}:
        outside = [user for user in users(node) if user not in nodes]
        if outside:
            what = f"the inner value {node.name} is also used outside of the rotation"
            return Miss(what, node, 3, hints.kept(node, outside[0]))
    dtypes = {dtype for node, dtype in reader.dtypes.items() if node in nodes and not is_call(node, aten.neg.default)}
    rounded = {dtype for node, dtype in reader.rounded.items() if node in nodes}
    if len(dtypes) != 1 or rounded - {val(out).dtype}:
        hint = hints.same_dtype("cos and sin", val(out).dtype)
        return Miss("parts of the rotation are computed in different dtypes", out, 4, hint)
    (wide,) = dtypes
    if len(users(out)) == 1 and is_cast(users(out)[0]) and not rounded and not is_widening_cast(users(out)[0]):
        (out,) = users(out)
        nodes.add(out)
    x, moves = _before_cast(reader.x, nodes)
    tables = torch.promote_types(val(cos).dtype, val(sin).dtype)
    compute = wide if torch.promote_types(val(x).dtype, tables) != wide else None
    out_dtype = val(out).dtype if val(out).dtype != wide else None
    if not val(out).dtype.is_floating_point or not wide.is_floating_point:
        return Miss(f"the rotation is computed in {wide}", out, 4)
    arranged = (options["pairs"], options["half_tables"], options["last"], options["inverse"], compute, out_dtype)
    return Rotation(x, moves, cos, sin, out, frozenset(nodes), arranged)


def _before_cast(x: Node, nodes: set[Node]) -> tuple[Node, tuple[Node, ...]]:
    """What x is a wider copy of, and the permutations in between; `nodes` gains what nobody else uses of them."""
    chain = [x]
    while is_permute(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    if not is_widening_cast(chain[-1]):
        return x, ()
    for node in chain:
        if any(user not in nodes for user in users(node)):
            break
        nodes.add(node)
    return chain[-1].args[0], tuple(reversed(chain[:-1]))  # type: ignore[return-value]


def _moved(match: Match, name: str) -> Node:
    x: Node = match[name]
    for step in match.tags.get(f"{name} permuted", ()):
        x = match.call(step.target, x, *step.args[1:], **step.kwargs)
    return x


def _same_tables(a: Rotation, b: Rotation) -> bool:
    alike = a.cos is b.cos and a.sin is b.sin and a.options == b.options and not a.nodes & b.nodes
    return alike and val(a.x).dtype == val(b.x).dtype and known_equal(val(a.out).shape[-1], val(b.out).shape[-1])


def _match(first: Rotation, second: Rotation | None = None) -> Match:
    tags = {"pairs": first.options[0], "options": first.options}
    for name, rotation in (("x", first), ("k", second)):
        if rotation is not None and rotation.moves:
            tags[f"{name} permuted"] = rotation.moves
    bindings = {"x": first.x, "cos": first.cos, "sin": first.sin}
    if second is None:
        return Match((first.out,), first.nodes, bindings, tags)
    return Match((first.out, second.out), first.nodes | second.nodes, bindings | {"k": second.x}, tags)


def _find_complex(node: Node) -> Match | Miss | None:
    """view_as_real(view_as_complex(x.reshape(..., n/2, 2)) * angles).flatten(-2): neighbours, a number a pair."""
    pairs: Any = node.args[0]
    if len(users(node)) != 1 or not is_call(product := users(node)[0], aten.mul.Tensor):
        return None
    angles: Any = product.args[1] if product.args[0] is node else product.args[0]
    if not is_tensor(angles) or not val(angles).is_complex() or not same_shape(val(product).shape, val(node).shape):
        return Miss("the factor is no complex number a pair", product, 2)
    if len(users(product)) != 1 or not is_call(real := users(product)[0], aten.view_as_real.default):
        return Miss("the complex product is not read as real numbers", product, 2)
    if not is_reshape(pairs) or len(users(real)) != 1 or not is_reshape(out := users(real)[0]):
        return Miss("the complex numbers are not made of the lanes of one tensor, and back", product, 2)
    x: Any = pairs.args[0]
    if not same_shape(val(out).shape, val(x).shape):
        return Miss("the complex numbers are not made of the lanes of one tensor, and back", product, 2)
    nodes = {node, product, real, out}
    wide = val(out).dtype
    for before in (pairs, x):
        if all(user in nodes for user in users(before)) and (before is pairs or is_widening_cast(before)):
            nodes.add(before)
    x = x.args[0] if is_widening_cast(x) else x
    if len(users(out)) == 1 and is_cast(users(out)[0]) and not is_widening_cast(users(out)[0]):
        (out,) = users(out)
        nodes.add(out)
    compute = wide if val(x).dtype != wide else None
    out_dtype = val(out).dtype if val(out).dtype != wide else None
    options = ("interleaved", True, False, False, compute, out_dtype)
    return Match((out,), frozenset(nodes), {"x": x, "angles": angles}, {"pairs": "complex", "options": options})


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _both(q: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    k = q[:, :1] + 1
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _swapped(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    part, rest = x[..., :4], x[..., 4:]
    return torch.cat((part * cos + _turned(part) * sin, rest), -1)


def _direct(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.complex(cos, sin)).flatten(-2).type_as(x)
