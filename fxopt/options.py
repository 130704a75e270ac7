"""Every option of the backend, validated where it is given."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
VERIFY = ("off", "meta", "numeric", "strict")
TUNE = ("off", "auto", "full")
OUTLINE = ("off", "auto", "always")


class OptionError(ValueError):
    """An option's name or value is not one that fxopt knows; the message says which ones it does."""


@dataclass(frozen=True)
class Options:
    """Options of `torch.compile(model, backend="fxopt", options={...})`.

    Attributes:
        fusions: only these fusions run, by name; None: all that are registered
        disable: these fusions don't run
        verify: "off": only shapes, dtypes and devices are compared, which always are; "meta": aliasing too;
            "numeric": numbers too, within a budget; "strict": no budget, and what could not be checked is undone
        tune: "auto": opaque kernels are used where they were measured to pay, here before or in what ships with fxopt;
            "full": what was not measured before is measured now (seconds an op), verified first, and remembered;
            "off": only implementations that Inductor sees into, so that nothing depends on a measurement
        outline: "auto": layers that repeat are compiled once, in inference, where that costs nothing at run time: on
            the CPU, and on a GPU in CUDA graphs, unless they write caches; "always": wherever torch can, in training
            too, where Inductor then reuses no memory; "off": every layer is compiled for itself
        mode: Inductor's mode (torch.compile refuses mode= and options= together, so it can be given here)
        inductor: options passed on to Inductor
    """

    fusions: tuple[str, ...] | None = None
    disable: tuple[str, ...] = ()
    verify: str = "numeric"
    tune: str = "auto"
    outline: str = "auto"
    mode: str = "default"
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, mode: str | None, options: Mapping[str, Any] | None, fusions: Iterable[str]) -> Options:
        """Options from what torch.compile was given; `fusions` are the registered names.

        Raises OptionError for an unknown key, value, mode or fusion name, with the nearest known one.
        """
        given = dict(options or {})
        keys = [f.name for f in dataclasses.fields(cls)]
        for key in given:
            if key not in keys:
                raise OptionError(f"unknown option {key!r}{_nearest(key, keys)}")
        if mode is not None:
            given["mode"] = mode
        known = list(fusions)
        for key in ("fusions", "disable"):
            if given.get(key) is not None:
                given[key] = _names(key, given[key], known)
        for key, allowed in (("verify", VERIFY), ("tune", TUNE), ("outline", OUTLINE), ("mode", MODES)):
            if key in given and given[key] not in allowed:
                raise OptionError(f"{key}={given[key]!r} is not known{_nearest(str(given[key]), allowed)}")
        if not isinstance(given.get("inductor", {}), Mapping):
            raise OptionError("inductor= takes a dict of Inductor's options")
        return cls(**given)


def _names(key: str, given: Any, known: list[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise OptionError(f"{key} names an unknown fusion {name!r}{_nearest(str(name), known)}")
    return names


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known)})"
