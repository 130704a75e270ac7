"""Measuring an op's candidates on arguments of one kind: drawn, verified against the reference, timed, compared.

A candidate is as good as the reference if its error against float64 is at most twice the reference's own, plus ULPS.
An opaque call under the compiler is charged for what it prevents: its result is written and read once more where
Inductor would have kept it in registers. That is the time of a copy of the result, less that of a copy of nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fxopt.ops import Config, FusedOp, Implementation, Target, spelled
from fxopt.rewrite.compare import distance
from fxopt.rewrite.evaluate import Promote, isolated
from fxopt.tune import timing
from fxopt.tune.store import Entry
from fxopt.tune.timing import Timing

log = logging.getLogger(__name__)

ULPS = 4
#: bytes of one set of arguments above which nothing is measured; the float64 reference takes four times as much
LIMIT = {"cpu": 256 << 20, "cuda": 4 << 30}
_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class NotMeasured(Exception):
    """Nothing was measured; the message says why."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """An implementation launched in one way; None: as it thinks best."""

    implementation: Implementation
    config: Config | None = None

    @property
    def name(self) -> str:
        """The implementation's name, and the configuration where one is set."""
        return f"{self.implementation.name} {spelled(self.config)}" if self.config else self.implementation.name


def candidates(op: FusedOp, target: Target, fakes: Sequence[Any], metas: Sequence[Any]) -> list[Candidate]:
    """What could compute these arguments on `target`: what the rules choose, and what they pass over but could.

    Without CUDA graphs an opaque call costs the host time, which no timing here sees: then the rules' word is taken for
    whether it pays.
    """
    seen = target.cuda_graphs or not target.compiled or target.device.type == "cpu"
    guess, _ = op.select(target, *fakes)
    found = [Candidate(guess)] if guess not in op.implementations else []  # the reference
    for implementation in op.implementations:
        known = seen or not implementation.opaque
        if (implementation.unfit if known else implementation.objection)(target, *fakes) is None:
            found.append(Candidate(implementation))
            configs = implementation.configs(*metas) if implementation.configs is not None else ()
            found += [Candidate(implementation, dict(config)) for config in configs]
    return found


def measure(
    op: FusedOp,
    target: Target,
    metas: tuple[Any, ...],
    found: Sequence[Candidate],
    incumbent: Implementation,
    key: Mapping[str, str],
    inductor: Mapping[str, Any],
) -> Entry:
    """The best of `found` on arguments drawn after `metas`. Raises NotMeasured.

    `incumbent` is what would be used otherwise, and stays unless another is faster by more than the noise.
    """
    device = target.device
    size = sum(_bytes(leaf) for leaf in tree_leaves(metas) if isinstance(leaf, Tensor))
    if size > (limit := LIMIT.get(device.type, LIMIT["cpu"])):
        raise NotMeasured(f"arguments of {size >> 20} MiB are above the {limit >> 20} MiB that are spent on it")
    threads = torch.get_num_threads()
    on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with isolated(device), on:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        sets = [_drawn(op, metas, device) for _ in range(timing.argument_sets(size, device))]
        calls, rejected = _sound(op, target, found, sets[0], inductor)
        if not any(c.implementation.name == incumbent.name and not c.config for c in calls):
            raise NotMeasured(f"{incumbent.name}, which the others would be compared with, failed: {rejected}")
        names = list(calls)
        taken = timing.time_all([calls[name] for name in names], sets, device)
        times = dict(zip(names, _charged(names, taken, op, target, sets), strict=True))
    return best(times, incumbent, key, {c.name: why for c, why in rejected.items()})


def best(
    times: Mapping[Candidate, Timing], incumbent: Implementation, key: Mapping[str, str], rejected: Mapping[str, str]
) -> Entry:
    """The fastest, if it beats what would have been used anyway: the incumbent as it guesses itself."""
    guess = next(c for c in times if c.implementation.name == incumbent.name and not c.config)
    fastest = min(times, key=lambda c: times[c].seconds)
    won = fastest is not guess and times[fastest].beats(times[guess])
    chosen = fastest if won else guess
    noise = times[fastest].spread + times[guess].spread
    note = f"{guess.name} stays: nothing is faster by more than {max(timing.MARGIN, noise):.0%}"
    if won:
        note = f"{fastest.name} takes {times[fastest].seconds / times[guess].seconds:.0%} of the time of {guess.name}"
    microseconds = {c.name: round(t.seconds * 1e6, 3) for c, t in times.items()}
    return Entry(key, chosen.implementation.name, dict(chosen.config or {}), microseconds, rejected, note)


def _drawn(op: FusedOp, metas: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Arguments like `metas`, on `device`."""
    if op.drawn is not None:
        return tuple(tree_map(lambda a: a.to(device) if isinstance(a, Tensor) else a, op.drawn(*metas)))
    return tuple(tree_map(lambda a: _random(a, device) if isinstance(a, Tensor) else a, metas))


def _random(like: Tensor, device: torch.device) -> Tensor:
    """Normal numbers; zeros for integers, which are an index into anything; True."""
    if like.numel() == 0:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    elements = _span(like)
    if like.dtype.is_complex:
        flat = torch.randn(elements, dtype=like.dtype, device=device)
    elif like.dtype.is_floating_point:
        flat = torch.randn(elements, device=device).to(like.dtype)
    else:
        flat = torch.full((elements,), like.dtype == torch.bool, dtype=like.dtype, device=device)
    return flat.as_strided(like.shape, like.stride())


def _span(like: Tensor) -> int:
    """The elements of memory from the first to the last one."""
    pairs = zip(like.shape, like.stride(), strict=True)
    return 1 + sum((n - 1) * s for n, s in pairs) if like.numel() else 0


def _bytes(like: Tensor) -> int:
    return _span(like) * like.element_size()


def _sound(
    op: FusedOp, target: Target, found: Sequence[Candidate], args: tuple[Any, ...], inductor: Mapping[str, Any]
) -> tuple[dict[Candidate, timing.Call], dict[Candidate, str]]:
    """How to call each candidate that computes what the reference does, and why the others are out."""
    eager, exact = op.reference(*args), _exact(op, args)
    calls: dict[Candidate, timing.Call] = {}
    rejected: dict[Candidate, str] = {}
    for candidate in found:
        try:
            call = _callable(candidate, target, args, inductor)
            objection = _difference(call(*args), eager, exact)
        except Exception as error:  # a launch that the device refuses, a kernel that does not compile
            objection = f"{type(error).__name__}: {error}"
        if objection is None:
            calls[candidate] = call
        else:
            rejected[candidate] = objection
            log.warning("fxopt's tuner leaves out %s of %s: %s", candidate.name, op.name, objection)
    return calls, rejected


def _exact(op: FusedOp, args: tuple[Any, ...]) -> Any:
    wide = tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.dtype in _NARROW else a, args)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promote():
            return op.reference(*tree_map(_wide_dtype, wide))
    finally:
        torch.set_default_dtype(before)


def _wide_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _difference(actual: Any, eager: Any, exact: Any) -> str | None:
    """What is wrong with `actual`, or None."""
    for got, wanted, true in zip(tree_leaves(actual), tree_leaves(eager), tree_leaves(exact), strict=True):
        if not isinstance(wanted, Tensor):
            continue
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            return f"gives {got.dtype} {list(got.shape)} for {wanted.dtype} {list(wanted.shape)}"
        own, found = distance(true, wanted), distance(true, got)
        ulp = torch.finfo(wanted.dtype).eps if wanted.dtype.is_floating_point else 0.0
        allowed = 2 * own.error + ULPS * ulp
        if math.isinf(own.error):
            return "the reference itself overflows on the numbers that were drawn"
        if not found.error <= allowed:
            return f"error {found.error:.2g}, allowed {allowed:.2g} ({found.words})"
    return None


def _callable(
    candidate: Candidate, target: Target, args: tuple[Any, ...], inductor: Mapping[str, Any]
) -> Callable[..., Any]:
    """The candidate as it will run on `args`, as a function of arguments like them."""
    implementation, config = candidate.implementation, candidate.config
    run = implementation.configured(config)
    if not target.compiled or (implementation.opaque and target.device.type == "cuda"):
        return run  # in a CUDA graph the launch is all there is of an opaque call
    if implementation.overload is not None:
        overload, keywords = implementation.overload, {"config": spelled(config)} if config else {}
        run = lambda *given: overload(*given, **keywords)  # noqa: E731
    leaves, structure = tree_flatten(args)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def program(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return tree_leaves(run(*tree_unflatten(filled, structure)))

    from torch._inductor.compile_fx import compile_fx

    tensors = [leaves[i] for i in where]
    options = {**inductor, "triton.cudagraphs": False}  # the timer captures one of its own
    compiled: Any = compile_fx(make_fx(program, pre_dispatch=True)(*tensors), tensors, config_patches=options)
    return lambda *given: compiled(*(leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)))


def _charged(
    found: Sequence[Candidate],
    times: Sequence[Timing],
    op: FusedOp,
    target: Target,
    sets: Sequence[tuple[Any, ...]],
) -> list[Timing]:
    """The times, with what opaque calls keep the compiler from added."""
    if not target.compiled or not any(c.implementation.opaque for c in found):
        return list(times)
    results = [leaf for leaf in tree_leaves(op.reference(*sets[0])) if isinstance(leaf, Tensor)]

    def copy(*pairs: tuple[Tensor, Tensor]) -> None:
        for to, source in pairs:
            torch.mul(source, 1, out=to)  # a kernel: `copy_` would be a node for the copy engine, which is slower

    def seconds(kept: Sequence[Tensor]) -> float:
        pairs = [tuple((t.clone(), t.clone()) for t in kept) for _ in sets]
        return timing.time_all([copy], pairs, target.device)[0].seconds

    extra = max(0.0, seconds(results) - seconds([t.flatten()[:1] for t in results]))
    return [
        Timing(t.seconds + extra, t.spread) if c.implementation.opaque else t for c, t in zip(found, times, strict=True)
    ]
