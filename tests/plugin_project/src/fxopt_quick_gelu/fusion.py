"""The quick GELU, wherever a model spells it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fxopt import Example, Match, Miss, PatternFusion
from fxopt_quick_gelu.op import quick_gelu


@dataclass(frozen=True)
class FuseQuickGelu(PatternFusion):
    """x * sigmoid(slope * x) -> fxopt::quick_gelu(x, slope)

    Refused where x holds integers, which the sigmoid would make floating point.
    """

    def pattern(self, x: Tensor, slope: float) -> Tensor:
        """What is looked for, in plain PyTorch; the order of operands does not matter."""
        return x * torch.sigmoid(slope * x)

    def check(self, match: Match) -> Miss | None:
        """Why a match must not be rewritten: a reason and the node at fault, or None."""
        if not match.val("x").is_floating_point():
            return Miss("x holds integers", match["x"])
        return None

    def rewrite(self, match: Match) -> Node:
        """What takes its place."""
        return match.call(quick_gelu, match["x"], match["slope"])

    def examples(self) -> Iterable[Example]:
        """Programs that it must find, or must refuse for a reason; the conformance tests are made from these."""
        yield Example(lambda x: x * torch.sigmoid(1.702 * x), lambda: (torch.randn(4, 8),), name="CLIP")
        yield Example(lambda x: (x * 2.0).sigmoid() * x, lambda: (torch.randn(2, 3, 8),), name="another slope")
        yield Example(
            lambda x: x * torch.sigmoid(2.0 * x),
            lambda: (torch.arange(3),),
            refused="x holds integers",
            name="integers",
        )
