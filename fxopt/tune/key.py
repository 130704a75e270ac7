"""What a measurement is remembered under: the op's code, the machine, the software, and the arguments by kind.

Sizes up to 16 are exact, larger ones are rounded up to three binary digits, with whether 16 divides them: 4096 and
14336 stand for themselves, 1000 for all from 897 to 1024 that 16 doesn't divide. Floating-point numbers (an eps, a
scale) change no choice and are left out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fxopt.graph.symbols import hint, is_static
from fxopt.ops import FusedOp, Target

#: what is a matter of running, not of speed
_NOT_KEYED = ("triton.cudagraphs",)


def concrete(args: Any) -> Any:
    """The arguments with an example number for every symbolic size, tensors on the meta device."""
    return tree_map(_concrete, args)


def _concrete(value: Any) -> Any:
    if isinstance(value, Tensor):
        shape, stride = ([int(hint(n)) for n in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")
    return value if is_static(value) else hint(value)


def describe(op: FusedOp, target: Target, args: Sequence[Any], inductor: Mapping[str, Any]) -> dict[str, str]:
    """The key in readable parts. `args` are `concrete`."""
    code = [op.code, *(f"{i.name} {i.version}" for i in op.implementations)]
    graphs = ", CUDA graphs" if target.cuda_graphs and target.device.type == "cuda" else ""
    config = sorted((name, repr(value)) for name, value in inductor.items() if name not in _NOT_KEYED)
    return {
        "op": op.name,
        "code": _hash(code),
        "device": device_name(target.device),
        "software": software(target.device.type),
        "compiled": f"inductor {_hash(config) if config else 'as it is'}{graphs}" if target.compiled else "op by op",
        "arguments": ", ".join(map(_kind, args)),
    }


def signature(parts: Mapping[str, str]) -> str:
    """A hash of the key's parts."""
    return _hash(sorted(parts.items()))


def portable(parts: Mapping[str, str]) -> str:
    """A hash of the parts that a shipped table goes by: whatever the versions of the op's code and of the software.

    They are what the times depend on, not what is right: a configuration that is no candidate any more is ignored.
    """
    return _hash(sorted((name, part) for name, part in parts.items() if name not in ("code", "software")))


def bucket(size: int) -> str:
    """The sizes among which `size` counts as the same."""
    if size <= 16:
        return str(size)
    unit = 1 << (size.bit_length() - 3)
    return f"{-(-size // unit) * unit}{'' if size % 16 == 0 else '~'}"


def device_name(device: torch.device) -> str:
    """The device by name and capability: "NVIDIA H200 sm_90", or the processor with its vector units and threads."""
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    if device.type == "cpu":
        return f"{_processor()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return device.type


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def software(device_type: str) -> str:
    """The versions that a timing holds for; on a GPU that of Triton too, and which ptxas is set."""
    parts = [f"torch {torch.__version__}"]
    if device_type == "cuda":
        try:
            import triton

            parts.append(f"triton {triton.__version__}")
        except ImportError:
            parts.append("no triton")
        parts.append(f"cuda {torch.version.cuda}")
        if ptxas := os.environ.get("TRITON_PTXAS_PATH"):
            parts.append(f"ptxas {ptxas}")
    return ", ".join(parts)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{'x'.join(map(bucket, value.shape))}]{_layout(value)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_kind, value))})"
    return "float" if isinstance(value, float) else repr(value)


def _layout(value: Tensor) -> str:
    """Nothing where contiguous, else the dimensions from the farthest apart to the nearest: "@10", a gap as "*"."""
    if value.is_contiguous():
        return ""
    dims = sorted(range(value.dim()), key=lambda d: (-value.stride()[d], d))
    words: list[str] = []
    dense = 1
    for d in reversed(dims):
        stride = value.stride()[d]
        words.append(f"{d}" if stride == dense or value.shape[d] == 1 else f"{d}*" if stride else f"{d}=")
        dense = max(stride, 1) * value.shape[d]
    return "@" + "".join(reversed(words))


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
