"""Masks that depend on fewer coordinates than they have are computed in as few elements, with the values they had."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attending
import mask_models as models
from attending import Fuser, attend, compare, qkv, randn
from fxopt.graph.canonical import merge_masks
from fxopt.kernels.attention import attention
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax

MIN = torch.finfo(torch.float32).min
ROWS, KEYS = 12, 14


def places(q, k):
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def inputs(rows=ROWS, keys=KEYS, left=5):
    m = torch.ones(2, keys, dtype=torch.int64)
    m[1, :left] = 0
    return (*qkv(rows=rows, keys=keys), m)


def filled(live, fill):
    return lambda q, k, v, m: attend((q @ k.mT * 0.3).masked_fill(~live(*places(q, k), m), fill), v)


def added(live, fill):
    def program(q, k, v, m):
        mask = torch.zeros((), dtype=q.dtype).masked_fill(~live(*places(q, k), m), fill)
        return attend(q @ k.mT * 0.3 + mask, v)

    return program


def named(live, fill):
    return lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, live(*places(q, k), m))


def by_key(i, j, m):
    """BERT's: spread over the rows by what holds for all of them."""
    return (i >= 0) & (m != 0)[:, None, None, :]


def by_key_of_no_sequence(i, j, m):
    return (j % 3 != 0).expand(2, 1, ROWS, KEYS).clone()


def by_sequence(i, j, m):
    return (m[:, None, None, :1] != 0) & (i + j >= 0)


def by_row(i, j, m):
    return (m[:, None, :ROWS, None] != 0) & (j >= 0)


def by_row_and_key(i, j, m):
    return ((i + j) % 3 != 0).repeat(2, 4, 1, 1)


SHAPES = {
    by_key: (2, 1, 1, KEYS),
    by_key_of_no_sequence: (1, 1, 1, KEYS),
    by_sequence: (2, 1, 1, 1),
    by_row: (2, 1, ROWS, 1),
    by_row_and_key: (1, 1, ROWS, KEYS),
}
HOW = [(filled, -math.inf), (filled, MIN), (added, -math.inf), (added, MIN), (added, -20.0), (named, None)]


def mask_of(fuser):
    assert fuser.sites == 1, fuser.reasons
    return fuser.calls[0][3].meta["val"]


@pytest.mark.parametrize("live", SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how, fill", HOW)
def test_a_mask_has_the_dimensions_that_it_depends_on(fuser, how, fill, live):
    program = how(live, fill)
    compare(fuser.run(program, *inputs()), program, inputs())
    assert tuple(mask_of(fuser).shape) == SHAPES[live]


def test_numbers_keep_their_dtype(fuser):
    """BERT in half precision: finfo.min of another dtype would be another number."""
    program = added(by_key, torch.finfo(torch.bfloat16).min)
    arguments = (*qkv(torch.bfloat16, rows=ROWS, keys=KEYS), inputs()[3])
    compare(fuser.run(program, *arguments), program, arguments)
    assert mask_of(fuser).dtype == torch.bfloat16


def test_the_key_mask_beside_one_by_row_and_key(fuser):
    def program(q, k, v, m):
        i, j = places(q, k)
        bias = torch.zeros(()).masked_fill(~by_key(i, j, m), -9.0)
        return attend((q @ k.mT * 0.3 + bias).masked_fill((i + j) % 3 == 0, -math.inf), v)

    compare(fuser.run(program, *inputs()), program, inputs())
    added = [n for n in fuser.graphs[0].graph.nodes if n.target is torch.ops.aten.where.self]
    assert (2, 1, 1, KEYS) in [tuple(n.meta["val"].shape) for n in added]


def test_three_dimensions_with_heads_and_sequences_in_one(fuser):
    def program(q, k, v, m):
        scores = (q @ k.mT * 0.3).flatten(0, 1)
        live = by_row_and_key(*places(q, k), m).reshape(8, ROWS, KEYS)
        return attend(scores.masked_fill(~live, -math.inf), v.flatten(0, 1))

    compare(fuser.run(program, *inputs()), program, inputs())
    assert tuple(mask_of(fuser).shape) == (1, 1, ROWS, KEYS)


@pytest.mark.parametrize("live", [by_key, by_sequence], ids=lambda f: f.__name__)
@pytest.mark.parametrize("how, fill", [(added, MIN), (filled, -math.inf)])
def test_symbolic_sizes_stay_symbolic(fuser, how, fill, live):
    torch._dynamo.reset()
    program = how(live, fill)
    compiled = torch.compile(program, backend=fuser, fullgraph=True)
    for rows, keys, left in ((12, 14, 5), (30, 9, 9), (9, 33, 0)):
        arguments = inputs(rows, keys, left)
        for tensor, dim in zip(arguments, (2, 2, 2, 1), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        with torch.no_grad():
            compare(compiled(*arguments), program, arguments)
    assert len(fuser.graphs) == 1
    assert mask_of(fuser).shape[2] == 1


def test_layers_share_one_mask(fuser):
    def program(q, k, v, m):
        mask = torch.zeros(()).masked_fill(~by_key(*places(q, k), m), MIN)
        for _ in range(3):
            q = attend(q @ k.mT * 0.3 + mask, v)
        return q

    arguments = (*qkv(rows=KEYS, keys=KEYS), inputs()[3])
    compare(fuser.run(program, *arguments), program, arguments)
    assert fuser.sites == 3
    merge_masks(fuser.graphs[0].graph)
    assert len({call[3] for call in fuser.calls}) == 1


def test_the_models_own_mask_is_not_computed(fuser):
    fuser.run(added(by_key, MIN), *inputs())
    graph = fuser.graphs[0].graph
    graph.eliminate_dead_code()
    shapes = [n.meta["val"].shape[-2:] for n in graph.nodes if n.op == "call_function" and "attention" not in n.name]
    assert (ROWS, KEYS) not in shapes


# What is no smaller, or not known


def unchanged(fuser, program, arguments):
    compare(fuser.run(program, *arguments), program, arguments)
    assert fuser.sites == 1, fuser.reasons
    assert [s.tags["narrow"] for s in fuser.steps] == ["0"]


@pytest.mark.parametrize("live", [
    lambda i, j, m: (m != 0)[:, None, None, :],  # has as few
    lambda i, j, m: ((i + j) % 3 != 0) & (m != 0)[:, None, None, :],
    lambda i, j, m: ((i + j) % 3 != 0) | (m.cumsum(1) > 3)[:, None, None, :],
])  # fmt: skip
def test_masks_that_are_as_small_as_they_get(fuser, live):
    unchanged(fuser, filled(live, -math.inf), inputs())


def test_a_view_of_a_small_mask_is_small(fuser):
    unchanged(fuser, named(lambda i, j, m: (m != 0)[:, None, None, :].expand(2, 4, ROWS, KEYS), None), inputs())


def test_one_row_needs_no_other_mask(fuser):
    unchanged(fuser, filled(by_key, -math.inf), inputs(rows=1))


def test_an_input_is_what_it_is(fuser):
    def program(q, k, v, m):
        return attend(q @ k.mT * 0.3 + m, v)

    unchanged(fuser, program, (*inputs()[:3], torch.zeros(2, 1, ROWS, KEYS)))


def test_a_mask_whose_source_is_written_to_is_read_as_it_was(fuser):
    def program(q, k, v, m):
        mask = torch.zeros(()).masked_fill(~by_key(*places(q, k), m), MIN)
        m.zero_()
        return attend(q @ k.mT * 0.3 + mask, v)

    first, second = inputs(), inputs()
    actual, expected = fuser.run(program, *first), program(*second)
    torch.testing.assert_close(actual, expected)
    assert tuple(mask_of(fuser).shape) == (2, 1, ROWS, KEYS)


def test_a_mask_that_is_learned_keeps_its_gradient(fuser):
    torch._dynamo.reset()
    q, k, v, _ = inputs()

    def program(q, k, v, weight):
        return attend(q @ k.mT * 0.3 + (weight + torch.zeros(ROWS, 1)), v)

    grads = []
    for run in (program, torch.compile(program, backend=fuser, fullgraph=True)):
        weight = randn(KEYS, seed=7).requires_grad_()
        grads.append(torch.autograd.grad(run(q, k, v, weight).square().sum(), weight)[0])
    torch.testing.assert_close(grads[1], grads[0])
    assert mask_of(fuser).shape[-2] == ROWS


# Gradients


@pytest.mark.parametrize("left", [5, KEYS])
@pytest.mark.parametrize("how, fill", HOW)
def test_gradients(fuser, how, fill, left):
    program, arguments = how(by_key, fill), inputs(left=left)
    found = []
    for run, dtype in ((fuser, torch.float32), (None, torch.float32), (None, torch.float64)):
        torch._dynamo.reset()
        leaves = [t.to(dtype).requires_grad_() for t in arguments[:3]]
        step = program if run is None else torch.compile(program, backend=run, fullgraph=True)
        out = step(*leaves, arguments[3])
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    assert mask_of(fuser).shape[-2] == 1
    for mine, theirs, right in zip(*found, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        mine, theirs, right = (t.nan_to_num() for t in (mine, theirs, right))
        allowed = 2 * (theirs.double() - right).abs().max() + 8 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


# Whatever the mask: the result is eager's, and the mask no larger than what it depends on

PARTS = {
    "padding": lambda a: lambda i, j, m: (m != 0)[:, None, None, :],
    "hole": lambda a: lambda i, j, m: j != a,
    "rows": lambda a: lambda i, j, m: i != a,
    "stripes": lambda a: lambda i, j, m: (i + j) % (abs(a) + 2) != 0,
    "sequences": lambda a: lambda i, j, m: m.sum(1)[:, None, None, None] > a,
    "rows padded": lambda a: lambda i, j, m: (m[:, :ROWS] != 0)[:, None, :, None],
    "everything": lambda a: lambda i, j, m: (i >= 0) & (j >= 0),
}


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(-3, 13)), min_size=1, max_size=3),
    how=st.sampled_from(HOW),
    turned=st.booleans(),
)
def test_any_mask(parts, how, turned):
    conditions = [PARTS[name](a) for name, a in parts]

    def live(i, j, m):
        result = conditions[0](i, j, m)
        for condition in conditions[1:]:
            result = result | condition(i, j, m) if turned else result & condition(i, j, m)
        return result

    program, fuser = how[0](live, how[1]), Fuser()
    for left in (5, 0):
        compare(fuser.run(program, *inputs(left=left)), program, inputs(left=left))
    if {name for name, _ in parts} <= {"padding", "hole", "sequences", "everything"}:
        assert all(call[3] is None or call[3].meta["val"].shape[-2] == 1 for call in fuser.calls)


# What is computed of it


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("how, fill", HOW)
@pytest.mark.parametrize("implementation", ["sdpa", "triton"])
def test_kernels_read_the_small_mask(fuser, implementation, how, fill):
    program, arguments = how(by_key, fill), inputs(left=KEYS)  # a sequence of nothing but padding

    def backend(module, given):
        graph = fuser(module, given)
        for node in graph.graph.nodes:
            if "fxopt.attention" in str(node.target):
                node.target = lambda *args, **kwargs: attention.run(implementation, *args, **kwargs)
        graph.recompile()
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        compare(torch.compile(program, backend=backend, fullgraph=True)(*arguments), program, arguments)


@pytest.mark.parametrize("kind, config, left", [
    ("bert", models.BASE, 3), ("distilbert", {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 1,
     "n_heads": 4}, 7),
])  # fmt: skip
@pytest.mark.parametrize("written", ["eager", "sdpa"])
def test_encoders_have_masks_by_key(fuser, kind, config, left, written):
    model = models.build(kind, written, **config)
    given = models.text(left=left)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=fuser)(**given)[0], model(**given)[0])
    assert tuple(mask_of(fuser).shape) == (2, 1, 1, 7)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_left_beside_bounds(monkeypatch, tmp_path, fuser, everywhere):
    """Two masks, of which one is read as bounds where those are wanted: the other is small in any case."""
    fusions = (RaiseSoftmax(), RaiseEinsum(), FuseAttention(bounds=everywhere))
    monkeypatch.setattr(attending, "FUSIONS", fusions)

    def program(q, k, v, m):
        i, j = places(q, k)
        penalty = torch.zeros(()).masked_fill(~by_key(i, j, m), -20.0)
        return attend((q @ k.mT * 0.3 + penalty).masked_fill((j > i) | (j < i - 6), -math.inf), v)

    compare(fuser.run(program, *inputs()), program, inputs())
    assert (mask_of(fuser).shape[-2] == 1) is everywhere
