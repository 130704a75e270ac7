"""Which fusions exist: entry points of the group `fxopt.passes`, the bundled ones among them, and what was registered.

An entry point names a `Fusion` subclass, a Fusion, or a list of them. One that can't be imported is skipped with a
warning that names its distribution; it never takes the backend down.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fxopt.rewrite.fusion import Fusion

log = logging.getLogger(__name__)

GROUP = "fxopt.passes"


class PluginWarning(UserWarning):
    """A plugin was skipped; the message says which, of what distribution, and why."""


@dataclass(frozen=True)
class Registered:
    """A fusion and the distribution that it came from ("-" if it was registered by the running program)."""

    fusion: Fusion
    distribution: str


_added: list[Registered] = []


def register(fusion: Fusion) -> Fusion:
    """Add a fusion for this process (notebooks, tests). Replaces one of the same name that was registered before.

    One of an installed package that has this name steps back until `unregister`. Returns the fusion. What was compiled
    before stays as it is. Raises TypeError for anything but a Fusion.
    """
    if not isinstance(fusion, Fusion):
        raise TypeError(f"register() takes a Fusion, not {type(fusion).__name__}")
    unregister(fusion.name)
    _added.append(Registered(fusion, "-"))
    return fusion


def unregister(name: str) -> None:
    """Remove a fusion that `register` added; nothing happens if there is none of that name."""
    _added[:] = [r for r in _added if r.fusion.name != name]


def registered() -> tuple[Registered, ...]:
    """All fusions, bundled ones first, in the order of their distributions' names and their own."""
    added = {r.fusion.name for r in _added}
    return tuple(r for r in _installed() if r.fusion.name not in added) + tuple(_added)


def fusions() -> dict[str, Fusion]:
    """Name -> fusion, of all that are registered.

    Those of installed packages, the bundled ones first, then those of `register`. A package that can't be imported is
    left out, with a PluginWarning.
    """
    return {r.fusion.name: r.fusion for r in registered()}


def reload() -> None:
    """Look at the installed entry points again (after installing a plugin into a running process)."""
    _installed.cache_clear()


@functools.cache
def _installed() -> tuple[Registered, ...]:
    found: dict[str, Registered] = {}
    points = {(p.name, p.value): p for p in entry_points(group=GROUP)}.values()
    for point in sorted(points, key=lambda p: (_distribution(p) != "fxopt", _distribution(p), p.name)):
        for fusion in _load(point):
            if fusion.name in found:
                _warn(point, f"a fusion named {fusion.name!r} is there already, from {found[fusion.name].distribution}")
            else:
                found[fusion.name] = Registered(fusion, _distribution(point))
    return tuple(found.values())


def _load(point: EntryPoint) -> list[Fusion]:
    try:
        loaded: Any = point.load()
        items = list(loaded) if isinstance(loaded, Iterable) and not isinstance(loaded, type) else [loaded]
        made = [item() if isinstance(item, type) else item for item in items]
        for fusion in made:
            _ = getattr(fusion, "name", None)  # may be a property of its own, and raise
    except Exception as error:  # a plugin's import can raise anything
        _warn(point, f"{type(error).__name__}: {error}")
        return []
    wrong = [m for m in made if not isinstance(m, Fusion)]
    if wrong:
        _warn(point, f"it names a {type(wrong[0]).__name__}, not a Fusion")
    return [m for m in made if isinstance(m, Fusion)]


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "?"


def _warn(point: EntryPoint, reason: str) -> None:
    message = f"skipped the fxopt plugin {point.name!r} of distribution {_distribution(point)!r}: {reason}"
    log.warning(message)
    warnings.warn(message, PluginWarning, stacklevel=2)
