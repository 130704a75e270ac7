"""What can be asked of a node in the normal form: its value, its arguments by name, who uses it, where it came from."""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: meta key of a node kept only so that a raised form can be undone; it does not count as a user
SHADOW = "fxopt_shadow"
#: meta key of a node that a rewrite has made, of which those equal to it may be made one although they hold floats
SHARED = "fxopt_shared"

#: ops that keep every element and its order, and change only the shape
RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.view_as.default,
        aten.reshape_as.default,
    }
)

#: ops that only reorder dimensions
PERMUTES = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.mT.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.adjoint.default,
        aten.numpy_T.default,
    }
)

#: ops that change a value's dtype and nothing else (device and layout changes are excluded by `is_cast`)
CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten.to.device,
        aten._to_copy.default,
        aten.type_as.default,
    }
)

#: copies that change neither value nor shape nor dtype
COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default})


def val(node: Any) -> Any:
    """The fake value of a node (FakeTensor, SymInt, tuple ...); anything but a node is its own value."""
    return node.meta.get("val") if isinstance(node, Node) else node


@contextlib.contextmanager
def faking(mode: Any) -> Iterator[None]:
    """A context in which ops run on fakes of `mode`, also those whose rule for symbolic sizes is written in Python."""
    with mode, enable_python_dispatcher():
        yield


def storage(value: Any) -> int | None:
    """What identifies the memory of a strided tensor, which its views share; None for any other value."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def is_tensor(node: Any) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(val(node), Tensor)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets` (any function, if none is given). A packet stands for its overloads."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    return not targets or node.target in targets or getattr(node.target, "overloadpacket", None) in targets


def is_reshape(node: Any) -> bool:
    """Whether `node` changes the shape of its first argument and nothing else."""
    return isinstance(node, Node) and node.target in RESHAPES


def is_permute(node: Any) -> bool:
    """Whether `node` reorders the dimensions of its first argument and does nothing else."""
    return isinstance(node, Node) and node.target in PERMUTES


def is_copy(node: Any) -> bool:
    """Whether `node` has its first argument's value, shape and dtype."""
    return isinstance(node, Node) and node.target in COPIES


def is_cast(node: Any) -> bool:
    """Whether `node` changes the dtype of its first argument and nothing else (same device and layout)."""
    if not isinstance(node, Node) or node.target not in CASTS:
        return False
    before, after = val(node.args[0]), val(node)
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.device == after.device
        and before.layout == after.layout
    )


def is_widening_cast(node: Any) -> bool:
    """Whether `node` casts to a dtype that holds every value of the old one exactly (bf16 to fp32, say)."""
    return is_cast(node) and widens(val(node.args[0]).dtype, val(node).dtype)


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether every value of floating dtype `before` is exact in `after`."""
    if before == after:
        return True
    if not (before.is_floating_point and after.is_floating_point):
        return False
    return torch.promote_types(before, after) == after


def permutation(node: Node) -> tuple[int, ...] | None:
    """For a node that permutes: result dimension i is argument dimension permutation[i]. None if it is another op."""
    if not is_permute(node) or not is_tensor(node.args[0]):
        return None
    rank = val(node.args[0]).dim()
    order = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    args = [order if i == 0 else a for i, a in enumerate(node.args)]
    return tuple(size - 2 for size in node.target(*args, **node.kwargs).shape)  # type: ignore[operator]


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by their schema's names, defaults filled in."""
    parameters = _parameters(node.target)
    if parameters is None:
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    given, named = node.args, node.kwargs
    bound: dict[str, Any] = {}
    for i, (name, keyword_only, default) in enumerate(parameters):
        bound[name] = given[i] if i < len(given) and not keyword_only else named.get(name, default)
    return bound


@functools.lru_cache(maxsize=4096)
def _parameters(target: Any) -> tuple[tuple[str, bool, Any], ...] | None:
    """(name, whether it is passed by keyword only, default) for each argument of an op; None for other functions."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return None
    return tuple((a.name, a.kwarg_only, a.default_value if a.has_default_value() else None) for a in schema.arguments)


def from_end(dim: int, rank: int) -> int:
    """A dimension counted from the end: -1 is the last."""
    return dim - rank if dim >= 0 else dim


def users(node: Node) -> list[Node]:
    """The nodes that use `node`, without those kept only to undo a raised form."""
    return [u for u in node.users if not u.meta.get(SHADOW)]


def inputs(node: Node) -> list[Node]:
    """The nodes that `node` uses, in order."""
    return list(node.all_input_nodes)


def result(node: Node, index: int) -> Node | None:
    """The `getitem` node that takes result `index` of a multi-output node, or None if nothing does."""
    for user in users(node):
        if user.target is operator.getitem and user.args[1] == index:
            return user
    return None


_DROPOUTS = {
    getattr(aten, kind + suffix).default
    for kind in ("dropout", "feature_dropout", "alpha_dropout")
    for suffix in ("", "_")
}


def is_inactive_dropout(node: Node) -> bool:
    """Whether the node is dropout that returns its argument as it is (and in place writes nothing to it)."""
    if node.target not in _DROPOUTS:
        return False
    given = arguments(node)
    return given["train"] is False or given["p"] == 0


#: composite ops that write to arguments without saying so in their schema: (the flag that asks for it, the arguments)
_HIDDEN_WRITES = {
    aten.batch_norm.default: ("training", ("running_mean", "running_var")),
    aten.instance_norm.default: ("use_input_stats", ("running_mean", "running_var")),
}


def is_mutable(node: Node) -> bool:
    """Whether the node's op writes to one of its arguments."""
    if not _may_write(node.target) or is_inactive_dropout(node):
        return False
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable) or bool(_hidden_writes(node))


@functools.lru_cache(maxsize=4096)
def _may_write(target: Any) -> bool:
    """Whether some call of `target` writes to an argument."""
    schema = getattr(target, "_schema", None)
    stated = schema is not None and schema.is_mutable
    return stated or target in _HIDDEN_WRITES or isinstance(target, torch._ops.HigherOrderOperator)


def written_arguments(node: Node) -> list[Node]:
    """The nodes whose values `node` writes to: by its schema, or by what is known of the op."""
    if not _may_write(node.target):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or is_inactive_dropout(node):
        return _hidden_writes(node)
    written: list[Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        written += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Node)]
    return written


def _hidden_writes(node: Node) -> list[Node]:
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # what its graphs write to is not looked into
        return [n for n in node.all_input_nodes if any(isinstance(leaf, Tensor) for leaf in tree_leaves(val(n)))]
    if node.target not in _HIDDEN_WRITES:
        return []
    flag, names = _HIDDEN_WRITES[node.target]
    given = arguments(node)
    return [given[name] for name in names if given[flag] and isinstance(given[name], Node)]


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')


def source_line(node: Node) -> str | None:
    """Where the user's program made this node: "file:line in function: code", or None if that isn't known."""
    for line in source_lines(node):
        return line
    return None


def source_lines(node: Node) -> Iterator[str]:
    """The frames that made this node, innermost first, as "file:line in function: code"."""
    trace = node.meta.get("stack_trace") or ""
    frames = list(_FRAME.finditer(trace))
    for frame in reversed(frames):
        yield f"{frame['file']}:{frame['line']} in {frame['function']}: {frame['code'].strip()}"


def module_path(node: Node) -> str | None:
    """The innermost nn.Module that made this node, as a dotted path ("model.layers.0.self_attn")."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    return re.sub(r"^L\['self'\]\.?", "", path) or None
