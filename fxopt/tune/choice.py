"""Which implementation computes an op at a place in the graph, how it is launched, and why not the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxopt.ops import Config, FusedOp, Implementation, Target
from fxopt.tune import key, store
from fxopt.tune.measure import Candidate, NotMeasured, candidates, measure
from fxopt.tune.session import Session, current

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """An implementation, its configuration (None: as it thinks best), what was passed over and why; `note`: by what."""

    implementation: Implementation
    config: Config | None
    passed_over: tuple[tuple[str, str], ...]
    note: str = ""


def choose(op: FusedOp, target: Target, fakes: Sequence[Any]) -> Chosen:
    """The implementation of `op` for these (fake) arguments on `target`, as the session in force wants it chosen."""
    guess, passed_over = op.select(target, *fakes)
    by_rule = Chosen(guess, None, tuple(passed_over))
    wanted = current()
    if wanted.mode == "off" or target.training:  # gradients would have to be timed too
        return by_rule
    metas = key.concrete(tuple(fakes))
    found = candidates(op, target, fakes, metas)
    if len(found) < 2:
        return by_rule
    entry = _known(op, target, metas, found, guess, wanted)
    if entry is None:
        return by_rule
    chosen = _match(entry, found)
    if chosen is None:
        return by_rule
    losers = []
    for other in op.implementations:
        if other is chosen.implementation:
            continue
        objection = other.unfit(target, *fakes)
        losers.append((other.name, objection if objection is not None else f"measured: {entry.note}"))
    return Chosen(chosen.implementation, chosen.config, tuple(losers), entry.note)


def may_pay(op: FusedOp, *fakes: Any) -> bool:
    """Whether a fusion that makes this call may gain by it: an opaque implementation is measured or believed to pay.

    With tune="full" also where nothing was measured yet and there is such an implementation: lowering will measure it.
    `fakes` are the call's arguments as fake tensors and numbers. To be asked while a graph is being compiled.
    """
    wanted = current()
    target = replace(wanted.target, device=next(f.device for f in tree_leaves(fakes) if isinstance(f, Tensor)))
    args = op.bind(*fakes)
    if target.training or not any(i.opaque and i.unfit(target, *args) is None for i in op.implementations):
        return False
    believed = op.select(target, *args)[0].opaque
    if wanted.mode == "off":
        return believed
    metas = key.concrete(args)
    parts = key.describe(op, target, metas, wanted.inductor)
    entry = store.load(key.signature(parts), key.portable(parts))
    if entry is None and believed:
        return True
    found = candidates(op, target, args, metas)
    if entry is None:
        return wanted.objection() is None and any(candidate.implementation.opaque for candidate in found)
    chosen = _match(entry, found)
    return chosen is not None and chosen.implementation.opaque


def _known(
    op: FusedOp,
    target: Target,
    metas: tuple[Any, ...],
    found: Sequence[Candidate],
    guess: Implementation,
    wanted: Session,
) -> store.Entry | None:
    """What is stored, or else what a measurement gives, where the session allows one."""
    parts = key.describe(op, target, metas, wanted.inductor)
    signature = key.signature(parts)
    entry = store.load(signature, key.portable(parts))
    if entry is not None or wanted.objection() is not None:
        return entry
    try:
        entry = measure(op, target, metas, found, guess, parts, wanted.inductor)
    except NotMeasured as reason:
        log.info("fxopt's tuner did not measure %s: %s", op.name, reason)
        return None
    except Exception as error:  # nothing that goes wrong in a measurement may cost the compilation
        log.warning("fxopt's tuner could not measure %s: %s: %s", op.name, type(error).__name__, error, exc_info=True)
        return None
    store.save(signature, entry)
    return entry


def _match(entry: store.Entry, found: Sequence[Candidate]) -> Candidate | None:
    """The candidate that an entry names; None where it is none here (another shape of the same bucket)."""
    for candidate in found:
        if candidate.implementation.name == entry.implementation and dict(candidate.config or {}) == dict(entry.config):
            return candidate
    return None
