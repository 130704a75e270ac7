"""A function as one file: its source and that of what it needs from the modules beside its own; the rest is imported.

Names are found in the syntax tree (annotations don't count) and looked up where the function was defined. `helper.f`,
of a module beside, is written `f`; `op.reference` becomes a function of its own. What is needed comes first.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from fxopt.ops import FusedOp


class Unwritable(Exception):
    """The function can't be told as one file, and why."""


class Collector:
    """Sources and imports of functions, each name once."""

    def __init__(self, home: str) -> None:
        """Modules of the package that `home` is in are written out; others are imported."""
        self.package = home.rpartition(".")[0] or home
        self.imports: dict[str, str] = {}  # name -> statement
        self.parts: dict[str, str] = {}  # name -> source
        self._values: dict[str, Any] = {}

    def add(self, fn: Callable[..., Any], name: str) -> None:
        """Write `fn`, without decorators and under `name`, and what it needs. Raises Unwritable."""
        self._claim(name, fn)
        self.parts[name] = ""  # it comes after what it needs, and may call itself
        text = self._with_needs(fn, decorators=False)
        del self.parts[name]
        self.parts[name] = re.sub(r"\bdef \w+\(", f"def {name}(", text, count=1)

    def text(self) -> str:
        """Imports and sources, in order."""
        imports = sorted(set(self.imports.values()), key=lambda line: (line.startswith("from"), line))
        gap = {True: "\n", False: "\n\n\n"}
        made, before = "\n".join(imports), False
        for part in self.parts.values():
            constant = "\n" not in part
            made += (gap[constant and before] if made else "") + part
            before = constant
        return made

    def _with_needs(self, fn: Any, decorators: bool = True) -> str:
        """The source of `fn`, once everything that it names is written or imported."""
        try:
            text = textwrap.dedent(inspect.getsource(fn))
            tree = ast.parse(text)
        except (OSError, TypeError, SyntaxError) as error:
            raise Unwritable(f"the source of {fn!r} can't be read: {error}") from None
        (top,) = tree.body
        if not isinstance(top, (ast.FunctionDef, ast.ClassDef)):
            raise Unwritable(f"{fn!r} is not a function with a def of its own")
        if not decorators:
            text = "\n".join(text.splitlines()[top.lineno - 1 :])
            top.decorator_list = []
        scope: Mapping[str, Any] = getattr(fn, "__globals__", None) or vars(sys.modules[fn.__module__])
        for base, attribute in _names(top):
            value = scope.get(base, _MISSING)
            if attribute is not None and isinstance(value, FusedOp) and attribute == "reference":
                name = f"{base}_reference"
                if name not in self.parts:
                    self.add(value.reference, name)
                text = re.sub(rf"\b{base}\.reference\b", name, text)
            elif attribute is not None and isinstance(value, ModuleType) and self._is_beside(value.__name__):
                name = self._need(attribute, vars(value), value.__name__)
                text = re.sub(rf"\b{base}\.{attribute}\b", name, text)
            elif value is not _MISSING:
                name = self._need(base, scope, fn.__module__)
                text = _renamed(text, base, name)
            elif not hasattr(builtins, base) and not _is_local(base, top):
                raise Unwritable(f"{base}, which {top.name} uses, is not known in {fn.__module__}")
        return re.sub(r"^@jit$", "@triton.jit", text.strip(), flags=re.MULTILINE)

    def _need(self, name: str, scope: Mapping[str, Any], home: str) -> str:
        """Write or import what `name` means there; the name that it has in this file."""
        value = scope[name]
        if getattr(value, "__name__", "") == "jit" and getattr(value, "__module__", "").endswith("kernels._triton"):
            self._claim("triton", sys.modules.get("triton"))
            self.imports["triton"] = "import triton"
            return name
        original, name = name, self._free(name, value, home)
        if not self._claim(name, value):
            return name
        fn = getattr(value, "fn", value)  # of a Triton kernel
        where = getattr(fn, "__module__", None)
        if isinstance(value, ModuleType):
            same = value.__name__ == name
            self.imports[name] = f"import {value.__name__}" if same else f"import {value.__name__} as {name}"
        elif isinstance(value, FusedOp):
            self.imports[name] = f"from {value.reference.__module__} import {name}"
        elif (inspect.isfunction(fn) or inspect.isclass(fn)) and where and self._is_beside(where):
            text = self._with_needs(fn)
            self.parts[name] = re.sub(rf"^(def|class) {original}\b", rf"\1 {name}", text, count=1, flags=re.MULTILINE)
        elif (inspect.isfunction(fn) or inspect.isclass(fn) or inspect.isbuiltin(fn)) and where:
            self.imports[name] = f"from {where} import {fn.__name__}" + (f" as {name}" if fn.__name__ != name else "")
        elif type(value).__name__ == "constexpr" and _is_literal(value.value):
            self._need("tl", vars(sys.modules[home]), home)
            self.parts[name] = f"{name} = tl.constexpr({value.value!r})"
        elif _is_literal(value):
            self.parts[name] = f"{name} = {value!r}"
            if "torch." in repr(value):
                self.imports["torch"] = "import torch"
        else:
            self.imports[name] = f"from {home} import {original}" + (f" as {name}" if original != name else "")
        return name

    def _free(self, name: str, value: Any, home: str) -> str:
        """`name`, or where it means something else already, with its module's name before it."""
        known = self._values.get(name, _MISSING)
        taken = known is not _MISSING and known is not value
        if not taken or (_is_literal(value) and _is_literal(known) and known == value):
            return name
        return f"{home.rpartition('.')[2].strip('_')}_{name.strip('_')}"

    def _claim(self, name: str, value: Any) -> bool:
        """Whether `name` is new here. Raises Unwritable where it means something else already."""
        if name not in self._values:
            self._values[name] = value
            return True
        known = self._values[name]
        if known is not value and not (_is_literal(value) and _is_literal(known) and known == value):
            raise Unwritable(f"{name} means two things in the modules that are needed")
        return False

    def _is_beside(self, module: str) -> bool:
        return module == self.package or module.rpartition(".")[0] == self.package


_MISSING = object()


def _renamed(text: str, name: str, new: str) -> str:
    """The source with a global called otherwise; attributes and keywords of that name stay."""
    return text if name == new else re.sub(rf"(?<![\w.]){name}\b(?!\s*=[^=])", new, text)


def _names(top: ast.AST) -> list[tuple[str, str | None]]:
    """(name, attribute or None) of what is read in a definition, annotations left out, in order."""
    found: dict[tuple[str, str | None], None] = {}

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found[node.value.id, node.attr] = None
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found[node.id, None] = None
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    walk(child)

    walk(top)
    local = {name for name, _ in found if _is_local(name, top)}
    return [pair for pair in found if pair[0] not in local]


def _is_local(name: str, top: ast.AST) -> bool:
    """Whether `name` is a parameter or bound somewhere inside."""
    for node in ast.walk(top):
        if isinstance(node, ast.arg) and node.arg == name:
            return True
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return True
        if node is not top and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return True
    return getattr(top, "name", None) == name


def _is_literal(value: Any) -> bool:
    """Whether `repr` says all of it."""
    import torch

    if isinstance(value, (tuple, list, frozenset, set)):
        return all(map(_is_literal, value))
    if isinstance(value, dict):
        return all(_is_literal(item) for pair in value.items() for item in pair)
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return value is None or isinstance(value, (bool, int, str, torch.dtype))
