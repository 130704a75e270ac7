"""Which rewrite breaks a model? Applications are counted, and the first bad one is found by bisection.

    print(fxopt.bisect(model, (x,)))
    fxopt.bisect(model, {"input_ids": ids}, check=lambda out: out.logits.isfinite().all())

Each trial compiles the model afresh with the first n rewrites only, on copies of the inputs and with the model's
buffers as they were; about log2(number of rewrites) compilations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.rewrite.fusion import Step
from fxopt.rewrite.quota import at_most
from fxopt.view import text
from fxopt.view.explain import compiled_afresh

#: the default check allows this many times torch.testing.assert_close's own tolerances
SLACK = 10.0


@dataclass(frozen=True)
class Bisection:
    """The outcome. `step` is the first rewrite with which the check fails, number `index` (from 1) of `total`.

    Attributes:
        step: the rewrite, or None where there is none to find
        index: its number, from 1; 0 where there is none
        total: rewrites that the whole model has
        failure: what the check said with it
        reason: why there is none to find; "" where there is one
        tries: compilations that it took
    """

    step: Step | None
    index: int
    total: int
    failure: str
    reason: str
    tries: int

    def __str__(self) -> str:
        """In words: the fusion, where it is in the model, how it was verified, and how to go on without it."""
        if self.step is None:
            return f"{self.reason} ({text.count(self.total, 'rewrite')}, {self.tries} compilations)"
        step = self.step
        lines = [
            f"rewrite {self.index} of {self.total} breaks the check: {step.fusion} -> {step.op or ' '.join(step.made)}",
            f"  in {step.module}" if step.module else "",
            *(f"  at {text.short_source(source)}" for source in step.sources),
            f"  {text.verdict(step.verdict)}",
            f"  defined in {text.short_path(step.rule)}",
            f"  the check: {self.failure}",
            f'  without it: options={{"disable": ["{step.fusion}"]}}',
        ]
        return text.clean("\n".join(line for line in lines if line))


def bisect(
    model: Callable[..., Any],
    inputs: Any,
    *,
    check: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Bisection:
    """The first rewrite with which `check` fails, found by compiling with more or fewer of them.

    `inputs` is a tensor, a tuple of arguments or a dict of keyword arguments. `check` gets what the model returned; it
    fails by returning something false or by raising, and so does a model that raises. By default it compares with the
    model run eagerly, at ten times the tolerances of torch.testing.assert_close. `options` and `mode` are those of
    torch.compile. The call runs in the caller's grad mode; the model's buffers and the random number generators are
    put back. Compilation caches are not used. Raises what the model itself raises when it is run eagerly.
    """
    args, kwargs = _arguments(inputs)
    trial = _Trial(model, args, kwargs, check, dict(options or {}), mode)
    failure, steps = trial.run(None)
    total = len(steps)
    if failure is None:
        return Bisection(None, 0, total, "", "the check passes with every rewrite", trial.tries)
    without, _ = trial.run(0)
    if without is not None:
        reason = f"the check fails without any rewrite too: {without}"
        return Bisection(None, 0, total, without, reason, trial.tries)
    good, bad, culprit = 0, total, steps  # the check passes with the first `good` and fails with the first `bad`
    while bad - good > 1:
        middle = (good + bad) // 2
        said, taken = trial.run(middle)
        if said is None:
            good = middle
        else:
            bad, culprit, failure = middle, taken, said
    if len(culprit) < bad:
        reason = "compiling it twice gave different rewrites, so none can be singled out"
        return Bisection(None, 0, total, failure, reason, trial.tries)
    return Bisection(culprit[bad - 1], bad, total, failure, "", trial.tries)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


class _Trial:
    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        check: Callable[[Any], Any] | None,
        options: dict[str, Any],
        mode: str | None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.settings = {"options": options, "mode": mode}
        self.tries = 0
        self.check = check
        if check is None:
            self.check = _like(self._call(model))

    def run(self, limit: int | None) -> tuple[str | None, list[Step]]:
        """Compile with at most `limit` rewrites and call: what the check said (None: fine), the rewrites applied."""
        self.tries += 1
        assert self.check is not None
        fresh = torch._inductor.config.patch(force_disable_caches=True)
        with at_most(limit) as quota, fresh:
            try:
                verdict = self.check(self._call(compiled_afresh(self.model, **self.settings)))
                said = None if verdict is None or bool(verdict) else "it returned false"
            except Exception as error:
                words = " ".join(str(error).split())
                said = f"{type(error).__name__}: {words[:300]}"
        return said, list(quota.taken)

    def _call(self, function: Callable[..., Any]) -> Any:
        args, kwargs = (tree_map(_copy, part) for part in (self.args, self.kwargs))
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), _buffers_put_back(self.model):
            return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, function(*args, **kwargs))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value)


@contextmanager
def _buffers_put_back(model: Any) -> Iterator[None]:
    """What a call writes to the module's buffers (batch norm's statistics, a KV cache) is undone."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


def _like(expected: Any) -> Callable[[Any], None]:
    """The default check: every tensor is close to the one that eager mode gives."""
    wanted = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]

    def check(actual: Any) -> None:
        given = [leaf for leaf in tree_leaves(actual) if isinstance(leaf, Tensor)]
        if len(given) != len(wanted):
            raise AssertionError(f"{len(given)} tensors were returned, {len(wanted)} in eager mode")
        for a, b in zip(given, wanted, strict=True):
            rtol, atol = torch.testing._comparison.default_tolerances(a, b)
            torch.testing.assert_close(a, b, rtol=SLACK * rtol, atol=SLACK * atol, equal_nan=True)

    return check
