"""Rules: algebra in one line, from two plain functions.

    register(rule("tanh-of-neg", lambda x: torch.tanh(-x), lambda x: -torch.tanh(x)))
    register(rule("silu", lambda x: x * torch.sigmoid(x), lambda x: F.silu(x)))

The first function is a pattern as in `fxopt.PatternFusion` (parameters annotated `float` or `int` are numbers), the
second is what takes its place, written in the same variables. A rule is a fusion like any: matched in every spelling,
checked for legality, verified against float64, named in options and reports.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.graph.canonical import canonicalise
from fxopt.graph.query import val
from fxopt.match import hints
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.match.pattern import PatternError
from fxopt.match.spelling import origin
from fxopt.rewrite.fusion import Example, Precision
from fxopt.rewrite.pattern_fusion import PatternFusion, traced


@dataclass(frozen=True)
class Rule(PatternFusion):
    """A fusion made of two functions; `fxopt.rule` makes it."""

    label: str = ""
    before: Callable[..., Any] = lambda: None
    after: Callable[..., Any] = lambda: None
    when: Callable[[Match], Miss | None] | None = None
    closeness: Precision = Precision.ROUNDING
    tests: tuple[Example, ...] = ()

    @property
    def name(self) -> str:
        """The rule's own name."""
        return self.label

    @property
    def precision(self) -> Precision:  # type: ignore[override]
        """How close the result is to the original's."""
        return self.closeness

    @property
    def anchors(self) -> tuple[Any, ...]:  # type: ignore[override]
        """Where a search begins: nowhere, if the normal form has nothing of the pattern left."""
        return () if origin(traced(self).root).op == "placeholder" else super().anchors

    @property
    def pattern(self) -> Callable[..., Any]:
        """The function that is looked for."""
        return self.before

    @property
    def location(self) -> str:
        """file:line of the pattern function."""
        code = getattr(self.before, "__code__", None)
        return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "?"

    def check(self, match: Match) -> Miss | None:
        """Numbers are known while the graph is compiled; then what the rule's `when` says."""
        for name, value in match.bindings.items():
            if isinstance(value, Node) and not isinstance(val(value), Tensor):
                return Miss(f"{name} is known only at run time", value, hint=hints.NUMBER)
        return self.when(match) if self.when is not None else None

    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """The second function, traced on what the variables are bound to."""
        names = list(inspect.signature(self.after).parameters)
        program = _trace(self.after, [match.val(name) for name in names])
        inputs = [n for n in program.graph.nodes if n.op == "placeholder"]
        bound = [match[name] for name in names if isinstance(match.val(name), Tensor)]
        placed: dict[Node, Any] = dict(zip(inputs, bound, strict=True))
        for node in program.graph.nodes:
            if node.op == "get_attr":
                raise PatternError(f"the replacement of {self.label} creates a tensor: use the variables and numbers")
            if node.op == "call_function":
                args, kwargs = tree_map(lambda a: placed[a] if isinstance(a, Node) else a, (node.args, node.kwargs))
                placed[node] = match.call(node.target, *args, **kwargs)
        results = tree_leaves(program.graph.output_node().args[0])
        # What is returned as it came must not become another name for the input's memory.
        values = tuple(
            match.call(torch.ops.aten.clone.default, placed[r]) if r.op == "placeholder" else placed[r] for r in results
        )
        return values if len(values) > 1 else values[0]

    def examples(self) -> Iterable[Example]:
        """Those that the rule was given; else the pattern itself, on random values of its variables."""
        return self.tests or (Example(*_self_example(self.before)),)


def rule(
    name: str,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    check: Callable[[Match], Miss | None] | None = None,
    precision: Precision = Precision.ROUNDING,
    examples: Iterable[Example] = (),
) -> Rule:
    """A fusion that replaces what computes `pattern` by `replacement`, two functions of the same variables.

    `check(match)` may refuse a match with a reason. `examples` are for the conformance tests; without any the pattern
    itself is one. Raises ValueError where the name is empty or the replacement has a variable that the pattern has not,
    and PatternError where the pattern can't be traced.
    """
    if not name or not isinstance(name, str):
        raise ValueError("a rule needs a name, for options and reports")
    unknown = set(inspect.signature(replacement).parameters) - set(inspect.signature(pattern).parameters)
    if unknown:
        raise ValueError(f"rule {name!r}: the replacement has variables that the pattern has not: {sorted(unknown)}")
    made = Rule(name, pattern, replacement, check, precision, tuple(examples))
    # A pattern that can't be traced is told of here, and not when a model is compiled.
    if origin(traced(made).root).op == "placeholder":
        warnings.warn(f"rule {name!r} will find nothing: the normal form drops what its pattern does", stacklevel=2)
    return made


def _trace(function: Callable[..., Any], values: list[Any]) -> GraphModule:
    """`function` on fake values, in the graph's dialect; numbers are part of the program."""
    tensors = [i for i, v in enumerate(values) if isinstance(v, Tensor)]

    def program(*given: Tensor) -> Any:
        filled = list(values)
        for i, value in zip(tensors, given, strict=True):
            filled[i] = value
        return function(*filled)

    mode = detect_fake_mode(values)
    assert mode is not None
    with mode, torch.no_grad():
        # Two variables can be bound to one value, and a trace knows its inputs by identity.
        fresh = [values[i].detach() for i in tensors]
        made = make_fx(program, pre_dispatch=True, _allow_non_fake_inputs=True)(*fresh)
    made.graph.eliminate_dead_code()
    canonicalise(made)
    return made


def _self_example(pattern: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]:
    parameters = inspect.signature(pattern).parameters.values()
    numbers = {p.name: 0.7 if p.annotation in (float, "float") else 3 for p in parameters if p.annotation in _NUMBERS}
    names = [p.name for p in parameters if p.name not in numbers]

    def program(*tensors: Tensor) -> Any:
        return pattern(**dict(zip(names, tensors, strict=True)), **numbers)

    return program, lambda: tuple(torch.randn(2, 3, 8) for _ in names)


_NUMBERS = (float, int, "float", "int")
