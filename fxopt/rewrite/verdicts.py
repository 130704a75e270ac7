"""Verdicts by signature, so that a rewrite seen before is not checked again: in memory, and on disk across processes.

One small file a verdict, written in one step, named after the signature and repeating it: a file that is truncated,
corrupted or for another signature is as good as none. Only "equal" goes to disk. What failed or couldn't be checked is
checked again by the next process, for the reason may be gone.

A signature says all that a verdict depends on: both programs, the sources of the fusion, of the ops and of the
verification itself, the machine. What it can't say for sure to another process stays in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from fxopt import cachedir
from fxopt.ops import Implementation, Target, find_op
from fxopt.rewrite.fusion import Fusion, Verdict
from fxopt.rewrite.region import Pair, structure
from fxopt.sources import digest

#: of the verification itself, read when it is loaded
_VERSION = digest(sorted(Path(__file__).parent.glob("*.py")))

#: namespaces of ops that change with torch's version only
_TORCH = ("aten", "prims", "prim", "quantized", "quantized_decomposed", "_c10d_functional")

_memory: dict[str, Verdict] = {}


def signature(
    pair: Pair, fusion: Fusion, chosen: Iterable[Implementation], target: Target, setting: tuple[Any, ...]
) -> tuple[str, bool]:
    """What a comparison of the two sides of `pair` is known by, and whether that means the same to other processes."""
    kind = type(fusion)
    name = f"{kind.__module__}.{kind.__qualname__} {kind.source_version or id(kind)}"
    options = repr([(f.name, getattr(fusion, f.name)) for f in fields(fusion)])
    how = [(i.name, i.opaque, i.version) for i in chosen]
    lasting = (
        kind.source_version is not None
        and not re.search(r" at 0x[0-9a-f]+", options)  # an object that only its address tells from others
        and all(map(_is_lasting, pair.nodes))
    )
    return structure(pair, (name, options, how, target.training, setting, _machine(target))), lasting


def _is_lasting(node: Node) -> bool:
    """Whether the op's name says what it computes: torch's does, for one version of it, and so does a fused op's."""
    if node.op != "call_function":
        return True
    op = find_op(node.target)
    if op is not None:
        return bool(op.sources)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in _TORCH
    home = getattr(node.target, "__module__", None) or ""
    return home.split(".")[0] in ("torch", "math", "_operator", "operator", "builtins")


@lru_cache(maxsize=16)
def _machine(target: Target) -> str:
    """What runs the kernels, and what compares them."""
    if target.device.type == "cuda":
        device = torch.cuda.get_device_name(target.device)
    else:
        device = f"{target.device.type} {torch.backends.cpu.get_cpu_capability()}"
    parts = [
        f"torch {torch.__version__} {torch.version.git_version}",
        f"triton {_triton()} {os.environ.get('TRITON_INTERPRET', '')}",
        f"{device} {target.compiled} {_VERSION}",
    ]
    return "; ".join(parts)


def _triton() -> str:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return ""


def lookup(signature: str, *, disk: bool = True) -> Verdict | None:
    """The verdict on an equal rewrite, or None."""
    known = _memory.get(signature)
    if known is None and disk:
        known = _load(signature)
        if known is not None:
            _memory[signature] = known
    return known


def store(signature: str, verdict: Verdict, *, disk: bool = True) -> None:
    """Keep a verdict, on disk too if it is "equal"."""
    _memory[signature] = verdict
    if not disk or verdict.status != "equal":
        return
    folder = cachedir.cachedir("verdicts")
    if folder is not None:
        text = json.dumps({"signature": signature} | asdict(verdict))
        cachedir.write(folder / f"{signature}.json", text.encode())


def clear() -> None:
    """Forget what this process knows; the disk keeps what it has."""
    _memory.clear()


def _load(signature: str) -> Verdict | None:
    folder = cachedir.cachedir("verdicts")
    data = cachedir.read(folder / f"{signature}.json") if folder is not None else None
    if data is None:
        return None
    try:
        found = json.loads(data)
        if found["signature"] != signature or found["status"] != "equal":
            return None
        error = found["error"]
        if error is not None and not math.isfinite(float(error)):
            return None
        return Verdict("equal", str(found["detail"]), None if error is None else float(error))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # not JSON, not text, or not ours
        return None
