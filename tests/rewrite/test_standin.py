"""Stand-in sizes are small, distinct, and keep what relates the real ones."""

import math

import pytest
import torch
import torch.nn.functional as F

import sites
from fxopt.graph.scope import Scope
from fxopt.rewrite.evaluate import ShapeMismatch, isolated, promote, run_promoted
from fxopt.rewrite.region import extract, structure
from fxopt.rewrite.standin import KEEP, Sizes, candidates
from fxopt.rewrite.trials import fit, trials


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def cut(program, *inputs):
    match, replacements = sites.site(program, program, *inputs)
    place = max(match.outputs)
    return match, extract(match.outputs, replacements, match.nodes, match.made, scope=Scope(match.graph), place=place)


def fitting(program, *inputs):
    """The first candidate at which the program runs with all shapes mapped."""
    match, pair = cut(program, *inputs)
    with isolated():
        for sizes in candidates(pair):
            trial = next(trials(sites.Toy(), match, pair, sizes, 0))
            values = {n: promote(v) for n, v in trial.values().items()}
            try:
                run_promoted(pair.old, values, sizes, check=True)
            except (ShapeMismatch, RuntimeError):
                continue
            return sizes
    raise AssertionError("no candidate fits")


def heads(x):
    return x.reshape(1, 2048, 32, 128).transpose(1, 2)


@pytest.mark.parametrize(
    "program, shapes",
    [
        (lambda x: x * 2, [(2048, 4096)]),
        (heads, [(1, 2048, 4096)]),
        (lambda x: heads(x).transpose(1, 2).reshape(1, 2048, 4096), [(1, 2048, 4096)]),
        (lambda x: x.unflatten(-1, (64, 64)).flatten(0, 1), [(48, 2048, 4096)]),
        (lambda x: torch.cat((-x[..., 64:], x[..., :64]), -1), [(1, 32, 2048, 128)]),
        (lambda x: x.split([2048, 512, 512], -1)[1] + x[..., :512], [(2048, 3072)]),
        (lambda x: x.chunk(3, -1)[2] * 2, [(2048, 2304)]),
        (lambda x, y: torch.cat((x, y), 1), [(32, 2048, 128), (32, 1, 128)]),
        (lambda x, y: torch.cat((x, y), 0), [(3000, 64), (1017, 64)]),
        (lambda q, k: F.linear(q, k).masked_fill(torch.ones(2048, 2048).tril(1) > 0, 0), [(2048, 64), (2048, 64)]),
        (lambda x: x[:, :, None].expand(2, 8, 4, 2048, 64).reshape(2, 32, 2048, 64), [(2, 8, 2048, 64)]),
        (lambda x: F.pad(x, (0, 64)).narrow(1, 0, 128), [(2048, 64)]),
        (lambda x: torch.arange(2048)[:, None] + x.new_zeros(2048, 2048) + x, [(2048, 2048)]),
        (lambda x: F.layer_norm(x, (768,)), [(2048, 768)]),
        (lambda x: x.repeat_interleave(128, 1) * x.new_full((256, 4096), 2.0), [(256, 32)]),
        (lambda w: torch.stack((w & 15, w >> 4), -1).reshape(11008, 32, 128), [(11008, 2048)]),
    ],
)
def test_programs_become_small(program, shapes):
    dtype = torch.uint8 if "w" in program.__code__.co_varnames else torch.float32
    sizes = fitting(program, *(empty(*s, dtype=dtype) for s in shapes))
    assert sizes.statics, "only the real sizes fit"
    largest = max(math.prod(sizes.statics.get(d, d) for d in shape) for shape in shapes)
    assert largest < 500_000, sizes


def test_distinct_sizes_stay_distinct():
    _, pair = cut(lambda x, y: x @ y, empty(2048, 4096), empty(4096, 11008))
    for sizes in candidates(pair):
        assert len({sizes.size(n) for n in (2048, 4096, 11008)}) == 3


def test_small_sizes_stay():
    _, pair = cut(lambda x: x * 2, empty(1, 3, KEEP, 0))
    assert next(candidates(pair)).shape(pair.inputs[0].meta["val"]) == (1, 3, KEEP, 0)


def test_dimension_numbers_are_no_sizes():
    """A dim, an index or a step that equals a size is not one."""
    sizes = fitting(lambda x: x.select(1, 3).sum(-1)[::2], empty(64, 64, 64))
    assert sizes.size(64) < 64


def test_the_order_of_lengths_is_kept():
    def windowed(x):
        rows, keys = torch.arange(8192)[:, None], torch.arange(8192)[None, :]
        return torch.where((rows - keys < 4096) & (rows - keys > -1023), x, 0.0)

    for sizes in list(candidates(cut(windowed, empty(8192, 8192))[1]))[:-1]:
        assert 1 < sizes.lengths[4096] < sizes.size(8192)
        assert -sizes.lengths[4096] < sizes.lengths[-1023] < 0


def test_a_length_is_not_the_width_of_the_same_number():
    def program(x, w):
        return F.linear(x.reshape(8192, 4096), w) * (torch.arange(8192)[:, None] < 4096)

    _, pair = cut(program, empty(8192, 32, 128), empty(4096, 4096))
    sizes = next(candidates(pair))
    assert sizes.size(4096) == sizes.size(32) * sizes.size(128)
    assert sizes.lengths[4096] < sizes.size(8192) < sizes.size(4096)


def test_sizes_read_as_text():
    assert str(Sizes()) == "the real sizes"
    assert str(Sizes({128: 20})) == "128 as 20"


def test_fit_cuts_repeats_and_broadcasts():
    x = torch.arange(6.0).reshape(2, 3)
    assert fit(x, (1, 2), torch.float32).tolist() == [[0, 1]]
    assert fit(x, (2, 7), torch.float32).tolist()[0] == [0, 1, 2, 0, 1, 2, 0]
    assert fit(torch.ones(3), (4, 5, 3), torch.bfloat16).shape == (4, 5, 3)
    assert fit(torch.ones(1, 1, 2, 3), (2, 3), torch.float32).shape == (2, 3)


def test_equal_layers_have_one_signature():
    def signature(program, *inputs):
        return structure(cut(program, *inputs)[1])

    def layer(x, w):
        return F.linear(x, w).relu()

    one = signature(layer, empty(8, 32), empty(32, 32))
    assert signature(lambda a, b: F.linear(a, b).relu(), empty(8, 32), empty(32, 32)) == one
    assert signature(layer, empty(8, 33), empty(32, 33)) != one
    assert signature(layer, empty(8, 32).half(), empty(32, 32).half()) != one
    assert signature(lambda x, w: F.linear(x, w).sigmoid(), empty(8, 32), empty(32, 32)) != one
    assert signature(lambda x, w: F.linear(x, w).clamp(0), empty(8, 32), empty(32, 32)) != signature(
        lambda x, w: F.linear(x, w).clamp(1), empty(8, 32), empty(32, 32)
    )


def test_isolated_runs_on_few_threads_and_puts_them_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with isolated():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
