"""A cast moves before the permutations of its argument where that is the same tensor, and only there."""

from __future__ import annotations

import pytest
import torch

aten = torch.ops.aten
x = torch.randn(2, 3, 4)


def order(captured, program, *inputs):
    """The casts and permutations of a program's normal form, in order; it computes what the program does."""
    with torch.no_grad():
        expected = program(*[i.clone() for i in inputs])
        torch.testing.assert_close(captured.run(program, *[i.clone() for i in inputs]), expected)
    return [t for t in captured.targets() if t in (aten.to.dtype, aten.transpose.int, aten.permute.default)]


def test_a_cast_goes_first(captured):
    found = order(captured, lambda x: x.transpose(0, 1).permute(2, 0, 1).to(torch.float64) + 1, x)
    assert found == [aten.to.dtype, aten.transpose.int, aten.permute.default]


@pytest.mark.parametrize(
    "program",
    [
        lambda x: x[:, :1].expand(2, 3, 4).transpose(0, 1).to(torch.float64) + 1,  # the cast packs what was expanded
        lambda x: x.transpose(0, 1).to(torch.float64, copy=True) + 1,
        lambda x: x.transpose(0, 1).to(torch.float64),  # returned: whether it is a view shows
        lambda x: (
            x.transpose(0, 1).to(torch.float64).mul_(torch.arange(4)[None, None, :]).t_().sum()
            if x.dim() == 2
            else x.transpose(0, 1).to(torch.float64).index_add_(0, torch.tensor([0]), torch.ones(1, 2, 4).double()) + 1
        ),
    ],
    ids=["expanded", "copied", "returned", "written to"],
)
def test_a_cast_stays(captured, program):
    found = order(captured, program, x)
    assert found[0] == aten.transpose.int
    assert aten.to.dtype in found or found == [aten.transpose.int]


def test_what_is_also_read_uncast_stays_one_value(captured):
    def program(x):
        turned = x.transpose(0, 1)
        return turned * turned.to(torch.float64)

    assert order(captured, program, x) == [aten.transpose.int, aten.to.dtype]
