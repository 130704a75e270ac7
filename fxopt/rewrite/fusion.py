"""What a fusion is: a small class that says what to look for, when it is valid, and what to put in its place."""

from __future__ import annotations

import enum
import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from fxopt.sources import defining_file, digest

if TYPE_CHECKING:
    from fxopt.graph.scope import Scope
    from fxopt.match.match import Match
    from fxopt.match.miss import Miss


class Precision(enum.Enum):
    """How close a rewrite's result is to the original's."""

    #: the same floating-point operations in the same order
    BITWISE = "bitwise"
    #: the same mathematics in another rounding order: at most twice the original's own error, plus an ulp
    ROUNDING = "rounding"
    #: other mathematics; runs only where it is named in `options={"fusions": [...]}`
    APPROXIMATE = "approximate"


@dataclass(frozen=True)
class Example:
    """A program that the fusion must find (or, with `refused`, must refuse for a reason containing that text).

    Attributes:
        program: a function or module of tensors
        inputs: a function without arguments that makes fresh random inputs, a tuple, at each call
        sites: how often the fusion must find itself in it; not looked at where it must refuse
        refused: a part of the reason for which it must refuse, or None
        name: what the test that is made of it is called, and the example on the fusion's page
    """

    program: Any
    inputs: Any
    sites: int = 1
    refused: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Fusion(ABC):
    """Base class of fusions and raising rules. Subclass it as a frozen dataclass; its fields are its options.

    A subclass says where to begin (`anchors`), what it found there (`find`), whether that is valid (`check`) and what
    replaces it (`rewrite`). `PatternFusion` derives the first two from a pattern written in plain PyTorch.
    The class docstring's first line is shown to users: state the rewrite as `before -> after`.
    """

    #: how close the result is to the original's; what verification allows, and whether it runs unasked
    precision: ClassVar[Precision] = Precision.ROUNDING
    #: "raise" brings spelled-out forms back to one op (undone where nothing fuses the result); "fuse" makes fused ops
    stage: ClassVar[str] = "fuse"
    #: ops at which a search begins: overloads or packets
    anchors: ClassVar[tuple[Any, ...]] = ()
    #: those of the anchors that a user expects to see fused: `explain` names each that is left, near miss or not
    expected: ClassVar[tuple[Any, ...]] = ()
    #: a hash of the files that the class and its bases are written in; None where there are none (a notebook)
    source_version: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the class's version now: its file may be edited while the process runs."""
        super().__init_subclass__(**kwargs)
        files = [defining_file(kind) for kind in cls.__mro__ if issubclass(kind, Fusion)]
        cls.source_version = digest(file for file in files if file) if all(files) else None

    @property
    def name(self) -> str:
        """The name used in options and reports: the class name in snake case without a leading "Fuse"."""
        return name_of(type(self).__name__)

    @abstractmethod
    def find(self, node: Node, scope: Scope) -> Match | Miss | None:
        """What begins at anchor `node`: a match, a near miss with its reason, or None (nothing like it here)."""

    def check(self, match: Match) -> Miss | None:
        """Why the match must not be rewritten, or None. The framework checks legality by itself."""
        return None

    @abstractmethod
    def rewrite(self, match: Match) -> Node | tuple[Node, ...]:
        """Make the replacement with `match.call(...)`; return one node for each of `match.outputs`."""

    def examples(self) -> Iterable[Example]:
        """Programs that this fusion must find or refuse; the conformance tests are made from them."""
        return ()

    def adversaries(self, match: Match) -> Iterator[dict[str, torch.Tensor]]:
        """Hostile values for some of the match's variables (by name), tried by the verifier besides random ones."""
        return iter(())

    @property
    def location(self) -> str:
        """file:line of the class, shown beside every node that it makes."""
        return _location(type(self))


def name_of(class_name: str) -> str:
    """The name that a fusion of this class has."""
    plain = class_name.removeprefix("Fuse")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain).lower()


@functools.cache  # reading and tokenising the source takes 10 ms
def _location(fusion: type[Fusion]) -> str:
    try:
        line = inspect.getsourcelines(fusion)[1]
        return f"{inspect.getsourcefile(fusion)}:{line}"
    except (OSError, TypeError):
        return fusion.__module__


@dataclass(frozen=True)
class Verdict:
    """What verification found about one application of a fusion.

    Attributes:
        status: "equal", "meta" (shapes and dtypes only), "unchecked" (over budget or not possible) or "failed"
        detail: what failed or was not checked, in words
        error: where numbers were compared, the largest error against float64, as a multiple of the original's own
    """

    status: str
    detail: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Step:
    """One application of a fusion, for the report (strings and numbers only: it outlives the graph).

    Attributes:
        fusion: the fusion's name
        rule: file:line of the fusion
        op: name of the op that was put in; "" where it is none of fxopt's
        replaced: names of the nodes replaced
        made: names of the nodes made
        sources: the user's source lines of the replaced nodes, without repetition
        module: the nn.Module that they came from
        microseconds: what finding and making the replacement took, without verification
        verdict: what verification found
        applied: False where it was undone; why is in the verdict
        tags: which alternatives of the pattern matched, and whatever else the fusion noted
    """

    fusion: str
    rule: str
    op: str
    replaced: tuple[str, ...]
    made: tuple[str, ...]
    sources: tuple[str, ...]
    module: str | None
    microseconds: float
    verdict: Verdict
    applied: bool = True
    tags: dict[str, Any] = field(default_factory=dict)
