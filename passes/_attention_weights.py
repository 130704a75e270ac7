"""From the softmax to the product with v: what is done to the weights, moved behind the product.

(c·P) v = c·(P v)               for c that is the same for a whole row (head masks, gates)
(P + R) v = P v + R v           the weights are a mixture; R v is a product of its own, often another attention
(a·P + R) / rowsum = (a·P v + R v) / (a + rowsum R)     rows of a softmax sum to 1
rows set to 0                   rows of the result set to 0
nan_to_num(P)                   rows without a live key are 0, not NaN
heads mixed                     Σ_g W[h, g] P_g v_h: P [v_0, v_1, ...] with wider heads, then a sum (talking heads)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import arguments, aten, is_call, is_cast, is_copy, users, val
from fxopt.graph.symbols import Dim, known_equal, same_shape
from fxopt.match import hints
from fxopt.match.axes import Layout, is_layout, same_layout, through
from fxopt.match.miss import Miss
from fxopt.match.region import Step, carried, number, passes_on
from fxopt.passes._attention_program import HEADS, Add, Fill, Instruction, Sink
from fxopt.passes._attention_scores import is_keys

MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
_ADDS = (aten.add.Tensor, aten.sub.Tensor)
_DIVS = (aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)  # without a rounding mode
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Rescale:
    """Rows are multiplied (or divided) by a number or by a tensor whose last dimension is 1."""

    by: Any
    divide: bool


@dataclass(frozen=True)
class Plus:
    """`alpha` times a tensor is added to the weights: `factors`, the same for a whole row each, times `core`.

    Where the core is a softmax that nothing else uses (`covered`, with the factors' products), it can be made anew
    beside a product of its own, to be another attention.
    """

    core: Node
    alpha: Any
    factors: tuple[Any, ...] = ()
    covered: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Renormalise:
    """Rows are divided by their sums."""


@dataclass(frozen=True)
class Blank:
    """Rows are set to 0 where `condition` holds (if `every`, for all keys of the row), or does not if `keep`."""

    condition: Node
    keep: bool
    every: bool


@dataclass(frozen=True)
class MixWeights:
    """Each head's weights become a combination of all heads': a linear layer, `weight` [heads, heads]."""

    weight: Node
    bias: Node | None


Change = Rescale | Plus | Renormalise | Blank | MixWeights


def tensors_of(change: Change) -> list[Node]:
    """The nodes that a change reads."""
    if isinstance(change, Rescale):
        read: list[Any] = [change.by]
    elif isinstance(change, Plus):
        read = [*change.factors, change.core.args[0] if change.covered else change.core]
    elif isinstance(change, Blank):
        read = [change.condition]
    else:
        read = [change.weight, change.bias] if isinstance(change, MixWeights) else []
    return [node for node in read if isinstance(node, Node)]


@dataclass(frozen=True)
class Weights:
    """The product that takes the weights, their layout there and what was done to them on the way."""

    output: Node
    values: Node
    layout: Layout
    changes: tuple[Change, ...]
    region: tuple[Node, ...]
    zero_empty: bool = False
    lead: tuple[Dim, ...] = ()  # the product's leading dimensions


def read_weights(softmax: Node, layout: Layout, program: Sequence[Instruction]) -> Weights | Miss | None:
    """The way of the weights from a softmax whose result is laid out as `layout` to the product with v.

    None where no product takes them; a miss where they can't be followed there or are used elsewhere too.
    """
    found = _product(softmax)
    if not isinstance(found, tuple):
        return found
    output, position = found
    end = output.args[position]
    assert isinstance(end, Node)
    steps = carried(softmax, end) if end is not softmax else []
    if isinstance(steps, Miss):
        return steps
    changes: list[tuple[Change, Layout]] = []
    zero_empty = False
    sink = next((i for i in program if isinstance(i, Sink)), None)
    for step in steps:
        node = step.node
        if is_cast(node) and not step.inner:
            continue
        if is_layout(node) and not step.inner:
            after = through(node, layout)
            if after is None:
                return Miss(f"{node.name} lays the weights out in a way that can't be followed", node)
            layout = after
        elif sink is not None and node.target is aten.slice.Tensor and is_keys(layout[-1], layout):
            if not _drops(node, sink):
                return Miss("other weights than those of the extra columns are dropped", node)
            sink = None
        elif _clears_nan(step):
            zero_empty = True
        else:
            change = _change(step, layout, program)
            if isinstance(change, str):
                return Miss(change, node)
            changes.append((change, layout))
    if sink is not None:
        return Miss("the weights of extra columns take part in the product: they are keys, not a sink", output)
    for change, at in changes:
        if not isinstance(change, MixWeights) and not same_layout(at, layout):
            return Miss("the weights are changed and then laid out anew", output)
    if any(isinstance(c, Renormalise) for c, _ in changes):
        bare = [c.by for c, _ in changes if isinstance(c, Rescale) and isinstance(number(c.by), Node)]
        if bare:
            return Miss(f"weights scaled by {bare[0]}, known only at run time, are normalised anew", output)
    unordered = [i for i, (c, _) in enumerate(changes) if isinstance(c, MixWeights) and i > 0]
    if unordered:
        return Miss("heads are mixed after the attention weights were changed", output)
    region = tuple(n for s in steps for n in (*s.inner, s.node))
    region += tuple(n for c, _ in changes if isinstance(c, Plus) for n in c.covered)
    values = output.args[position + 1]
    assert isinstance(values, Node)
    return Weights(output, values, layout, tuple(c for c, _ in changes), region, zero_empty)


def takes_weights(softmax: Node) -> bool:
    """Whether some product takes what a softmax gives."""
    return _product(softmax) is not None


def _product(softmax: Node) -> tuple[Node, int] | Miss | None:
    """The matmul that takes the weights as its left operand, and where among its arguments."""
    cone, products = [softmax], []
    for at in cone:
        for user in users(at):
            if is_call(user, *MATMULS):
                products.append((user, at))
            elif user not in cone and len(cone) < 64 and (passes_on(user) or _is_mixing(user, at)):
                cone.append(user)
    if not products:
        return None
    output, end = min(products, key=lambda p: p[0])
    members = set(cone)
    for at in _between(end, members):
        if is_call(at, aten.dropout):
            return Miss("dropout is active on the attention weights", at, hint=hints.DROPOUT)
        others = [u for u in users(at) if u not in members and u is not output]
        if others:
            what = f"the attention weights are {hints.read_by(others[0])}"
            return Miss(what, others[0], hint=hints.kept(at, others[0]))
    if len({p for p, _ in products}) > 1:
        other = next(p for p, _ in products if p is not output)
        return Miss(f"the attention weights are also used by {other.name}", other, hint=hints.kept(end, other))
    position = 1 if output.target in (aten.baddbmm.default, aten.addmm.default) else 0
    if [i for i, a in enumerate(output.args) if a is end] != [position]:
        return Miss(f"the attention weights are not the left operand of {output.name}", output)
    if position == 1:
        return Miss(f"{output.name} adds something to the product of weights and values", output)
    return output, position


def _between(end: Node, members: set[Node]) -> list[Node]:
    """The members that `end` is made from, itself included."""
    found = [end]
    for at in found:
        found += [n for n in at.all_input_nodes if n in members and n not in found]
    return found


def _is_mixing(node: Node, weights: Node) -> bool:
    """Whether weights are followed through an op that is not pointwise: a linear layer, or a sum that divides them."""
    if is_call(node, aten.sum.dim_IntList):
        quotients = [u for user in (node, *users(node)) for u in users(user) if is_call(u, *_DIVS)]
        return any(q.args[0] is weights for q in quotients)
    return node.target in (aten.linear.default, aten.nan_to_num.default)


def _change(step: Step, layout: Layout, program: Sequence[Instruction]) -> Change | str:
    """What a step does to the weights, or in words why it can't be moved behind the product."""
    node, before = step.node, step.before
    if step.inner:
        if _divides_by_sum(step, layout):
            return Renormalise()
        return f"the attention weights enter {node.name} in more than one way"
    if node.target is aten.linear.default:
        return _mixed(step, layout)
    positions = [i for i, a in enumerate(node.args) if a is before]
    if len(positions) != 1 or not same_shape(val(node).shape, val(before).shape):
        return f"{node.target} is applied to the attention weights"
    position = positions[0]
    other = node.args[1 - position] if position < 2 and len(node.args) > 1 else None
    divides = is_call(node, *_DIVS)
    if (divides or is_call(node, aten.mul)) and not (position and divides) and len(node.args) == 2:
        if one_a_row(other):
            return Rescale(other, divides)
        return f"the attention weights are multiplied key by key in {node.name}"
    if node.target in _ADDS and is_keys(layout[-1], layout):
        given = arguments(node)
        alpha, sign = number(given["alpha"]), -1 if node.target is aten.sub.Tensor else 1
        fits = isinstance(val(other), Tensor) and val(other).dim() > 1 and _same_width(other, before)
        if fits and isinstance(alpha, (int, float)) and position == 0:
            return _added(other, sign * alpha, node)  # type: ignore[arg-type]
        if fits and alpha == 1 and sign == 1:
            return _added(other, 1, node)  # type: ignore[arg-type]
    if is_call(node, aten.masked_fill, aten.where):
        return _blanked(node, position, program)
    return f"{node.target} is applied to the attention weights"


def _added(term: Node, alpha: Any, user: Node) -> Plus:
    """A term of the weights, taken apart if it is a softmax times factors that nothing else uses."""
    core, factors, covered = term, [], []
    while users(core) == [user] and (is_call(core, aten.mul.Tensor) or is_cast(core)):
        pair = (
            [(a, b) for a, b in (core.args, core.args[::-1]) if one_a_row(b) and not one_a_row(a)]
            if len(core.args) == 2
            else []
        )
        if is_call(core, aten.mul.Tensor):
            if not pair or not isinstance(pair[0][0], Node) or not same_shape(val(pair[0][0]).shape, val(core).shape):
                break
            factors.append(pair[0][1])
        covered.append(core)
        user, core = core, pair[0][0] if is_call(core, aten.mul.Tensor) else core.args[0]  # type: ignore[assignment]
    rank = val(core).dim()
    if users(core) == [user] and is_call(core, *_SOFTMAXES) and core.args[1] % rank == rank - 1:
        return Plus(core, alpha, tuple(factors), (*covered, core))
    return Plus(term, alpha)


def _same_width(a: Any, b: Any) -> bool:
    return known_equal(val(a).shape[-1], val(b).shape[-1])


def one_a_row(value: Any) -> bool:
    """Whether a factor of the weights is the same for all keys of a row."""
    tensor = val(value)
    if number(value) is not None:
        return True
    return isinstance(tensor, Tensor) and (tensor.dim() == 0 or known_equal(tensor.shape[-1], 1))


def _mixed(step: Step, layout: Layout) -> Change | str:
    node = step.node
    weight, bias = node.args[1], arguments(node)["bias"]
    heads = [axis for group in layout for axis in group if axis.dim == HEADS]
    square = isinstance(weight, Node) and known_equal(val(weight).shape[0], val(weight).shape[1])
    if node.args[0] is not step.before or not square or list(layout[-1]) != heads or len(heads) != 1:
        return "the attention weights go through a linear layer"
    return MixWeights(weight, bias)  # type: ignore[arg-type]


def _blanked(node: Node, position: int, program: Sequence[Instruction]) -> Change | str:
    """Weights set to 0 where a condition holds: for whole rows, or for keys that were filled with -inf before."""
    if is_call(node, aten.masked_fill):
        condition, filling, keep = node.args[1], node.args[2], False
    else:
        condition, filling, keep = node.args[0], node.args[3 - position] if position else None, position == 1
    if number(filling) != 0 or not isinstance(condition, Node) or val(condition).dtype != torch.bool:
        return f"{node.target} is applied to the attention weights"
    if one_a_row(condition):
        return Blank(condition, keep, every=False)
    fills = [i for i in program if isinstance(i, Fill)]
    for fill in fills:
        if fill.keep == keep and same_value(fill.condition, condition):
            if torch.is_grad_enabled():
                return "where gradients flow, those of rows without a live key would be NaN"
            if fill.value > -math.inf and any(isinstance(i, (Add, Fill)) and i is not fill for i in program):
                return "weights are blanked where scores were filled with a finite number beside another mask"
            return Blank(condition, keep, every=True)
    return f"{node.target} is applied to the attention weights at other positions than were masked"


def _clears_nan(step: Step) -> bool:
    """Whether the step replaces NaN in the weights, which only rows without a live key have, by 0."""
    node = step.node
    if node.target is aten.nan_to_num.default:
        given = arguments(node)
        return given["nan"] in (None, 0) and not step.inner
    if not is_call(node, aten.masked_fill, aten.where) or len(step.inner) != 1:
        return False
    test = step.inner[0]
    if not is_call(test, aten.isnan) or test.args[0] is not step.before:
        return False
    condition, filling = (1, 2) if is_call(node, aten.masked_fill) else (0, 1)
    kept = 0 if is_call(node, aten.masked_fill) else 2
    return node.args[condition] is test and node.args[kept] is step.before and number(node.args[filling]) == 0


def _divides_by_sum(step: Step, layout: Layout) -> bool:
    """Whether the step divides each row of the weights by its own sum over the keys."""
    node = step.node
    if not is_call(node, *_DIVS) or node.args[0] is not step.before or step.others:
        return False
    if not is_keys(layout[-1], layout):
        return False
    divisor, kept = node.args[1], False
    rank = val(step.before).dim()
    while isinstance(divisor, Node) and (is_copy(divisor) or divisor.target is aten.unsqueeze.default):
        if divisor.target is aten.unsqueeze.default:
            if kept or divisor.args[1] not in (-1, rank - 1):
                return False
            kept = True
        divisor = divisor.args[0]
    if not is_call(divisor, aten.sum.dim_IntList):
        return False
    assert isinstance(divisor, Node)
    given = arguments(divisor)
    dims = [d % rank for d in given["dim"] or ()]
    return divisor.args[0] is step.before and dims == [rank - 1] and bool(given["keepdim"]) != kept


def _drops(node: Node, sink: Sink) -> bool:
    """Whether a slice drops the weights of the sink's columns and no others."""
    given = arguments(node)
    before = val(node.args[0]).shape
    if given["dim"] % len(before) != len(before) - 1 or given["step"] != 1:
        return False
    if not known_equal(val(node).shape[-1] + sink.columns, before[-1]):
        return False
    start = number(given["start"])
    if sink.first:
        return known_equal(val(start), sink.columns)
    return start is None or known_equal(val(start), 0)


def same_value(a: Any, b: Any, depth: int = 12) -> bool:
    """Whether two arguments are the same computation, node by node, or equal constants."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return not isinstance(a, Node) and not isinstance(b, Node) and type(a) is type(b) and a == b
    if a.op == b.op == "get_attr":
        return _same_constant(a, b)
    if a.op != "call_function" or a.target is not b.target or depth == 0 or len(a.args) != len(b.args):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()) or a.kwargs.keys() != b.kwargs.keys():
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((a.kwargs[k], b.kwargs[k]) for k in a.kwargs)]
    return all(same_value(x, y, depth - 1) for x, y in pairs)


def _same_constant(a: Node, b: Node) -> bool:
    """Whether two constants of the graph (no parameters, which may be others next time) are equal numbers."""
    one, two = (getattr(n.graph.owning_module, str(n.target), None) for n in (a, b))
    plain = all(type(t) is Tensor and t.numel() == 1 and not t.requires_grad for t in (one, two))
    return plain and one.dtype == two.dtype and bool(torch.equal(one, two))  # type: ignore[union-attr,arg-type]
