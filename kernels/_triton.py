"""What the Triton kernels share: whether Triton can run here, strides of rows, and the registry of compile examples.

Kernels are declared with `jit` from this module, so that a kernel file imports where Triton is not installed:

    from fxopt.kernels._triton import CompileExample, jit, tl

    @jit
    def _kernel(x, y, n, BLOCK: tl.constexpr): ...

A file that declares kernels also exposes `COMPILE_EXAMPLES`, a tuple of `CompileExample`: for every kernel at least one
typical specialisation. tests/kernels/test_compile_targets.py collects them from all of `fxopt.kernels` and compiles
each for sm_80, sm_90 and sm_100, which takes no GPU:

    COMPILE_EXAMPLES = (
        CompileExample("copy, bf16", _kernel, {"x": "*bf16", "y": "*bf16", "n": "i32"}, {"BLOCK": 1024}, num_warps=4),
    )
"""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fxopt.ops import Target


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:  # CPU-only PyTorch, and platforms other than Linux
        return None


triton: Any = _optional("triton")
tl: Any = _optional("triton.language")


@dataclass(frozen=True)
class CompileExample:
    """One specialisation of a kernel to compile for every supported architecture without a GPU.

    `signature` gives the Triton type of every run-time argument ("*bf16" a pointer, "i32", "fp32"), `constexprs` the
    values of all the others. Pointers are taken to be 16-byte aligned; "i32:16" is an integer divisible by 16, which
    strides mostly are and without which loads are not vectorised. `max_spills` is the most 4-byte registers that a
    thread may spill, `capability` the oldest architecture that has the instructions used (90: sm_90).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_spills: int = 32
    capability: int = 80


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is missing (it is then never launched: see `needs_gpu`)."""
    return triton.jit(fn) if triton is not None else fn


@jit
def after_launch(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a kernel begins with that may be launched before its predecessor is done (`dependent_launch`).

    Before it nothing may be read or written: when it returns, all that came before in the stream is done. Only then may
    the next kernel be launched likewise (PDL = 2). Inductor's own kernels (`triton.enable_pdl`) rely on that order:
    what they take from further back than their predecessor they read without waiting.
    """
    if PDL != 0:
        tl.extra.cuda.gdc_wait()
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()


def dependent_launch(x: Tensor, programs: int, resident: int) -> dict[str, Any]:
    """Arguments of a kernel's launch: programmatic dependent launch (PDL) where the device of `x` has it, sm_90 on.

    The next kernel is let in early only where all `programs` run at once, `resident` on each multiprocessor: behind the
    last of several waves its programs would gather on those multiprocessors that are done first.
    """
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0):
        return {"PDL": 0}
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return {"PDL": 2 if programs <= resident * multiprocessors else 1, "launch_pdl": True}


@lru_cache
def capability(device: torch.device) -> int:
    """The compute capability of a device, 90 for 9.0; where there is none to be asked, of an H100."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return 10 * major + minor


@lru_cache
def l2_cache(device: torch.device) -> int:
    """Bytes of the L2 cache of a device; where there is none to be asked, of an H100."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 << 20


def needs_gpu(target: Target) -> str | None:
    """Why a Triton kernel can't run on `target`, in words, or None."""
    if triton is None:
        return "Triton is not installed"
    if target.device.type != "cuda":
        return f"a Triton kernel needs a CUDA device, not {target.device.type}"
    if target.training:
        return "the Triton kernel has no backward; gradients are needed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(target.device) < (8, 0):
        return "the Triton kernel needs compute capability 8.0 or later"
    return None


def inductor_fuses(target: Target, *args: object) -> str | None:
    """Why an opaque norm or elementwise kernel is not believed to pay on `target`: the one place for this policy.

    Under the compiler such an op is worth more decomposed: Inductor fuses it with what stands before and after it,
    which an opaque kernel would read and write once more. Op by op the kernel replaces 2 to 8 launches by 1. For `pays`
    of an implementation: the tuner may find out better.
    """
    return "under the compiler Inductor fuses the decomposed form with its neighbours" if target.compiled else None


def norm_objection(x: Tensor, *others: Tensor) -> str | None:
    """Why the norm kernels can't serve these tensors, or None."""
    for t in (x, *others):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"the Triton kernel computes in float32, which {t.dtype} does not fit"
    if not all(_in_order(t) for t in (x, *others)):
        return "the Triton kernel writes rows in order, and those of its input are permuted in memory"
    return None


def norm_blocks(columns: int) -> tuple[int, int, int]:
    """(columns a step, rows a program, warps) for a row-wise kernel: about 2048 elements and 128 threads or more."""
    block = min(next_power_of_2(columns), 8192)
    rows = max(1, min(16, 2048 // block))
    return block, rows, max(4, min(16, block * rows // 512))


def triton_dtype(dtype: torch.dtype) -> Any:
    """The Triton element type of a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def _in_order(x: Tensor) -> bool:
    """Whether pointwise results of `x` are contiguous: no dimension is permuted or expanded in memory."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]
    return all(a >= b > 0 for a, b in itertools.pairwise(strides))


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n below 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` [..., n] as rows that a kernel can address: (x or a copy, inner, outer stride, inner stride).

    Row r begins at element (r // inner) * outer_stride + (r % inner) * inner_stride; the last dimension is dense. Only
    an `x` whose leading dimensions don't fold into two, or whose last dimension is strided, is copied.
    """
    folded = _fold_rows(x)
    if folded is None:
        x = x.contiguous()
        folded = _fold_rows(x)
        assert folded is not None
    return (x, *folded)


def _fold_rows(x: Tensor) -> tuple[int, int, int] | None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, merged where one continues the other
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    inner_size, inner_stride = dims.pop() if dims else (1, 0)
    return inner_size, dims[0][1] if dims else 0, inner_stride


def folded(rows: int, *inner: int) -> bool:
    """Whether one of several tensors of `rows` rows (its `inner` from `as_rows`) is more than rows at one distance."""
    return any(n < rows for n in inner)


def compile_examples() -> Iterator[tuple[str, CompileExample]]:
    """(module, example) for every example of every file of `fxopt.kernels`."""
    folder = Path(__file__).parent
    for module in sorted(info.name for info in pkgutil.iter_modules([str(folder)])):
        for example in getattr(import_module(f"fxopt.kernels.{module}"), "COMPILE_EXAMPLES", ()):
            yield module, example


@jit
def row_start(row, inner, outer, step, FOLDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where rows begin (see `as_rows`). Without FOLDED they lie at one distance: 64-bit divisions take their time."""
    if FOLDED:
        start = (row // inner) * outer + (row % inner) * step
    else:
        start = row * step
    return start


@jit
def summed(x, residual, total, live, HAS_RESIDUAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, or x + residual rounded to the sum's dtype, in float32; 0 outside of the row."""
    wide = tl.load(x, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual, mask=live, other=0.0).to(tl.float32)
        wide = wide.to(total.dtype.element_ty).to(tl.float32)
    return wide
