"""Canonicalisation: spellings that differ in nothing but spelling become one, so that patterns need few forms.

Every rule keeps values and aliasing as they are: what is dropped returned its argument (or a view of all of it), what
is renamed computes the same. A rule that would need more than that is a raising rule in `passes/`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.casts import casts_first
from fxopt.graph.query import (
    CASTS,
    SHARED,
    arguments,
    faking,
    is_inactive_dropout,
    is_mutable,
    is_reshape,
    is_tensor,
    permutation,
    val,
    written_arguments,
)
from fxopt.graph.scope import gradients_on, is_random, storages, without_gradients
from fxopt.graph.symbols import same_shape

aten = torch.ops.aten

_VIEW_TO_RESHAPE = {aten.view.default, aten._unsafe_view.default}
_CASTING = {aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten.to.device, aten.type_as.default}
_ITEMS = (aten.item.default, aten._local_scalar_dense.default)
_EXPANDS = {aten.expand.default, aten.expand_as.default}


def canonicalise(module: GraphModule) -> int:
    """Bring the traced graph of `module` into canonical form, in place; the number of nodes changed."""
    graph = module.graph
    dropped = _inactive_dropout(graph)
    written = _written_storages(graph)
    reshaped = _reshaped_storages(graph)
    returned = set(graph.output_node().all_input_nodes)
    given_out = frozenset[int]().union(*map(storages, returned))
    differentiated = gradients_on(graph)  # where they can flow, `detach` is no alias
    cut = without_gradients(graph)
    changed = dropped + _scalar_constants(module) + _numbers_first(graph, written)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        same = _identity(node, written, given_out)
        if node.target is aten.detach.default and not differentiated:
            same = node.args[0]
        if node in cut and same not in cut:
            same = None  # it is the same tensor, but for the gradient
        if storages(node) & reshaped:
            same = None  # it is a tensor of its own, whose shape may be another one by now
        if same is not None and node not in returned:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            changed += 1
        elif node.target in _VIEW_TO_RESHAPE and not storages(node) & written:
            # `view` insists on strides that a fused op upstream may not reproduce; `reshape` takes what it gets.
            node.target = aten.reshape.default
            changed += 1
    changed += casts_first(graph, written, cut)
    changed += _functionalise(graph, cut)
    changed += merge_masks(graph)
    changed += _erase_unused(graph)
    module.recompile()
    return changed


def _reshaped_storages(graph: Graph) -> frozenset[int]:
    """The memory of tensors that are given another shape in place (`t_`, `unsqueeze_`, `resize_`)."""
    nodes = [n for n in graph.nodes if torch.Tag.inplace_view in getattr(n.target, "tags", ())]
    return frozenset[int]().union(*(storages(written) for n in nodes for written in written_arguments(n)))


def _erase_unused(graph: Graph) -> int:
    """Erase pure ATen calls whose tensors nothing reads: what they read would seem to be used."""
    changed = 0
    for node in reversed(list(graph.nodes)):
        if node.users or node.op != "call_function" or is_mutable(node) or is_random(node):
            continue
        tensors = tree_leaves(val(node))
        pure = getattr(node.target, "namespace", "") == "aten" or node.target is operator.getitem
        if pure and tensors and all(isinstance(leaf, Tensor) for leaf in tensors):
            graph.erase_node(node)
            changed += 1
    return changed


def _inactive_dropout(graph: Graph) -> int:
    """Drop dropout that does nothing (in place or not), before it is asked what writes to what."""
    changed = 0
    for node in list(graph.nodes):
        if is_inactive_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed += 1
    return changed


def _numbers_first(graph: Graph, written: frozenset[int]) -> int:
    """Read numbers off the inputs (with dynamic=True every float attribute is one) before all else.

    Dynamo reads them where they are used first, which is often later than a replacement has to stand.
    """
    moved = 0
    items = {n for op in _ITEMS for n in graph.find_nodes(op="call_function", target=op)}
    read = {n for n in items if n.args[0].op == "placeholder" and not storages(n.args[0]) & written}
    first = next(node for node in graph.nodes if node.op != "placeholder" and node not in read)
    for node in [n for n in graph.nodes if n in read and first < n]:
        first.prepend(node)
        moved += 1
    return moved


def _written_storages(graph: Graph) -> frozenset[int]:
    written: set[int] = set()
    for node in graph.nodes:
        for argument in written_arguments(node):
            written |= storages(argument)
    return frozenset(written)


def _identity(node: Node, written: frozenset[int], given_out: frozenset[int]) -> Node | None:
    """The argument that `node` is the same as, or None. The sets are the storages written to, and those returned."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not is_tensor(node) or not is_tensor(source):
        return None
    before, after = val(source), val(node)
    if node.target is aten.alias.default:
        return source
    if not _same_kind(before, after):
        return None
    if node.target in _CASTING:
        return None if arguments(node).get("copy") or arguments(node).get("memory_format") else source
    if node.target is aten.contiguous.default:
        return source if storages(node) == storages(source) else None
    if is_reshape(node) or node.target in _EXPANDS:
        return source
    if node.target is aten.slice.Tensor:
        return source
    if permutation(node) == tuple(range(before.dim())):
        return source
    if node.target is aten.mul.Tensor and _is_one(node.args[1]):
        told_apart = storages(source) & written or storages(node) & (written | given_out)
        return None if told_apart else source
    return None


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.layout == b.layout and same_shape(a.shape, b.shape)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _scalar_constants(module: GraphModule) -> int:
    """`torch.tensor(0.5)` in a program becomes a burned-in attribute, a copy of it and, where it belongs on another
    device, a copy of that: make it a `full` instead."""
    changed = 0
    for node in list(module.graph.nodes):
        if node.target is not aten.lift_fresh_copy.default or node.args[0].op != "get_attr":
            continue
        constant = getattr(module, str(node.args[0].target), None)
        if not isinstance(constant, Tensor) or type(constant) is not Tensor or constant.numel() != 1:
            continue
        if constant.device.type == "meta" or constant.is_complex():
            continue
        steps = [node]
        while (following := _taken_further(steps[-1])) is not None:
            steps.append(following)
            constant = constant.to(val(following).dtype)
        last = steps[-1]
        with module.graph.inserting_before(last):
            full = module.graph.call_function(
                aten.full.default,
                (list(constant.shape), constant.item()),
                {"dtype": constant.dtype, "device": val(last).device},
            )
        full.meta = dict(last.meta)
        last.replace_all_uses_with(full)
        attribute = node.args[0]
        for step in reversed(steps):
            module.graph.erase_node(step)
        if not attribute.users:
            module.graph.erase_node(attribute)
            delattr(module, str(attribute.target))
        changed += 1
    return changed


def _taken_further(node: Node) -> Node | None:
    """The cast, or copy to another device, that alone reads `node`: what torch.tensor() ends with, but for a `detach_`,
    which is dropped."""
    for user in list(node.users):
        if user.target is aten.detach_.default:
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target not in CASTS or user.args[0] is not node or val(user).is_complex():
        return None
    return user if val(user).numel() == 1 and val(user).layout == val(node).layout else None


def _functionalise(graph: Graph, cut: frozenset[Node]) -> int:
    """`x.op_(...)` on a value that nothing else can see becomes `x = x.op(...)`.

    Only where the storage holds nothing but the value and further in-place steps on all of it, each with a functional
    form, and then views that nothing writes to: no view exists while it is written, so nothing can observe the write. A
    step without gradients on a value with them (`cut`) stays: it changes the value and keeps its history.
    """
    changed = 0
    homes: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for home in storages(node):
            homes.setdefault(home, []).append(node)
    for sharing in homes.values():
        base, *rest = sharing
        steps = list(itertools.takewhile(is_mutable, rest))
        views = rest[len(steps) :]
        if any(is_mutable(v) or not is_tensor(v) or v.op != "call_function" for v in views):
            continue
        if any(is_mutable(user) and user not in steps for node in sharing for user in node.users):
            continue
        if not steps or base.op != "call_function" or not is_tensor(base) or written_arguments(base):
            continue
        if any(step in cut for step in steps) and base not in cut:
            continue
        if all(_functional_form(s) is not None and same_shape(val(s).shape, val(base).shape) for s in steps):
            for step in steps:
                _replace_in_place(graph, step)
            for view in views:  # of the new value now
                args, kwargs = tree_map(val, (view.args, view.kwargs))
                with faking(val(view).fake_mode):
                    view.meta["val"] = view.target(*args, **kwargs)  # type: ignore[operator]
            changed += len(steps)
    return changed


def merge_masks(graph: Graph) -> int:
    """Booleans and int64 that are computed twice in the same way are computed once: masks and positions.

    Floats stay apart, for layers are compiled and rewritten each for itself, unless a rewrite made them to be shared
    (`query.SHARED`); so do narrower integers: quantised weights, whose every use is a site of its own. Nothing that is
    written to or returned is merged, and nothing that reads what is written to: it may read it before and after.
    """
    written = _written_storages(graph)
    kept = written.union(*map(storages, graph.output_node().all_input_nodes))
    first: dict[Any, Node] = {}
    changed = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(node):
            continue
        if not (_makes_masks(node) or node.meta.get(SHARED)) or is_mutable(node) or is_random(node):
            continue
        key = _hashable((node.target, node.args, node.kwargs))
        if key is None or storages(node) & kept or any(storages(n) & written for n in node.all_input_nodes):
            continue
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            changed += 1
    return changed


def _makes_masks(node: Node) -> bool:
    """Whether a tensor holds truth values or positions, or other integers that are only compared."""
    dtype = val(node).dtype
    if dtype in (torch.bool, torch.int64):
        return True
    compared = all(is_tensor(user) and val(user).dtype == torch.bool for user in node.users)
    return compared and bool(node.users) and not dtype.is_floating_point and not dtype.is_complex


def _hashable(argument: Any) -> Any:
    """Something equal for equal arguments only (1, 1.0 and True are not), or None."""
    if isinstance(argument, (list, tuple)):
        parts = tuple(_hashable(a) for a in argument)
        return None if None in parts else (type(argument).__name__, parts)
    if isinstance(argument, dict):
        return _hashable(tuple(sorted(argument.items())))
    if isinstance(argument, Node) and isinstance(val(argument), SymInt):
        return "SymInt", str(val(argument).node.expr)  # a size, read off whichever tensor
    if isinstance(
        argument, (Node, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch._ops.OpOverload)
    ):
        return type(argument).__name__, str(argument) if isinstance(argument, float) else argument
    return ("None",) if argument is None else None


def _functional_form(node: Node) -> Callable[..., Any] | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not is_tensor(node):
        return None
    packet = schema.name.split("::")[1]
    if not packet.endswith("_") or packet.endswith("__") or schema.name.split("::")[0] != "aten":
        return None
    tags = node.target.tags  # type: ignore[union-attr]
    if (
        (torch.Tag.pointwise not in tags and packet != "masked_fill_")  # which lacks the tag, though it is
        or torch.Tag.nondeterministic_seeded in tags
        or len(written_arguments(node)) != 1
    ):
        return None
    return _overload_taking(getattr(aten, packet[:-1], None), schema)


def _overload_taking(packet: Any, schema: Any) -> Callable[..., Any] | None:
    """The overload that takes what the in-place op takes and writes to nothing.

    Names don't tell: `ldexp_.default` takes tensors, `ldexp.default` numbers.
    """
    for name in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, name)
        taken = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if not candidate._schema.is_mutable and taken == [(a.name, str(a.type)) for a in schema.arguments]:
            return candidate
    return None


def _replace_in_place(graph: Graph, node: Node) -> None:
    target = node.args[0]
    functional = _functional_form(node)
    assert functional is not None
    assert isinstance(target, Node)
    before = val(node)
    with graph.inserting_before(node):
        made = graph.call_function(functional, node.args, node.kwargs)
        made.meta = dict(node.meta)
        values = [val(a) for a in made.args]
        with faking(before.fake_mode):
            made.meta["val"] = functional(*values, **{k: val(v) for k, v in made.kwargs.items()})
        if made.meta["val"].dtype != before.dtype:  # in-place arithmetic keeps its target's dtype
            wide = made
            made = graph.call_function(aten.to.dtype, (wide, before.dtype))
            made.meta = dict(node.meta)
            with faking(before.fake_mode):
                made.meta["val"] = wide.meta["val"].to(before.dtype)
    later = [user for user in target.users if node < user]
    for user in later:
        user.replace_input_with(target, made)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
