"""What a fusion does with a mask program: causality becomes a flag, and only what is left of the mask is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import mask_models as models
from fxopt.graph.canonical import canonicalise
from fxopt.graph.normalise import normal_forms
from fxopt.kernels.attention import attention
from fxopt.match.masks import MaskProgram, insert, read_mask
from fxopt.match.masks.conditions import TRUE
from fxopt.match.match import Match
from fxopt.match.miss import Miss
from fxopt.rewrite.driver import run_fusions
from fxopt.rewrite.fusion import Fusion
from fxopt.rewrite.verify import Verifier

aten = torch.ops.aten


@dataclass
class Masked(Match):
    program: MaskProgram | None = None


@dataclass(frozen=True)
class FuseCausal(Fusion):
    """F.scaled_dot_product_attention(q, k, v, causal and padding) -> attention(q, k, v, padding, is_causal=True)"""

    anchors: ClassVar = (aten.scaled_dot_product_attention.default,)

    def find(self, node, scope):
        q, k, v, mask = (*node.args, None)[:4]
        if mask is None:
            return None
        sizes = (*q.meta["val"].shape[:3], k.meta["val"].shape[2])
        program = read_mask(mask, scope, sizes, at=node)
        if isinstance(program, Miss):
            return program
        if program.beside_causal is None:
            return Miss("the mask is not causal", mask)
        leaves = {f"leaf_{i}": leaf.node for i, leaf in enumerate(program.leaves)}
        return Masked((node,), frozenset([node]), {"q": q, "k": k, "v": v, **leaves}, program=program)

    def rewrite(self, match):
        q, k, v = match["q"], match["k"], match["v"]
        node, rest = match.outputs[0], None
        if match.program.beside_causal is not TRUE:
            like = [(q, 0), (q, 1), (q, 2), (k, 2)]
            sizes = [n if isinstance(n := x.meta["val"].shape[d], int) else match.call(aten.sym_size.int, x, d)
                     for x, d in like]  # fmt: skip
            device = q.meta["val"].device
            rest = insert(match.program.beside_causal, match.program.coordinates, sizes, match.call, device)
        return match.call(attention, q, k, v, rest, node.kwargs["scale"], True, "zero")


@torch.no_grad()
@pytest.mark.parametrize("inputs, mask", [(models.decoder, (2, 1, 1, 7)), (models.packed, (1, 1, 7, 7))])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_causality_is_taken_out_of_the_masks_of_a_model(inputs, mask, dynamic):
    torch._dynamo.reset()
    model = models.build("llama", "sdpa", **models.NO_HEAD_DIM)
    graphs = []

    def backend(module, example_inputs):
        normal = normal_forms(module, example_inputs)[0]
        canonicalise(normal)
        graphs.append((normal, run_fusions(normal, [FuseCausal()], Verifier("strict"))))
        normal.recompile()
        return normal

    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for left in (3, 5):
        given = inputs(left=left)
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0])
    ((graph, outcome),) = graphs
    assert [step.verdict.status for step in outcome.steps] == ["equal"]
    (call,) = [n for n in graph.graph.nodes if "fxopt.attention" in str(n.target)]
    assert call.args[5] is True
    made = call.args[3].meta["val"].shape
    assert tuple(m if isinstance(n, int) else 7 if m == 7 else m for n, m in zip(made, mask, strict=True)) == mask
    assert [known == 1 for known in mask] == [isinstance(n, int) and n == 1 for n in made]
