"""softmax(scale · q kᵀ + mask) v  ->  fxopt::attention(q, k, v, mask, scale), never storing the scores.

Models spell attention out in dozens of ways that differ in layout, casts, the place of the scale and the order of
masks. The site is found by its roles (`_attention_roles`), not by a template; the algebra used is

    (c q) kᵀ = q (c k)ᵀ = c (q kᵀ)                       scales commute with the product, layouts and casts
    softmax(s + r) = softmax(s)  for r constant in a row  stabilisation by the row's maximum drops out
    k[h // g]                                             repeated heads are read, not stored

and what `_attention_plan`, `_attention_mask` and `_attention_weights` say of the scores, masks and weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from fxopt.graph.query import aten, val
from fxopt.graph.scope import Scope
from fxopt.graph.symbols import is_static, known_equal, same_shape
from fxopt.kernels.attention import MAX_WIDTH, attention, is_large
from fxopt.match.masks.conditions import TRUE
from fxopt.match.masks.values import Opaque
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.passes._attention_bounds import Bounds, read_bounds
from fxopt.passes._attention_changes import apply_changes, join_heads, unmix
from fxopt.passes._attention_examples import examples
from fxopt.passes._attention_mask import Placed, join_masks, make_mask, multiply
from fxopt.passes._attention_narrow import Narrow, narrow_masks
from fxopt.passes._attention_operands import emit, spellable
from fxopt.passes._attention_plan import Plan, plan
from fxopt.passes._attention_program import HEADS, ROWS, Multiply, Sink
from fxopt.passes._attention_roles import SDPA, SOFTMAXES, Roles, read_sdpa, read_softmax
from fxopt.passes._attention_weights import Change, MixWeights, tensors_of
from fxopt.rewrite.fusion import Example, Fusion


@dataclass
class AttentionMatch(Match):
    """A match with the roles and the arguments that they amount to."""

    roles: Roles = field(kw_only=True)
    plan: Plan = field(kw_only=True)
    bounds: Bounds | None = field(kw_only=True, default=None)
    narrow: tuple[Narrow, ...] = field(kw_only=True, default=())


@dataclass(frozen=True)
class FuseAttention(Fusion):
    """softmax(scale · q kᵀ + mask) v -> fxopt::attention(q, k, v, mask, scale)

    Found spelled out or as F.scaled_dot_product_attention, with any layout of q, k and v, any place of the scale, masks
    added or filled in, soft caps, sinks, heads of k and v repeated (grouped-query attention) or mixed (talking heads),
    and weights that are scaled, mixed with others or blanked afterwards. Masks that the graph makes become causality,
    or bounds on each row's keys (`bounds`); biases that depend on the distance of key and row only become tables
    (`tables`). Refused, with the reason, where the softmax is not over the keys, dropout is active, the scores are
    clamped, or the weights are used elsewhere.
    """

    anchors: ClassVar[tuple[Any, ...]] = (*SOFTMAXES, SDPA)
    expected: ClassVar[tuple[Any, ...]] = anchors
    #: masks become bounds on each row's keys where they can; None: on GPUs, whose kernels visit only what lies within,
    #: and where gradients flow: SDPA has them for masks that leave every row a key, not for numbers that are added
    bounds: bool | None = None
    #: biases by distance become tables of M + N - 1 numbers, a slope times the distance (ALiBi) the slope, and are told
    #: apart from what masks rule out; None: on GPUs for many scores, in half precision, and in training for biases that
    #: need no gradient
    tables: bool | None = None

    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """The attention around a softmax, or the one that a call names."""
        best: Miss | None = None
        for roles in [read_sdpa(node)] if node.target is SDPA else read_softmax(node):
            found = self._match(node, roles, scope) if isinstance(roles, Roles) else roles
            if isinstance(found, Match):
                return found
            best = found if best is None or found.progress > best.progress else best
        return best

    def _match(self, node: Node, roles: Roles, scope: Scope) -> Match | Miss:
        progress = len(roles.covered)
        bad = _unsupported(roles)
        if bad is not None:
            return Miss(bad, node, progress)
        scales = [s for operand in (roles.q, roles.k) if operand is not None for s in operand.scales]
        grouped = roles.k is not None and not known_equal(roles.k.heads, roles.sizes[HEADS])
        arranged = plan(roles.program, roles.sizes, scales, roles.covered, roles.is_causal, grouped)
        if isinstance(arranged, Miss):
            return replace(arranged, progress=progress)
        bad = _too_wide(roles, arranged)
        if bad is not None:
            return Miss(bad, arranged.mix or roles.output, progress)
        named = {"q": roles.q, "k": roles.k, "v": roles.v}
        bindings: dict[str, Any] = {name: operand.base for name, operand in named.items() if operand is not None}
        bindings["scale"] = arranged.scale
        on_gpu = _on_gpu(val(roles.v.base))
        everywhere = self.bounds if self.bounds is not None else on_gpu or torch.is_grad_enabled()
        many = on_gpu and is_large(*roles.sizes[ROWS:])
        tables = self.tables
        if tables is None:
            tables = many and (torch.is_grad_enabled() or val(roles.v.base).dtype.itemsize == 2)
        empty_rows = "uniform" if arranged.uniform else roles.empty_rows
        bounds = read_bounds(
            arranged,
            scope,
            roles.sizes,
            roles.output,
            empty_rows,
            everywhere=everywhere,
            tables=tables,
            slopes=tables,
            scattered=not torch.is_grad_enabled() and (self.bounds or (self.bounds is None and many)),
            learned=bool(self.tables) or not torch.is_grad_enabled(),
        )
        unread = arranged
        if bounds is not None:
            arranged, empty_rows = bounds.plan, bounds.empty_rows
        narrow = narrow_masks(arranged.mask, scope, roles.sizes, roles.output)
        leaves = [*(bounds.leaves if bounds is not None else ()), *(leaf for n in narrow for leaf in n.leaves)]
        gone = [*(bounds.read if bounds is not None else ()), *(n.tensor for n in narrow)]
        bindings |= {f"leaf_{i}": leaf for i, leaf in enumerate(dict.fromkeys(leaves))}
        bindings |= {f"read_{i}": mask for i, mask in enumerate(dict.fromkeys(gone))}
        masks = [step.tensor for step in arranged.mask if step.tensor not in (None, *gone)]
        others = [p.tensor for p in arranged.placed if p.tensor not in (*masks, *gone)]
        others += [arranged.mix] if arranged.mix is not None else []
        others += [t for change in _changes(roles) for t in tensors_of(change)]
        others += [roles.weights.values] if roles.weights is not None and others else []
        for name, nodes in (("mask", masks), ("factor", [f.by for f in arranged.factors]), ("operand", others)):
            bindings |= {f"{name}_{i}" if i else name: value for i, value in enumerate(nodes)}
        every = [m for operand in roles.operands for m in operand.moves]
        if not spellable([*every, *(m for p in unread.placed for m in p.moves)], _sources(roles, arranged)):
            return Miss("a symbolic size is not the size of any operand", node, progress)
        tags = {
            "form": "sdpa" if node.target is SDPA else "spelled out" if roles.q is not None else "scores given",
            "mask": len(masks) + len(narrow) + (bounds is not None and bounds.rest is not TRUE),
            "narrow": len(narrow),
            "causal": arranged.is_causal,
            "bounded": bounds is not None and bounds.plan.is_causal is unread.is_causal,
            "bias": _kind(bounds),
            "empty_rows": empty_rows,
            "grouped": grouped,
            "softcap": arranged.cap is not None,
            "sink": arranged.sink is not None,
        }
        return AttentionMatch(
            (roles.output,), roles.covered | arranged.covered, bindings, tags, roles=roles, plan=unread, bounds=bounds,
            narrow=tuple(narrow), moderate=bounds.moderate if bounds is not None else frozenset(),
        )  # fmt: skip

    def rewrite(self, match: Match) -> Node:
        """Bring the operands to [B, H, M, D], make one mask, call the op, give the result its old shape."""
        assert isinstance(match, AttentionMatch)
        roles, arranged = match.roles, match.plan
        sources = _sources(roles, arranged)
        bounds, first, last, rest, bias = match.bounds, None, None, None, None
        if bounds is not None:
            sources = _sources(roles, bounds.plan)
            try:
                first, last, rest, bias = bounds.make(match, sources)
                arranged = bounds.plan
            except Opaque:  # a size or an index that can't be spelled out here: the masks as they are
                sources = _sources(roles, arranged)
                match.tags |= {"bounded": False, "causal": arranged.is_causal, "bias": None}
                match.tags["empty_rows"] = "uniform" if arranged.uniform else roles.empty_rows
        q, k, v = _operands(match, roles, arranged, sources)
        values, changes = v, list(_changes(roles))
        mixes = changes[0] if changes and isinstance(changes[0], MixWeights) else None
        if mixes is not None:
            v, changes = join_heads(match, v), changes[1:]
        if arranged.mix is not None or mixes is not None:
            k, v = (_as_many_heads(match, x, other, sources) for x, other in ((k, v), (v, k)))
        mask = join_masks(match, make_mask(match, _narrowed(match, arranged, sources), sources), rest)
        sink = _sink(match, arranged.sink, sources) if arranged.sink is not None else None
        factor = _factor(match, arranged.factor, sources)
        settings = [arranged.is_causal, match.tags["empty_rows"], arranged.cap, sink, factor, first, last, bias]
        while len(settings) > 2 and settings[-1] is None:
            settings.pop()
        result = match.call(attention, q, k, v, mask, arranged.scale, *settings)
        if mixes is not None:
            result = unmix(match, result, values, mixes)
        shape = val(roles.output).shape
        if not same_shape(val(result).shape, shape):
            result = emit(match, result, [("reshape", tuple(shape))], [result, *sources])
        return apply_changes(match, result, roles.weights, changes) if roles.weights is not None else result

    def adversaries(self, match: Match) -> Iterator[dict[str, Tensor]]:
        """Masks that are the opposite of causal, and that leave a row no live key."""
        mask = match.val("mask")
        if not isinstance(mask, Tensor) or mask.dim() == 0:
            return
        upper = torch.ones([n if is_static(n) else 7 for n in mask.shape], dtype=torch.bool)
        upper = upper.triu() if upper.dim() > 1 else upper
        dead = upper.clone()
        (dead if dead.dim() == 1 else dead[..., 0, :]).fill_(False)
        for kept in (upper, dead):
            if mask.dtype == torch.bool:
                yield {"mask": kept}
                yield {"mask": ~kept}
            elif mask.is_floating_point():
                for fill in (-torch.inf, torch.finfo(mask.dtype).min):
                    yield {"mask": torch.zeros(kept.shape, dtype=mask.dtype).masked_fill(~kept, fill)}

    def examples(self) -> Iterable[Example]:
        """One program for each family of forms, and what must be refused."""
        return examples()


def _on_gpu(value: Tensor) -> bool:
    return value.device.type == "cuda"


def _kind(bounds: Bounds | None) -> str | None:
    """What is made of the biases."""
    if bounds is None or not (bounds.before or bounds.biases):
        return None
    if any(bias.slope is not None for bias in bounds.biases):
        return "slope"
    return "by distance" if any(bias.by_distance for bias in bounds.biases) else "by key"


def _operands(match: Match, roles: Roles, arranged: Plan, sources: Sequence[Node]) -> tuple[Node, Node, Node]:
    """q, k and v as the op takes them."""
    v = emit(match, roles.v.base, roles.v.moves, sources)
    if roles.q is None or roles.k is None:
        nothing = match.call(aten.new_zeros.default, v, [1, 1, 1, 8])
        batch, heads, rows, keys = roles.sizes
        shapes = ((batch, heads, rows, 8), (batch, roles.v.heads, keys, 8))
        q, k = (emit(match, nothing, [("expand", shape)], sources) for shape in shapes)
        return q, k, v
    q, k = (emit(match, operand.base, operand.moves, sources) for operand in (roles.q, roles.k))
    for factor in arranged.factors:
        q = multiply(match, q, factor)
    for placed in arranged.on_q:
        q = _product(match, q, placed, emit(match, placed.tensor, placed.moves, sources))  # type: ignore[arg-type]
    for placed in arranged.on_k:
        term = emit(match, placed.tensor, placed.moves, sources)  # type: ignore[arg-type]
        turned = (aten.transpose.int, term, -1, -2) if val(term).dim() > 1 else (aten.unsqueeze.default, term, -1)
        k = _product(match, k, placed, match.call(*turned))
    if arranged.mix is not None:
        q, k = join_heads(match, q, arranged.mix), join_heads(match, k)
    return q, k, v


def _narrowed(match: AttentionMatch, arranged: Plan, sources: Sequence[Node]) -> list[Placed]:
    """The steps on the mask, with tensors of fewer elements where that will do."""
    narrow = {id(n.step): n for n in match.narrow}
    gone = {n.tensor for n in match.narrow}
    kept = [s for s in sources if s not in gone]
    return [narrow[id(s)].make(match, kept) if id(s) in narrow else s for s in arranged.mask]


def _product(match: Match, operand: Node, placed: Placed, term: Node) -> Node:
    """q or k times a tensor that stood at the scores, in the operand's dtype."""
    assert isinstance(placed.instruction, Multiply)
    result = match.call(aten.div.Tensor if placed.instruction.divide else aten.mul.Tensor, operand, term)
    dtype = val(operand).dtype
    return result if val(result).dtype == dtype else match.call(aten.to.dtype, result, dtype)


def _factor(match: Match, products: Sequence[Placed], sources: Sequence[Node]) -> Node | None:
    """What multiplies the scores one by one."""
    result: Node | None = None
    for placed in products:
        assert isinstance(placed.instruction, Multiply)
        term = emit(match, placed.tensor, placed.moves, sources)  # type: ignore[arg-type]
        if placed.instruction.divide:
            term = match.call(aten.reciprocal.default, term)
        result = term if result is None else match.call(aten.mul.Tensor, result, term)
    return result


def _sink(match: Match, placed: Placed, sources: Sequence[Node]) -> Node:
    """The sink: one score a row for all columns."""
    assert isinstance(placed.instruction, Sink)
    term = placed.instruction.term
    if not known_equal(placed.instruction.columns, 1):
        term = match.call(aten.logsumexp.default, term, [-1], True)
    return emit(match, term, placed.moves, sources)


def _as_many_heads(match: Match, x: Node, other: Node, sources: Sequence[Node]) -> Node:
    """k or v with one head for all, shown as often as the other has heads."""
    heads = val(other).shape[1]
    if not known_equal(val(x).shape[1], 1) or known_equal(heads, 1):
        return x
    batch, _, keys, width = val(x).shape
    return emit(match, x, [("expand", (batch, heads, keys, width))], [x, other, *sources])


def _changes(roles: Roles) -> tuple[Change, ...]:
    return roles.weights.changes if roles.weights is not None else ()


def _sources(roles: Roles, arranged: Plan) -> list[Node]:
    """The tensors of the match that symbolic sizes can be read off."""
    tensors = [placed.tensor for placed in arranged.placed if placed.tensor is not None]
    return [*(operand.base for operand in roles.operands), *tensors]


def _too_wide(roles: Roles, arranged: Plan) -> str | None:
    """Why mixed heads can't be taken side by side, or None."""
    mixed_after = any(isinstance(change, MixWeights) for change in _changes(roles))
    if arranged.mix is None and not mixed_after:
        return None
    heads = roles.sizes[HEADS]
    widths = [roles.width] if arranged.mix is not None else []
    widths += [val(roles.output).shape[-1]] if mixed_after else []
    if any(not known_equal(x.heads, heads) for x in (roles.k, roles.v) if x is not None):
        return "heads are mixed that share keys and values"
    if not isinstance(heads, int) or not all(isinstance(w, int) and w * heads <= MAX_WIDTH for w in widths):
        return f"{heads} heads are mixed: side by side they are wider than the {MAX_WIDTH} that fast kernels serve"
    return None


def _unsupported(roles: Roles) -> str | None:
    """Why the op can't take these operands, in words, or None."""
    for name, operand in (("q", roles.q), ("k", roles.k), ("v", roles.v)):
        if operand is None:
            continue
        value = val(operand.base)
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            return f"{name} has dtype {value.dtype}"
        if any(known_equal(n, 0) for n in value.shape):
            return f"{name} is empty"
    if val(roles.v.base).dtype != val(roles.output).dtype:
        return f"v is {val(roles.v.base).dtype} but the result {val(roles.output).dtype}"
    if len({val(operand.base).device for operand in roles.operands}) > 1:
        return "q, k and v are on several devices"
    return None
