"""Random programs: a small data structure, and how it becomes Python source.

A `Case` is nothing but numbers: sizes, input specifications, steps. It is turned into source line by line, and each
line is run on real tensors at once; a line that raises is left out. So every case is a valid program, any part of it
may be dropped or made smaller (which is what shrinking does), and what failed can be printed and run elsewhere.

Numbers are consumed by `Choices`; number 0 always stands for the plainest choice, so shrinking leads there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: the names of dtypes in a program, so that the same source can be run in float64
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "boolean": torch.bool,
}
EXACT = {**DTYPES, "f32": torch.float64, "bf16": torch.float64, "f16": torch.float64}

#: a program whose values grow beyond this is cut short
MOST_ELEMENTS = 20_000


class Choices:
    """Numbers (0 to 63) drawn beforehand, handed out one at a time; zeros when they run out.

    With a `rate`, so many of the choices are other than the plain one: patterns with a single fault are the best tests,
    and all of their many choices being even would make none.
    """

    def __init__(self, numbers: Sequence[int], rate: float | None = None) -> None:
        self.numbers = list(numbers)
        self.rate = rate

    def _next(self) -> int:
        return self.numbers.pop(0) if self.numbers else 0

    def upto(self, count: int) -> int:
        """A number below `count`."""
        number = self._next()
        if self.rate is None or count < 2:
            return number % max(count, 1)
        return 0 if number < 64 * (1 - self.rate) else 1 + number % (count - 1)

    def of(self, options: Sequence[Any]) -> Any:
        """One of `options`; the first where the numbers shrink to nothing."""
        return options[self.upto(len(options))]

    def any(self, options: Sequence[Any]) -> Any:
        """One of `options`, all alike."""
        return options[self._next() % len(options)]

    def seldom(self, one_in: int = 4) -> bool:
        """True once in `one_in`; with a rate, so often."""
        return self.upto(one_in if self.rate is None else 2) == (one_in - 1 if self.rate is None else 1)


@dataclass(frozen=True)
class InputSpec:
    """One input: which of the case's sizes are its dimensions, its dtype, how it lies in memory."""

    dims: tuple[int, ...] = (0,)
    dtype: str = "f32"
    memory: int = 0  # see `expression`
    grad: bool = True
    alias: int | None = None  # a view of this other input, or the same tensor


@dataclass(frozen=True)
class Case:
    """A whole test case: see `write` for how it is read."""

    sizes: tuple[int, ...] = (2, 3, 4, 8)
    others: tuple[int, ...] = (3, 4, 5, 6)  # the sizes of a second call
    inputs: tuple[InputSpec, ...] = (InputSpec(),)
    steps: tuple[tuple[int, ...], ...] = ()
    returns: tuple[int, ...] = (0,)
    mode: str = "no_grad"  # "no_grad", "inference" or "train"
    dynamic: str = "static"  # "static", "dynamic" (asked for), "marked" (dimensions marked), "automatic" (2nd call)
    container: str = "tuple"


@dataclass
class Program:
    """A case as source, with all that is needed to run it."""

    case: Case
    source: str
    inputs: list[InputSpec]
    names: list[str]
    exact: bool  # a float64 run says how large the error may be; not where bits are reinterpreted

    def function(self, dtypes: dict[str, torch.dtype] = DTYPES) -> Any:
        """The program as a function, in the dtypes that the names are to stand for."""
        scope: dict[str, Any] = {"torch": torch, "F": F, **dtypes}
        exec(compile(self.source, "<fuzz>", "exec"), scope)
        return scope["program"]

    def make_inputs(self, sizes: Sequence[int], seed: int, *, wide: bool = False) -> list[Tensor]:
        """Fresh inputs; in float64 (the same values) if `wide`."""
        made: list[Tensor] = []
        g = torch.Generator().manual_seed(seed)
        for spec in self.inputs:
            if spec.alias is not None and made:
                made.append(_alias(made[spec.alias % len(made)], spec.memory))
                continue
            value = eval(expression(spec, sizes), {"torch": torch, "g": g, **DTYPES})
            if wide and value.is_floating_point():
                value = _retyped(value, torch.float64)
            wants = self.case.mode == "train" and spec.grad and value.is_floating_point() and not self._shared(spec)
            made.append(value.requires_grad_() if wants else value)
        return made

    def _shared(self, spec: InputSpec) -> bool:
        """Inputs that others are views of take no gradients: they would be no leaves."""
        return any(s.alias is not None for s in self.inputs)

    def snippet(self) -> str:
        """A script that shows what the program does under eager and under fxopt."""
        lines = ["", self.source, "", "def inputs(sizes):", "    g = torch.Generator().manual_seed(1)"]
        for name, spec in zip(self.names, self.inputs, strict=True):
            if spec.alias is not None and name != self.names[0]:
                base = self.names[spec.alias % self.names.index(name)]
                lines.append(f"    {name} = {_alias_text(base, spec.memory)}")
            else:
                wants = self.case.mode == "train" and spec.grad and not self._shared(spec) and spec.dtype in FLOATS
                text = expression(spec, None) + (".requires_grad_()" if wants else "")
                lines.append(f"    {name} = {text}")
        lines += [f"    return [{', '.join(self.names)}]", ""]
        manager = {"no_grad": "torch.no_grad()", "inference": "torch.inference_mode()", "train": "torch.enable_grad()"}
        dynamic = {"static": "False", "dynamic": "True"}.get(self.case.dynamic, "None")
        lines += [f"with {manager[self.case.mode]}:"]
        lines += [f"    compiled = torch.compile(program, backend='fxopt', dynamic={dynamic})  # {self.case.dynamic}"]
        second = f", {self.case.others}" if self.case.dynamic != "static" else ""
        lines += [
            f"    for sizes in ({self.case.sizes}{second},):" if second else f"    for sizes in [{self.case.sizes}]:"
        ]
        lines += ["        print(program(*inputs(sizes)))", "        print(compiled(*inputs(sizes)))"]
        text = "\n".join(lines)
        named = [f"{name} = {dtype!s}" for name, dtype in DTYPES.items() if name in text]
        return "\n".join(["import torch, torch.nn.functional as F", "import fxopt", "", *named, text])


FLOATS = ("f32", "bf16", "f16", "f64")


def expression(spec: InputSpec, sizes: Sequence[int] | None) -> str:
    """The text that makes an input: values by dtype, memory by kind. Without `sizes`, in terms of the name `sizes`."""
    shape = [str(sizes[d]) if sizes is not None else f"sizes[{d}]" for d in spec.dims]
    memory = spec.memory % 6
    after = ""
    if memory == 1 and len(shape) >= 2:  # transposed
        shape[-1], shape[-2], after = shape[-2], shape[-1], ".transpose(-1, -2)"
    elif memory == 2 and shape:  # every other element
        shape[-1], after = f"2 * {shape[-1]}", "[..., ::2]"
    elif memory == 3 and shape:  # a part of something longer
        shape[0], after = f"{shape[0]} + 2", "[2:]"
    elif memory == 4 and shape:  # one row seen many times
        shape[0], after = "1", f".expand({shape[0]}, {', '.join(['-1'] * (len(shape) - 1))})"
    elif memory == 5 and len(shape) >= 3:  # heads before tokens
        shape[-2], shape[-3], after = shape[-3], shape[-2], ".transpose(-2, -3)"
    text = f"[{', '.join(shape)}]"
    if spec.dtype in FLOATS:
        return f"torch.randn({text}, generator=g).to({spec.dtype}){after}"
    if spec.dtype == "boolean":
        return f"(torch.rand({text}, generator=g) > 0.4){after}"
    low, high = (0, 256) if spec.dtype == "u8" else (-8, 8)
    return f"torch.randint({low}, {high}, {text}, generator=g, dtype={spec.dtype}){after}"


def _alias(base: Tensor, kind: int) -> Tensor:
    with contextlib.suppress(RuntimeError, IndexError):
        return eval(_alias_text("base", kind), {"base": base})
    return base


def _alias_text(base: str, kind: int) -> str:
    return [
        base,
        f"{base}.detach()",
        f"{base}[1:]",
        f"{base}.transpose(0, -1)",
        f"{base}[..., ::2]",
        f"{base}.view(-1)",
    ][kind % 6]


def _retyped(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in another dtype with the same strides, stride 0 included."""
    wide = torch.empty(0, dtype=dtype).set_(
        value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        .to(dtype)
        .untyped_storage(),
        value.storage_offset(),
        value.size(),
        value.stride(),
    )
    return wide


class Writer:
    """Writes a program line by line, running each on real tensors to know that it is valid."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.program = Program(case, "", list(case.inputs), [f"x{i}" for i in range(len(case.inputs))], True)
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {"torch": torch, "F": F, **DTYPES}
        self.scope.update(zip(self.program.names, self.program.make_inputs(case.sizes, 1), strict=True))
        self.names = list(self.program.names)
        self.rough: set[str] = set()  # values that are rounded: no discontinuous op may read them
        self.count = 0
        self.pending: tuple[int, str] | None = None  # (after how many more lines, a statement to slip in)

    def input(self, dims: Sequence[int], dtype: str = "f32", memory: int = 0, grad: bool = True) -> str:
        """A further input of the program."""
        self.program.inputs.append(InputSpec(tuple(dims), dtype, memory, grad))
        name = f"x{len(self.program.inputs) - 1}"
        self.program.names.append(name)
        made = self.program.make_inputs(self.case.sizes, 1)
        self.scope[name] = made[-1]
        self.names.append(name)
        return name

    def let(self, text: str) -> str | None:
        """A line `v = text`; the name of v, or None where that is no valid line."""
        name = f"v{self.count}"
        try:
            value = eval(text, self.scope)
        except Exception:
            return None
        if not isinstance(value, Tensor) or value.numel() > MOST_ELEMENTS or value.dim() > 6:
            return None
        self.count += 1
        self.scope[name] = value
        self.lines.append(f"{name} = {text}")
        self.names.append(name)
        self._slip_in()
        return name

    def do(self, text: str) -> bool:
        """A statement; False where it is no valid one."""
        try:
            exec(text, self.scope)
        except Exception:
            return False
        self.lines.append(text)
        return True

    def _slip_in(self) -> None:
        if self.pending is not None:
            left, statement = self.pending
            self.pending = (left - 1, statement) if left else None
            if not left:
                self.do(statement)

    def size(self, name: str, dim: int) -> str:
        """A size of a value as text: a literal where shapes are static, an expression where they may change."""
        value = self.scope[name]
        return str(value.shape[dim]) if self.case.dynamic == "static" else f"{name}.shape[{dim}]"

    def tensor(self, name: str) -> Tensor:
        """The value of a name in this run."""
        return self.scope[name]

    def finish(self, returned: Sequence[str]) -> Program:
        """The program that returns the values of these names."""
        inside = ", ".join(returned)
        result = {
            "tuple": f"({inside},)",
            "list": f"[{inside}]",
            "one": returned[0],
            "dict": "{" + ", ".join(f"'r{i}': {n}" for i, n in enumerate(returned)) + "}",
        }[self.case.container]
        body = [*self.lines, f"return {result}"]
        self.program.source = f"def program({', '.join(self.program.names)}):\n    " + "\n    ".join(body)
        return self.program
