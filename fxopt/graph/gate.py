"""The soundness gate: which of Dynamo's graphs may be retraced at all.

A second capture is silently wrong for some programs: a custom backward is dropped, a functorch transform's tensors are
burned in as constants. So the graph is walked first, and what can't be retraced is turned away with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.graph.higher_order import is_opaque, is_region
from fxopt.graph.levels import is_transform_call

_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, torch._subclasses.FakeTensor)


def refusal(module: GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why Dynamo's graph `module` must not be retraced, in words, or None."""
    # A higher-order op brings helpers of its own into the graph: it is the reason, not they.
    by_node = min(_nodes(module), key=lambda reason: not reason.startswith("higher-order op"), default=None)
    return _ambient() or _inputs(example_inputs) or _attributes(module) or by_node


def _ambient() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform: its tensors would be burned in as constants"
    return None


def _inputs(example_inputs: Sequence[Any]) -> str | None:
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    for tensor in tensors:
        if tensor.is_nested:
            return "an input is a nested tensor"
        if tensor.layout != torch.strided:
            return f"an input has the layout {str(tensor.layout).removeprefix('torch.')}"
        if is_traceable_wrapper_subclass(tensor) or type(tensor) not in _PLAIN_TYPES:
            return f"an input is a tensor subclass ({type(tensor).__name__})"
        if tensor.is_quantized:
            return f"an input is a quantized tensor ({tensor.dtype})"
    return None


def _attributes(module: GraphModule) -> str | None:
    for name, _ in module.named_parameters():
        return f"the graph holds the parameter {name} itself, not as an input"
    return None


def _nodes(module: GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        reason = _node(node)
        if reason is not None:
            yield f"{reason} (at {node.name})"


def _node(node: Node) -> str | None:
    if node.op == "call_module":
        return "a module is called as a whole"
    if node.op == "call_method":
        return None
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator) and not (is_opaque(target) or is_region(target)):
        return f"higher-order op {target._name}"
    name = getattr(target, "__name__", "")
    home = getattr(target, "__module__", "") or ""
    if is_transform_call(node):
        return None  # graph/transforms.py takes it out of the graph
    if home.startswith(("torch._functorch", "torch._C._functorch")) or "functorch" in home:
        return f"a torch.func transform ({name})"
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        return f"the autograd function {name}: the retrace would drop its backward"
    owner = getattr(target, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"the autograd function {owner.__name__}: the retrace would drop its backward"
    return None
