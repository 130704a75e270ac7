"""What masks are read as, how each op is followed, and what must not be concluded."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F

from fxopt.match.masks import MaskProgram, describe, insert, read_mask
from fxopt.match.masks.conditions import TRUE
from fxopt.match.miss import Miss
from lifting import lift, program_of

MIN = torch.finfo(torch.float32).min
INF = math.inf


def ij(x):
    n = x.shape[1]
    return torch.arange(n)[:, None], torch.arange(n)


def causal(x):
    i, j = ij(x)
    return j <= i


# What masks are: words for a program on x [2, n] of integers
READ = {
    "causal": (causal, "causal"),
    "tril": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), "causal"),
    "triu of -inf": (lambda x: torch.full((x.shape[1],) * 2, -INF).triu(1), "causal"),
    "triu of ones": (lambda x: torch.triu(torch.ones(x.shape[1], x.shape[1]) * -INF, diagonal=1), "causal"),
    "filled": (lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(~causal(x), MIN), "causal"),
    "(1 - m) · min": (lambda x: (1.0 - causal(x).float()) * MIN, "causal"),
    "distance": (lambda x: (ij(x)[0] - ij(x)[1]) >= 0, "causal"),
    "float distance": (lambda x: (ij(x)[0].float() - ij(x)[1].float()) > -0.5, "causal"),
    "float positions": (
        lambda x: torch.arange(1.0, x.shape[1] + 1)[:, None] > torch.arange(0.0, x.shape[1]), "causal",
    ),
    "cumulative sum": (lambda x: torch.ones_like(x).cumsum(1)[0][:, None] > ij(x)[1], "causal"),
    "strictly": (lambda x: ij(x)[1] < ij(x)[0], "causal, -1, rows may be empty"),
    "window": (lambda x: causal(x) & (ij(x)[1] > ij(x)[0] - 3), "causal, window 3"),
    "both sides": (lambda x: (ij(x)[0] - ij(x)[1]).abs() <= 2, "window of 2 on both sides"),
    "banded": (lambda x: torch.ones(x.shape[1], x.shape[1]).tril(1).triu(-2) != 0, "causal, +1, window 4"),
    "chunks": (lambda x: causal(x) & (ij(x)[0] // 4 == ij(x)[1] // 4), "causal, chunks of 4"),
    "blocks": (lambda x: ij(x)[0] // 2 == ij(x)[1] // 2, "chunks of 2"),
    "prefix": (lambda x: causal(x) | (ij(x)[1] < 3), "causal after a prefix of 3"),
    "padding": (lambda x: (x != 0)[:, None, None], "keys padded (x_1), rows may be empty"),
    "lengths": (
        lambda x: ij(x)[1] < x.sum(1)[:, None, None, None], "keys up to sum_1[b] - 1, rows may be empty",
    ),
    "causal and padding": (
        lambda x: causal(x) & x.bool()[:, None, None], "causal, keys padded (x_1), rows may be empty",
    ),
    "documents": (
        lambda x: (x[:, None, :, None] == x[:, None, None, :]) & causal(x), "causal, segments by x_1",
    ),
    "documents, numbered twice": (
        lambda x: causal(x) & (x.cumsum(1)[:, None, :, None] == x.cumsum(1)[:, None, None]),
        "causal, segments by cumsum",
    ),
    "dilated": (lambda x: causal(x) & ((ij(x)[0] - ij(x)[1]) % 2 == 0), "causal, where i = j + 2·((i - j) // 2)"),
    "prefix lengths": (
        lambda x: causal(x) | (ij(x)[1] < x.sum(1)[:, None, None, None]), "causal after a prefix of sum_1[b]",
    ),
    "left padding": (
        lambda x: causal(x) & (ij(x)[1] >= (x == 0).sum(1)[:, None, None, None]),
        "causal, keys from sum_1[b] on, rows may be empty",
    ),
    "global keys": (
        lambda x: (ij(x)[0] - ij(x)[1] <= 2) | (ij(x)[1] < 1), "where i <= j + 2 or j = 0",
    ),
    "strided keys": (lambda x: causal(x) & (ij(x)[1] % 2 == 0), "causal, keys where j = 2·(j // 2)"),
    "everything": (lambda x: ij(x)[0] + ij(x)[1] >= 0, "every key is live"),
    "nothing": (lambda x: ij(x)[0] + ij(x)[1] < 0, "no key is live, rows may be empty"),
    "checkers": (lambda x: (ij(x)[0] + ij(x)[1]) % 2 == 0, "where i + j = 2·((i + j) // 2)"),
    "alibi": (
        lambda x: (ij(x)[1] - ij(x)[0]) * torch.tensor([0.5, 0.25]).reshape(2, 1, 1),
        "every key is live, a bias over (h, j-i)",
    ),
    "inverted, filled where not zero": (
        lambda x: (1.0 - x[:, None, None].float()).masked_fill((1.0 - x[:, None, None].float()).bool(), MIN),
        "keys padded (x_1), empty rows uniform",
    ),
    "key bias": (lambda x: x[:, None, None].float() * 0.5, "every key is live, a bias over (b, j)"),
    "soft fill": (lambda x: torch.where(causal(x), 0.0, -1e4), "every key is live, a bias over (j-i)"),
}  # fmt: skip


#: floats hold integers up to 2^24, symbolic sizes have no such limit
STATIC = ("float distance", "float positions", "alibi")


@pytest.mark.parametrize("name, dynamic", [(n, d) for n in READ for d in (False, True) if not (d and n in STATIC)])
def test_what_masks_are_read_as(name, dynamic):
    function, words = READ[name]
    checked = lift(lambda x: function(x), torch.randint(0, 3, (2, 9)), dynamic=dynamic)
    program = checked.sites[0].program
    assert isinstance(program, MaskProgram), program.reason
    assert describe(program) == words
    if dynamic:
        checked(torch.randint(0, 3, (3, 12)))


def moved(build):
    """A causal mask whose keys are numbered by a vector that is arange(n) after some ops."""
    return lambda x: build(torch.arange(x.shape[1])) <= torch.arange(x.shape[1])[:, None]


FOLLOWED = {
    "flip twice": lambda j: j.flip(0).flip(0),
    "roll back": lambda j: j.roll(2).roll(-2),
    "slices joined": lambda j: torch.cat([j[:3], j[3:]]),
    "negative slice": lambda j: torch.cat([j[:-2], j[-2:]]),
    "halves": lambda j: torch.cat(j.chunk(2)),
    "split": lambda j: torch.cat(j.split([3, 5])),
    "unbound": lambda j: torch.stack([j, j]).unbind(0)[1],
    "reshaped": lambda j: j.reshape(2, 4).t().reshape(4, 2).t().flatten(),
    "expanded": lambda j: j[None].expand(3, -1).select(0, 2),
    "narrow": lambda j: torch.cat([j.narrow(0, 0, 5), j.narrow(0, 5, 3)]),
    "repeated": lambda j: j.repeat(2)[8:],
    "interleaved": lambda j: j.repeat_interleave(2)[::2],
    "looked up": lambda j: (j * 2)[j] // 2,
    "gathered": lambda j: j.gather(0, j),
    "index_select": lambda j: j.index_select(0, j),
    "embedding": lambda j: F.embedding(j, j[:, None].expand(-1, 2))[:, 0],
    "padded": lambda j: F.pad(j, (2, 0))[2:],
    "cumsum": lambda j: torch.ones_like(j).cumsum(0) - 1,
    "diff": lambda j: j + torch.diff(j, prepend=j[:1] - 1) - 1,
    "casts": lambda j: j.to(torch.int32).to(torch.float32).to(torch.int64),
    "clamped": lambda j: j.clamp(min=0),
    "shifted": lambda j: (j * 4) >> 2,
    "mod": lambda j: j - j % 1 + torch.remainder(j, 8) - j,
    "where": lambda j: torch.where(j >= 0, j, j * 7),
    "maximum": lambda j: torch.maximum(j, j - 1),
    "filled": lambda j: j.masked_fill(j < 0, 3),
    "new": lambda j: j + j.new_full((8,), 2) - torch.full_like(j, 2) + torch.zeros_like(j),
    "steps of two": lambda j: torch.arange(0, 16, 2)[j] // 2,
    "eye": lambda j: j * torch.eye(8, dtype=torch.long)[j, j],
    "full of a size": lambda j: torch.full((8,), j.shape[0]) - torch.full((8,), j.shape[0]) + j,
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_ops_are_followed(name):
    program = program_of(moved(FOLLOWED[name]), torch.zeros(1, 8))
    assert isinstance(program, MaskProgram), program.reason
    assert program.is_causal, describe(program)


# What must not be concluded

NOT_CAUSAL = {
    "int8 wraps": lambda j: (j.to(torch.int8) * 40) // 40,
    "uint8 wraps": lambda j: (j.to(torch.uint8) - 1) + 1,
    "rolled": lambda j: j.roll(1),
    "flipped": lambda j: j.flip(0),
    "a constant": lambda j: j.clone().fill_(2),
    "one off": lambda j: j - (j == 5).long(),
    "negative indices": lambda j: j[j - 1],
    "bfloat16": lambda j: ((j + 255).to(torch.bfloat16) + 1).long() - 256,
    "a sum": lambda j: torch.cumsum((j != 3).long(), 0) - 1,
    "wrong diagonal": lambda j: j - 1,
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_nearly_causal_masks_are_not_causal(name):
    program = program_of(moved(NOT_CAUSAL[name]), torch.zeros(1, 8))
    assert isinstance(program, Miss) or not program.is_causal


def test_a_narrow_integer_that_may_wrap_is_not_interpreted():
    def mask(length):
        return torch.arange(5, dtype=torch.int32) <= length + torch.arange(5, dtype=torch.int32)[:, None]

    checked = lift(mask, torch.tensor(2, dtype=torch.int32))
    checked(torch.tensor(2**31 - 2, dtype=torch.int32))
    row = checked.sites[0].program.coordinates[-2].atom
    assert checked.sites[0].program.upper.coefficient(row) == 0


@pytest.mark.parametrize("values", [torch.tensor([[0, 1, 2, -3, 1, 0]]), torch.tensor([[7, 0, 0, 0, 0, 0]])])
def test_padding_is_what_is_not_zero(values):
    def added(x):
        return (1.0 - x[:, None, None].float()) * MIN

    program = program_of(added, torch.ones(1, 6, dtype=torch.long))
    assert program.hard == ()
    assert program.bias_depends == {"j"}
    lift(lambda x: x.bool()[:, None, None], torch.ones(1, 6, dtype=torch.long))(values)


@pytest.mark.parametrize(
    "fills, empty",
    [
        ((MIN, MIN), "mixed"),
        ((-INF, -INF), "nan"),
        ((MIN, -INF), "mixed"),
        ((MIN, None), "uniform"),
        ((-INF, None), "nan"),
    ],
)
def test_what_empty_rows_give(fills, empty):
    def mask(x):
        total = torch.where(x.bool()[:, None, None], 0.0, fills[0])
        return total if fills[1] is None else total + torch.where((x == 1)[:, None, None], 0.0, fills[1])

    program = program_of(mask, torch.tensor([[1, 2, 0, 1]]))
    assert program.empty_rows == empty


def test_finite_masks_of_rows_that_are_never_empty_may_add_up_to_infinity():
    def mask(x):
        i, j = ij(x)
        return torch.where(j <= i, 0.0, MIN) + torch.where(j > i - 3, 0.0, MIN) + torch.where(j <= i, 0.0, MIN)

    program = program_of(mask, torch.zeros(1, 6))
    assert program.empty_rows == "never"
    assert set(program.hard) == {MIN, -INF}
    assert describe(program) == "causal, window 3"


@pytest.mark.parametrize("dtype, fill, hard", [
    (torch.bfloat16, MIN, True),  # rounds to -inf
    (torch.float16, -65504.0, True),
    (torch.float32, -65504.0, False),
    (torch.float32, -1e30, False),
])  # fmt: skip
def test_hard_values_are_those_of_the_dtype(dtype, fill, hard):
    def mask(x):
        return torch.where(causal(x), torch.zeros((), dtype=dtype), fill)

    assert bool(program_of(mask, torch.zeros(1, 5)).hard) is hard


def test_values_that_the_caller_takes_for_hard():
    program = program_of(lambda x: torch.where(causal(x), 0.0, -1e4), torch.zeros(1, 5), hard=-9e3)
    assert program.is_causal
    assert program.hard == (-1e4,)


def test_a_mask_that_is_true_where_keys_are_taken_out():
    assert program_of(lambda x: ~causal(x), torch.zeros(1, 5), keep=False).is_causal


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_nothing_is_known_of_an_input(dtype):
    program = program_of(lambda m: m.clone(), torch.zeros(2, 1, 5, 7).to(dtype))
    assert isinstance(program, Miss)
    assert "nothing is known" in program.reason


def test_bounds_are_kept_beside_what_is_not_understood():
    def mask(x, flags):
        return causal(x) & flags

    program = program_of(mask, torch.zeros(1, 5), torch.rand(2, 1, 5, 5) > 0.3)
    assert program.upper is program.coordinates[-2]
    assert describe(program).startswith("causal, where ")


def test_what_there_is_beside_causality():
    program = program_of(lambda x: causal(x) & (x != 0)[:, None, None], torch.tensor([[1, 0, 2, 1]]))
    assert program.beside_causal is program.key_padding
    assert program_of(causal, torch.zeros(1, 5)).beside_causal is TRUE
    assert program_of(lambda x: causal(x) | (x != 0)[:, None, None], torch.ones(1, 5)).beside_causal is None


def test_a_row_of_one_is_read_as_a_length():
    program = program_of(lambda n: torch.arange(9)[None] <= torch.arange(1)[:, None] + n, torch.tensor(3))
    assert describe(program) == "keys up to n_1, rows may be empty"


# Ops in other forms: compared with what torch gives, whatever they are read as

COMPARED = {
    "index of rows": lambda x, t: x[torch.arange(6).flip(0)] <= 3,
    "index of columns": lambda x, t: t[:, torch.arange(6)][..., :6] == 1,
    "index across a dimension": lambda x, t: t[torch.arange(2), :, torch.arange(2)] == 2,
    "index of two": lambda x, t: t[:, torch.arange(6)[:, None], torch.arange(6)] == 0,
    "index by a tensor": lambda x, t: torch.arange(5)[x] > 1,
    "gather of rows": lambda x, t: x.gather(0, x.clamp(max=3)) == 1,
    "index_select of columns": lambda x, t: x.index_select(1, torch.arange(0, 6, 2)) == 1,
    "negative select": lambda x, t: t.select(0, -1) == 1,
    "flip of two": lambda x, t: x.flip(0, 1) == 1,
    "roll of two": lambda x, t: x.roll((1, -2), (0, 1)) == 1,
    "padded on all sides": lambda x, t: F.pad(x, (1, 2, 2, 1), value=1) == 1,
    "cropped": lambda x, t: F.pad(x, (-1, 2)) == 0,
    "joined along rows": lambda x, t: torch.cat([x, x[:2] + 1, x], 0) == 1,
    "stacked in the middle": lambda x, t: torch.stack([x, x + 1], 1) == 2,
    "repeated": lambda x, t: x.repeat(2, 1, 3) == 2,
    "repeated in place": lambda x, t: x.repeat_interleave(3, 1) == 2,
    "expanded": lambda x, t: x[:, :1].expand_as(x) == 2,
    "diagonals of a batch": lambda x, t: t.tril(-1) == t.triu(2),
    "square": lambda x, t: (t * t + x).reshape(6, -1) > 2,
    "merged and split": lambda x, t: t.permute(2, 0, 1).reshape(4, 3, 6) == 1,
    "filled by a tensor": lambda x, t: x.float().masked_fill(x > 1, torch.tensor(-INF)),
    "chosen among dtypes": lambda x, t: torch.where(x > 1, torch.tensor(0.1, dtype=torch.float64), x.bfloat16()),
    "half of an integer": lambda x, t: (x / 2) * torch.finfo(torch.float32).min,
    "bfloat16 beside float32": lambda x, t: x.bfloat16() * 0.1 + torch.tensor(0.3),
    "bfloat16 against a number": lambda x, t: x.bfloat16() * 0.1 > 0.1,
    "clamped": lambda x, t: x.clamp(1, 2) == x.clamp(max=2),
    "clamped wrongly": lambda x, t: x.clamp(3, 1) == 1,
    "clamped by tensors": lambda x, t: x.clamp(x.T[:, :1] * 0, x * 0 + 2) == 2,
    "any": lambda x, t: (x > 1).any(0, keepdim=True) & (x < 3),
    "sums": lambda x, t: x.cumsum(1) > x.sum(1, keepdim=True) - 4,
    "float sums": lambda x, t: torch.full((6, 6), 0.5).cumsum(1, dtype=torch.long) == 0,
    "signs": lambda x, t: torch.sign(x - 2) == -1,
    "bits": lambda x, t: (x & 1) == (x ^ 1),
    "shifts": lambda x, t: (x << 3) >> 2 == 4,
    "uint8": lambda x, t: (x.to(torch.uint8) - 2) // 2 == 127,
    "int8 range": lambda x, t: torch.arange(-128, 128, dtype=torch.int8)[:6].abs()[None].expand(6, 6) < x,
    "remainders": lambda x, t: torch.fmod(x - 2, 3) == torch.remainder(x - 2, -3),
    "a minus b": lambda x, t: torch.rsub(x, torch.arange(6), alpha=2) == torch.sub(x, 1, alpha=3),
    "logic on numbers": lambda x, t: torch.logical_xor(x, x - 1) | torch.logical_not(x.float()),
    "minimum": lambda x, t: torch.minimum(x, x.T) == torch.max(x, x.T) - 1,
    "signs of zero": lambda x, t: torch.where(x > 1, 1 / torch.full((), -0.0), 1 / torch.full((), 0.0)),
    "zeros that differ": lambda x, t: (
        torch.copysign(torch.ones(()), torch.where(x > 1, -0.0, torch.zeros(())))
        * torch.where(x > 2, torch.zeros(()), -0.0).copysign(x - 2.0)
    ),
    "literals that are equal": lambda x, t: torch.copysign(x / 3, 0.0) + torch.copysign(x / 3, -0.0) > 0.1,
    "attribute": lambda x, t: (torch.tensor([1, 0, 2, 3, 0, 1]) == x) & (x != torch.tensor(2)),
}


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPARED)
def test_ops_give_what_torch_gives(name, dynamic):
    x, t = torch.arange(36).reshape(6, 6) % 5, torch.arange(72).reshape(2, 6, 6) % 3
    checked = lift(COMPARED[name], x, t, dynamic=dynamic)
    checked(x.flip(0), t.flip(1))


# Sequences


def packed(positions):
    breaks = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    segment = breaks.cumsum(-1)
    i, j = positions[:, None, :, None], positions[:, None, None, :]
    return (segment[:, None, :, None] == segment[:, None, None, :]) & (j <= i) & (i - j < 3)


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_division_by_one_that_rounds_changes_its_value(mode):
    bias = torch.tensor([[-1.5, 0.5, -0.25, 2.0]])
    lift(lambda x: torch.div(x, 1.0, rounding_mode=mode)[:, None, None].expand(1, 1, 4, 4), bias)(bias * 3 - 0.1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_positions_within_a_segment_are_places(dynamic):
    first = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [5, 6, 7, 8, 9, 2, 3, 4]])
    checked = lift(packed, first, dynamic=dynamic)
    program = checked.sites[0].program
    assert describe(program) == "causal, window 3, segments by cumsum"
    assert program.segments[0].sorted
    checked(torch.tensor([[3, 3, 3, 4, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]))
    if dynamic:
        checked(torch.tensor([[9, 8, 7, 7, 8, 9, 10, 11, 0, 1, -1]] * 3))


def test_segments_that_other_steps_divide_keep_their_positions():
    def steps_of_two(positions):
        segment = (torch.diff(positions, prepend=positions[:, :1] - 2, dim=-1) != 2).cumsum(-1)
        same = segment[:, None, :, None] == segment[:, None, None, :]
        return same & (positions[:, None, None, :] <= positions[:, None, :, None])

    checked = lift(steps_of_two, torch.tensor([[0, 2, 4, 1, 3, 0]]))
    checked(torch.tensor([[4, 2, 0, 2, 4, 6]]))
    assert checked.sites[0].program.upper is None


# Writes


def test_a_tensor_that_is_written_to_is_read_as_it_was():
    def mask(length):
        m = torch.arange(7) <= torch.arange(3)[:, None] + length
        length.add_(3)
        late = torch.arange(7) <= torch.arange(3)[:, None] + length
        return m & late

    checked = lift(mask, torch.tensor(1))
    checked(torch.tensor(-2))
    leaves = {leaf.node.name: leaf.epoch for leaf in checked.sites[0].program.leaves}
    assert leaves == {"add": 0, "add_": 1}  # the sum has kept what it was


def test_what_nothing_has_kept_can_not_be_read_later():
    def mask(flags):
        m = (flags[:, None, None] != 0) & (torch.arange(4) <= torch.arange(4)[:, None])
        flags.mul_(0)
        return m

    program = lift(mask, torch.ones(2, 4)).sites[0].program
    assert isinstance(program, Miss)
    assert "is written to before it is used" in program.reason


def test_a_constant_that_is_written_to_is_not_followed():
    def mask(x):
        m = torch.ones(5, 5, dtype=torch.bool).tril()
        m[:, 3] = False
        return m & (x[0] > 0)

    checked = lift(mask, torch.ones(1, 5))
    assert not checked.sites[0].program.is_causal
    assert checked.sites[0].program.upper is None


def test_a_mask_that_is_written_to_itself_is_not_read():
    def mask(x):
        m = causal(x)
        late = m.clone()
        late[0] = True
        return late

    program = program_of(mask, torch.zeros(1, 5))
    assert isinstance(program, Miss)
    assert "is written to after it is made" in program.reason


# Parts of a mask in the graph


def inserted(checked, inputs, parts):
    """The graph with parts of a site's program computed in it, run: each part's tensor, and its dense reference."""
    site, graph = checked.sites[0], checked.module.graph
    end = graph.output_node()
    mode = site.node.meta["val"].fake_mode

    def call(target, *args, **kwargs):
        with mode, graph.inserting_before(end):
            node = graph.call_function(target, args, kwargs)
            plain = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta["val"] = target(*plain[0], **plain[1])
        return node

    rank = site.node.meta["val"].dim()
    sizes = [n if isinstance(n, int) else call(torch.ops.aten.sym_size.int, site.node, d + rank - 4)
             for d, n in enumerate(site.sizes)]  # fmt: skip
    made = [insert(part, site.program.coordinates, sizes, call, torch.device("cpu")) for part in parts]
    end.args = (made,)
    graph.lint()
    return torch.fx.Interpreter(checked.module).run(*inputs, enable_io_processing=False)


@pytest.mark.parametrize("dynamic", [False, True])
def test_parts_of_a_mask_can_be_put_into_the_graph(dynamic):
    def mask(padding, lengths):
        i, j = ij(padding)
        seen = (j <= i + lengths[:, None, None, None]) & (j < 2 * lengths.clamp(min=3)[:, None, None, None])
        return seen & (padding != 0)[:, None, None]

    inputs = (torch.randint(0, 3, (2, 9)), torch.tensor([1, 4]))
    checked = lift(mask, *inputs, dynamic=dynamic)
    program = checked.sites[0].program
    other = (torch.randint(0, 3, (3, 12)), torch.tensor([-1, 0, 5])) if dynamic else inputs
    expected = mask(*other)
    live, upper, padding = inserted(checked, other, (program.live, program.upper, program.key_padding))
    assert torch.equal(live, expected)
    assert upper.shape == (len(other[1]), 1, other[0].shape[1], 1)
    assert padding.shape == (len(other[1]), 1, 1, other[0].shape[1])
    assert torch.equal((torch.arange(padding.shape[-1]) <= upper) & padding, expected)


def test_a_tensor_that_is_longer_than_the_mask_is_cut():
    checked = lift(lambda x: causal(x[:, :5]) & x[:, None, None, :5].bool(), torch.ones(2, 9))
    inputs = (torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1]] * 2).float(),)
    (padding,) = inserted(checked, inputs, (checked.sites[0].program.key_padding,))
    assert torch.equal(padding, inputs[0][:, None, None, :5].bool())


# What it costs


def test_no_guard_is_added():
    from torch.fx.experimental.proxy_tensor import make_fx

    from fxopt.graph.scope import Scope

    x = torch.zeros(2, 9, dtype=torch.long)
    graph = make_fx(lambda x: causal(x) & x.bool()[:, None, None], tracing_mode="symbolic")(x).graph
    mask = graph.output_node().args[0]
    env = mask.meta["val"].shape[0].node.shape_env
    before = len(env.guards)
    shape = mask.meta["val"].shape
    assert isinstance(read_mask(mask, Scope(graph), (shape[0], 1, *shape[-2:])), MaskProgram)
    assert len(env.guards) == before


@pytest.mark.slow
def test_a_mask_takes_a_few_milliseconds():
    """Measured: 1 to 2 ms, of 20 to 50 nodes; the bound leaves room for a busy machine."""
    import time

    from fxopt.match.masks.reader import _LIFTERS

    checked = lift(packed, torch.arange(8).expand(2, 8), dynamic=True)
    times = []
    for _ in range(5):
        _LIFTERS.clear()
        start = time.process_time()
        read_mask(checked.sites[0].node, checked.scope, checked.sites[0].sizes)
        times.append(time.process_time() - start)
    assert sorted(times)[2] < 0.02


def test_nothing_is_kept_of_a_graph_that_is_gone():
    checked = lift(lambda x: causal(x) & x.bool()[:, None, None], torch.zeros(1, 5))
    scope = weakref.ref(checked.scope)
    del checked
    gc.collect()
    assert scope() is None


def test_layers_share_what_was_lifted(monkeypatch):
    from fxopt.match.masks.lift import Lifter

    checked = lift(causal, torch.zeros(1, 6))
    site, scope = checked.sites[0], checked.scope
    followed = []
    monkeypatch.setattr(Lifter, "_follow", lambda self, node, *rest: followed.append(node))
    assert read_mask(site.node, scope, site.sizes).is_causal
    assert followed == []
