"""Masks that are made in the graph become bounds on each row's keys; what of a mask can't, stays one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attending
import fxopt
from attending import attend, compare, qkv, randn
from fxopt.graph.canonical import merge_masks
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax

MIN = torch.finfo(torch.float32).min
ROWS, KEYS = 30, 40


@pytest.fixture
def bounding(fuser, monkeypatch):
    """The fuser, with bounds wherever they can be had, as on a GPU."""
    monkeypatch.setattr(attending, "FUSIONS", (RaiseSoftmax(), RaiseEinsum(), FuseAttention(bounds=True)))
    return fuser


def places(q, k):
    return torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)[None]


def filled(live, fill):
    def program(q, k, v, m):
        return attend((q @ k.mT * 0.3).masked_fill(~live(*places(q, k), m, q, k), fill), v)

    return program


def added(live, fill):
    def program(q, k, v, m):
        mask = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~live(*places(q, k), m, q, k), fill)
        return attend(q @ k.mT * 0.3 + mask, v)

    return program


def named(live, fill):
    def program(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, live(*places(q, k), m, q, k))

    return program


# m is int64 [2, KEYS]: 0 at the left where keys are padding
def causal(i, j, m, q, k):
    return j <= i


def at_the_end(i, j, m, q, k):
    return j <= i + (k.shape[2] - q.shape[2])


def window(i, j, m, q, k):
    return (j <= i) & (j > i - 6)


def chunks(i, j, m, q, k):
    return (i // 8 == j // 8) & (j <= i)


def lengths(i, j, m, q, k):
    return j < m.sum(-1)[:, None, None, None]


def held_and_new(i, j, m, q, k):
    """A static cache: the length that it holds is a tensor."""
    return j <= i + m[0, 0]


def padded(i, j, m, q, k):
    return (j <= i) & (m != 0)[:, None, None, :]


def padded_window(i, j, m, q, k):
    return window(i, j, m, q, k) & padded(i, j, m, q, k)


def everything(i, j, m, q, k):
    return (j >= 0) & (i >= 0)


# (is_causal, first, last, mask): whether each is there
GIVES = {
    causal: (True, False, False, None),
    at_the_end: (False, False, True, None),
    window: (False, True, True, None),
    chunks: (False, True, True, None),
    lengths: (False, False, True, None),
    held_and_new: (False, False, True, None),
    padded: (False, False, True, (2, 1, 1, KEYS)),
    padded_window: (False, True, True, (2, 1, 1, KEYS)),
    everything: (False, False, False, None),
}


def inputs(rows=ROWS, keys=KEYS, left=11):
    m = torch.ones(2, keys, dtype=torch.int64)
    m[1, :left] = 0
    return (*qkv(rows=rows, keys=keys), m)


def arguments_of(args):
    args = (*args, *[None] * (13 - len(args)))
    mask = None if args[3] is None else tuple(args[3].meta["val"].shape)
    return args[5], args[10] is not None, args[11] is not None, mask


@pytest.mark.parametrize("live", GIVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how, fill", [(filled, -math.inf), (added, MIN), (named, None)])
def test_masks_become_bounds(bounding, how, fill, live):
    program = how(live, fill)
    compare(bounding.run(program, *inputs()), program, inputs())
    assert bounding.sites == 1, bounding.reasons
    (args,) = bounding.calls
    assert arguments_of(args) == GIVES[live]
    never = live not in (padded, padded_window, held_and_new, lengths)
    if not args[5] and never and live is not everything:
        assert args[6] == "zero"  # every row has a live key
    elif not never:
        assert args[6] == {filled: "nan", added: "uniform", named: "zero"}[how]


@pytest.mark.parametrize(
    "live", [causal, at_the_end, window, chunks, held_and_new, padded_window], ids=lambda f: f.__name__
)
def test_symbolic_sizes_stay_symbolic(bounding, live):
    torch._dynamo.reset()
    program = added(live, MIN)
    compiled = torch.compile(program, backend=bounding, fullgraph=True)
    for rows, keys in ((30, 40), (33, 35), (9, 60)):
        q, k, v, m = inputs(rows, keys)
        m[:] = torch.maximum(m, torch.tensor(1)) if live is held_and_new else m
        for tensor, dims in ((q, (2,)), (k, (2,)), (v, (2,)), (m, (1,))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        with torch.no_grad():
            compare(compiled(q, k, v, m), program, (q, k, v, m))
    assert bounding.sites == 1, bounding.reasons
    assert len(bounding.graphs) == 1
    assert arguments_of(bounding.calls[0])[:3] == GIVES[live][:3]


def test_packed_sequences_are_found_by_bisection(bounding):
    def program(q, k, v, positions):
        segment = torch.cumsum(torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1, -1)
        i, j = places(q, k)
        live = (segment[:, None, :, None] == segment[:, None, None, :]) & (j <= i)
        return attend((q @ k.mT * 0.3).masked_fill(~live, -math.inf), v)

    positions = torch.cat([torch.arange(n) for n in (7, 15, 18)])[None].expand(2, -1).contiguous()
    arguments = (*qkv(rows=KEYS, keys=KEYS), positions)
    compare(bounding.run(program, *arguments), program, arguments)
    assert bounding.sites == 1, bounding.reasons
    assert arguments_of(bounding.calls[0]) == (False, True, True, None)


def test_documents_in_any_order_stay_a_mask_within_the_bounds(bounding):
    program = filled(lambda i, j, m, q, k: (m[:, None, :ROWS, None] == m[:, None, None, :]) & (j <= i), -math.inf)
    compare(bounding.run(program, *inputs()), program, inputs())
    assert arguments_of(bounding.calls[0]) == (False, False, True, (2, 1, ROWS, KEYS))


def documents(i, j, m, q, k):
    return (m[:, None, : q.shape[2], None] == m[:, None, None, : k.shape[2]]) & (j <= i)


@pytest.mark.parametrize("fill", [-math.inf, MIN])
@pytest.mark.parametrize("order", ["sorted", "any", "padded"])
def test_documents_of_as_many_rows_as_keys_are_numbers(bounding, fill, order):
    numbers = torch.arange(KEYS).expand(2, -1) // 9
    given = {"sorted": numbers, "any": numbers[:, torch.randperm(KEYS)], "padded": numbers.where(numbers < 3, 0)}
    program, arguments = added(documents, fill), (*qkv(rows=KEYS, keys=KEYS), given[order])
    compare(bounding.run(program, *arguments), program, arguments)
    assert bounding.sites == 1, bounding.reasons
    assert arguments_of(bounding.calls[0]) == (False, True, True, (2, 1, KEYS))
    assert bounding.calls[0][3].meta["val"].dtype == torch.int32


def test_layers_share_the_numbers_of_documents(bounding):
    def program(q, k, v, m):
        for _ in range(3):
            q = added(documents, MIN)(q, k, v, m)
        return q

    arguments = (*qkv(rows=KEYS, keys=KEYS), torch.arange(KEYS).expand(2, -1) // 9)
    compare(bounding.run(program, *arguments), program, arguments)
    assert bounding.sites == 3
    graph = bounding.graphs[0].graph
    merge_masks(graph)
    assert len({(call[3], call[10], call[11]) for call in bounding.calls}) == 1
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.amin.default)) == 1


def test_numbers_of_documents_at_symbolic_sizes(bounding):
    torch._dynamo.reset()
    program = added(documents, MIN)
    compiled = torch.compile(program, backend=bounding, fullgraph=True)
    for keys in (40, 23):
        arguments = (*qkv(rows=keys, keys=keys), torch.arange(keys).expand(2, -1).clone() // 9)
        for tensor, dim in zip(arguments, (2, 2, 2, 1), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        with torch.no_grad():
            compare(compiled(*arguments), program, arguments)
    assert len(bounding.graphs) == 1
    assert arguments_of(bounding.calls[0])[:3] == (False, True, True)


@pytest.mark.parametrize("live", [
    lambda i, j, m, q, k: documents(i, j, m, q, k) & (j > i - 7),
    lambda i, j, m, q, k: documents(i, j, m, q, k) & (m != 3)[:, None, None],
    lambda i, j, m, q, k: documents(i, j, m, q, k) | (j == i),
    lambda i, j, m, q, k: documents(i, j, m // 2, q, k) & documents(i, j, m % 3, q, k),
    lambda i, j, m, q, k: (m[:, None, :, None] == m[:, None, None] + 1) & (j <= i),
])  # fmt: skip
def test_other_masks_of_documents_stay_masks(bounding, live):
    arguments = (*qkv(rows=KEYS, keys=KEYS), torch.arange(KEYS).expand(2, -1) // 9)
    program = added(live, MIN)
    compare(bounding.run(program, *arguments), program, arguments)
    assert bounding.sites == 1, bounding.reasons
    assert bounding.calls[0][3].meta["val"].dtype in (torch.bool, torch.float32)


def test_documents_stay_a_mask_where_gradients_flow(bounding):
    torch._dynamo.reset()
    program = added(documents, MIN)
    q, k, v = (t.requires_grad_() for t in qkv(rows=KEYS, keys=KEYS))
    m = torch.arange(KEYS).expand(2, -1) // 9
    torch.compile(program, backend=bounding, fullgraph=True)(q, k, v, m).sum().backward()
    assert bounding.calls[0][3].meta["val"].dtype == torch.bool


def test_a_bias_beside_a_window(bounding):
    def program(q, k, v, m, bias):
        i, j = places(q, k)
        return attend((q @ k.mT * 0.3 + bias).masked_fill(~window(i, j, m, q, k), -math.inf), v)

    arguments = (*inputs(), randn(4, ROWS, KEYS, seed=7))
    compare(bounding.run(program, *arguments), program, arguments)
    assert arguments_of(bounding.calls[0]) == (False, True, True, (4, ROWS, KEYS))


def test_a_sink_beside_a_padded_window(bounding):
    """GPT-OSS."""

    def program(q, k, v, m, sinks):
        mask = torch.zeros(()).masked_fill(~padded_window(*places(q, k), m, q, k), MIN)
        s = torch.cat([q @ k.mT * 0.3 + mask, sinks.reshape(1, -1, 1, 1).expand(2, -1, ROWS, 1)], -1)
        return torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :-1] @ v

    arguments = (*inputs(), randn(4, seed=7))
    compare(bounding.run(program, *arguments), program, arguments)
    assert arguments_of(bounding.calls[0]) == (False, True, True, (2, 1, 1, KEYS))


def test_a_soft_cap_in_a_window(bounding):
    """Gemma 2."""

    def program(q, k, v, m):
        mask = torch.zeros(()).masked_fill(~window(*places(q, k), m, q, k), MIN)
        return attend(torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0 + mask, v)

    compare(bounding.run(program, *inputs()), program, inputs())
    assert arguments_of(bounding.calls[0]) == (False, True, True, None)


# What must stay as it is


def test_two_finite_masks_stay_masks(bounding):
    """Where both take a key out their sum is -inf, and a row of one of them alone is uniform."""

    def program(q, k, v, m):
        i, j = places(q, k)
        first, second = (torch.zeros(()).masked_fill(~live, MIN) for live in (j <= i, (m != 0)[:, None, None, :]))
        return attend(q @ k.mT * 0.3 + first + second, v)

    compare(bounding.run(program, *inputs()), program, inputs())
    assert arguments_of(bounding.calls[0])[:3] == (False, False, False)


def test_numbers_that_absorb_nothing_stay_masks(bounding):
    def program(q, k, v, m):
        i, j = places(q, k)
        return attend(q @ k.mT * 0.3 + torch.zeros(()).masked_fill(j > i, -20.0), v)

    compare(bounding.run(program, *inputs()), program, inputs())
    assert arguments_of(bounding.calls[0])[:3] == (False, False, False)


def test_a_mask_that_is_an_input_stays_a_mask(bounding):
    program = lambda q, k, v, m: attend(q @ k.mT * 0.3 + m, v)  # noqa: E731
    arguments = (
        *qkv(rows=ROWS, keys=KEYS),
        torch.zeros(ROWS, KEYS).masked_fill(~torch.ones(ROWS, KEYS).tril().bool(), MIN),
    )
    compare(bounding.run(program, *arguments), program, arguments)
    assert arguments_of(bounding.calls[0]) == (False, False, False, (ROWS, KEYS))


def test_on_a_cpu_only_causality_is_taken_from_masks(fuser):
    for live, expected in ((window, (False, False, False, (ROWS, KEYS))), (everything, GIVES[everything])):
        fuser.graphs.clear()
        program = named(live, None)
        compare(fuser.run(program, *inputs()), program, inputs())
        assert arguments_of(fuser.calls[0]) == expected


def test_a_length_written_to_is_read_in_time(bounding):
    """A static cache moves its length on before its keys are attended to."""

    def program(q, k, v, m, length):
        i, j = places(q, k)
        live = j <= i + length
        out = attend((q @ k.mT * 0.3).masked_fill(~live, -math.inf), v)
        return out, length.add_(3)

    for _ in range(2):
        ours, theirs = torch.tensor(4), torch.tensor(4)
        with torch.no_grad():
            right = program(*inputs(), theirs)[0]
            y = torch.compile(lambda *a: program(*a)[0], backend=bounding, fullgraph=True)(*inputs(), ours)
        torch.testing.assert_close(y, right)
        assert ours == theirs


def gradients(program, arguments, backend, dtype):
    leaves = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in arguments]
    run = torch.compile(program, backend=backend, fullgraph=True) if backend is not None else program
    out = run(*leaves)
    grads = torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)).sum(), leaves[:3]
    )
    return [out, *grads]


@pytest.mark.parametrize("live, how, fill, bounded", [
    (window, added, MIN, True),
    (padded, added, MIN, False),  # an added number passes gradients on in rows without a live key
    (padded, filled, MIN, True),
    (padded, filled, -math.inf, True),
    (chunks, named, None, True),
])  # fmt: skip
def test_gradients(bounding, live, how, fill, bounded):
    torch._dynamo.reset()
    program = how(live, fill)
    ours = gradients(program, inputs(), bounding, torch.float32)
    eager, exact = (gradients(program, inputs(), None, dtype) for dtype in (torch.float32, torch.float64))
    assert bounding.sites == 1, bounding.reasons
    assert arguments_of(bounding.calls[0])[2] is bounded
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        mine, theirs, right = (t.nan_to_num() for t in (mine, theirs, right))
        allowed = 2 * (theirs.double() - right).abs().max() + 8 * torch.finfo(torch.float32).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


def test_layers_share_what_they_make_of_a_mask(bounding):
    def program(q, k, v, m):
        live = padded_window(*places(q, k), m, q, k)
        for _ in range(3):
            q = attend((q @ k.mT * 0.3).masked_fill(~live, -math.inf), v)
        return q

    torch._dynamo.reset()
    q, k, v, m = inputs()
    torch._dynamo.mark_dynamic(q, 2)
    torch._dynamo.mark_dynamic(k, 2)
    torch._dynamo.mark_dynamic(v, 2)
    torch._dynamo.mark_dynamic(m, 1)
    with torch.no_grad():
        compare(torch.compile(program, backend=bounding, fullgraph=True)(q, k, v, m), program, (q, k, v, m))
    (graph,) = bounding.graphs
    merge_masks(graph.graph)
    assert bounding.sites == 3
    assert len({(args[3], args[10], args[11]) for args in bounding.calls}) == 1


# Whatever the mask, and wherever its bounds lie: the result is eager's

PARTS = {
    "upper": lambda a: lambda i, j, m: j <= i + a,
    "strictly below": lambda a: lambda i, j, m: j < i + a,
    "lower": lambda a: lambda i, j, m: j > i - a,
    "twice as far": lambda a: lambda i, j, m: 2 * j <= i + a,
    "chunk": lambda a: lambda i, j, m: i // (abs(a) + 2) == (j + 1) // (abs(a) + 2),
    "length": lambda a: lambda i, j, m: j < m.sum(-1)[:, None, None, None] - a,
    "padding": lambda a: lambda i, j, m: (m != 0)[:, None, None, :],
    "hole": lambda a: lambda i, j, m: j != a,
    "stripes": lambda a: lambda i, j, m: (i + j) % (abs(a) + 2) != 0,
    "prefix": lambda a: lambda i, j, m: (j <= i) | (j < a),
    "some rows": lambda a: lambda i, j, m: i > a,
}


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(-3, 8)), min_size=1, max_size=3),
    how=st.sampled_from([filled, added, named]),
    fill=st.sampled_from([-math.inf, MIN]),
    turned=st.booleans(),
)
def test_any_mask(parts, how, fill, turned):
    attending.FUSIONS, before = (RaiseSoftmax(), RaiseEinsum(), FuseAttention(bounds=True)), attending.FUSIONS
    try:
        conditions = [PARTS[name](a) for name, a in parts]

        def live(i, j, m, q, k):
            result = conditions[0](i, j, m)
            for condition in conditions[1:]:
                result = result | condition(i, j, m) if turned else result & condition(i, j, m)
            return result

        program, fuser = how(live, fill), attending.Fuser()
        compare(fuser.run(program, *inputs(12, 14, 5)), program, inputs(12, 14, 5))
        assert fuser.sites == 1, fuser.reasons
    finally:
        attending.FUSIONS = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("live", [window, chunks, at_the_end])
def test_on_a_gpu_bounds_are_what_the_kernels_get(live, trained):
    program = added(live, torch.finfo(torch.bfloat16).min)
    tensors = [t.to("cuda", torch.bfloat16) for t in qkv(rows=1000, keys=1024, width=64)]
    m = torch.ones(2, 1024, dtype=torch.int64, device="cuda")

    def run(step, dtype):
        leaves = [t.to(dtype).requires_grad_(trained) for t in tensors]
        out = step(*leaves, m)
        return [out.detach(), *(torch.autograd.grad(out.sum(), leaves) if trained else ())]

    torch._dynamo.reset()
    with fxopt.record() as rec:
        ours = run(torch.compile(program, backend="fxopt", fullgraph=True), torch.bfloat16)
    assert [site.implementation for site in rec.sites] == ["triton_trained" if trained else "triton"]
    eager, exact = run(program, torch.bfloat16), run(added(live, torch.finfo(torch.float64).min), torch.float64)
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs.double() - right).abs().max() + torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("live, implementation", [(window, "sdpa"), (padded, "decomposed")])
@pytest.mark.usefixtures("without_inductor")
def test_added_masks_that_leave_every_row_a_key_are_differentiated_by_sdpa(live, implementation):
    torch._dynamo.reset()
    tensors = [t.requires_grad_() for t in qkv(rows=ROWS, keys=KEYS)]
    with fxopt.record() as rec:
        torch.compile(added(live, MIN), backend="fxopt", fullgraph=True)(*tensors, inputs()[3]).sum().backward()
    assert [site.implementation for site in rec.sites] == [implementation]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ordered", [False, True])
def test_on_a_gpu_documents_are_numbers(ordered):
    program = added(documents, torch.finfo(torch.bfloat16).min)
    q, k, v = (t.to("cuda", torch.bfloat16) for t in qkv(rows=1024, keys=1024, width=64))
    numbers = torch.arange(1024, device="cuda").expand(2, -1) // 130
    numbers = numbers if ordered else numbers[:, torch.randperm(1024, device="cuda")]
    torch._dynamo.reset()
    with fxopt.record() as rec, torch.no_grad():
        ours = torch.compile(program, backend="fxopt", fullgraph=True)(q, k, v, numbers)
        eager, exact = program(q, k, v, numbers), program(q.double(), k.double(), v.double(), numbers)
    assert [site.implementation for site in rec.sites] == ["triton"]
    allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed
