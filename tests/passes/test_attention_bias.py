"""Biases by distance become tables or slopes, by key vectors; finite masks are told apart from what is a bias."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import attending
import fxopt
from attending import compare, qkv, randn
from fxopt.graph.canonical import merge_masks
from fxopt.passes.attention import FuseAttention
from fxopt.passes.raise_einsum import RaiseEinsum
from fxopt.passes.raise_softmax import RaiseSoftmax

INF = math.inf
MIN = torch.finfo(torch.float32).min
ROWS, KEYS, HEADS = 11, 14, 4
EVERY = ROWS + KEYS - 1
FUSIONS = (RaiseSoftmax(), RaiseEinsum(), FuseAttention(bounds=True, tables=True))


@pytest.fixture
def fuser(fuser, monkeypatch):
    """The fuser, with tables wherever they can be had, as on a GPU."""
    monkeypatch.setattr(attending, "FUSIONS", FUSIONS)
    return fuser


def attend(scores, v):
    """Weights in v's dtype, as a bias in float32 makes the scores wider."""
    return torch.softmax(scores, -1).to(v.dtype) @ v


class Bias(nn.Module):
    """Attention with a bias made of learned numbers; `of(weight, i, j)` is [HEADS, rows, keys] or broadcasts to it."""

    def __init__(self, of, *shape, mask=None, fill=MIN, together=False):
        super().__init__()
        self.weight = nn.Parameter(randn(*shape, seed=5))
        self.of, self.mask, self.fill, self.together = of, mask, fill, together

    def forward(self, q, k, v, m=None):
        i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)[None]
        scores, bias = q @ k.mT * 0.3, self.of(self.weight.to(q.dtype), i, j)
        if self.mask is not None:
            live = self.mask(i, j, m)
            mask = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~live, self.fill)
            return attend(scores + (bias + mask) if self.together else scores + bias + mask, v)
        return attend(scores + bias, v)


def bucket(d, buckets=8, far=16, both=True):
    """T5's: exact near 0, logarithmic farther out."""
    found = 0
    if both:
        buckets //= 2
        found = found + (d > 0).long() * buckets
        d = d.abs()
    else:
        d = -torch.min(d, torch.zeros_like(d))
    exact = buckets // 2
    large = exact + (torch.log(d.float() / exact) / math.log(far / exact) * (buckets - exact)).long()
    return found + torch.where(d < exact, d, torch.min(large, torch.full_like(large, buckets - 1)))


def relative(w, i, j):
    return nn.functional.embedding(bucket(j - i), w).permute(2, 0, 1)[None]


def alibi(w, i, j):
    return w[:, None, None] * (j - i)


def clipped(w, i, j):
    return w[:, (j - i).clamp(-3, 4) + 3]


def by_distance(w, i, j):
    return w[:, j - i + (ROWS - 1)]


def absolute_distance(w, i, j):
    return -w.abs()[:, None, None] * (j - i).abs()


def by_key(w, i, j):
    return w[:, None, None] * j


BIASES = {
    relative: (8, HEADS), alibi: (HEADS,), clipped: (HEADS, 8), by_distance: (HEADS, EVERY),
    absolute_distance: (HEADS,), by_key: (HEADS,),
}  # fmt: skip


def padded(i, j, m):
    return (m != 0)[:, None, None, :] & (j >= 0)


def causal(i, j, m):
    return j <= i


def causal_padded(i, j, m):
    return (j <= i) & (m != 0)[:, None, None, :]


def window(i, j, m):
    return (j <= i) & (j > i - 4)


def inputs(rows=ROWS, keys=KEYS, left=5, dtype=torch.float32):
    m = torch.ones(2, keys, dtype=torch.int64)
    m[1, :left] = 0
    return (*qkv(dtype, rows=rows, keys=keys), m)


def shapes(call):
    """(bias, mask, is_causal, first, last, empty_rows) of a call: shapes, or whether they are there."""
    call = (*call, *[None] * (13 - len(call)))
    bias, mask = (None if t is None else tuple(t.meta["val"].shape) for t in (call[12], call[3]))
    return bias, mask, call[5], call[10] is not None, call[11] is not None, call[6]


def check(fuser, program, arguments):
    compare(fuser.run(program, *arguments), program, arguments)
    assert fuser.sites == 1, fuser.reasons
    (call,) = fuser.calls
    return shapes(call)


@pytest.mark.parametrize("of, dtype", [
    *((b, torch.float32) for b in BIASES if b not in (alibi, by_key)),
    *((relative, dtype) for dtype in (torch.bfloat16, torch.float16)), (alibi, torch.bfloat16),
])  # fmt: skip
def test_a_bias_by_distance_is_a_table(fuser, of, dtype):
    program = Bias(of, *BIASES[of])
    *found, empty_rows = check(fuser, program, inputs(dtype=dtype))
    assert found == [(1, HEADS, EVERY), None, False, False, False]
    assert empty_rows == ("zero" if dtype != torch.float16 else "nan")  # what float16 can't hold is infinite there
    # Nothing that is left has as many elements as there are scores.
    values = [n.meta["val"] for n in fuser.graphs[0].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert not [v for v in values if v.numel() >= ROWS * KEYS and tuple(v.shape[-2:]) == (ROWS, KEYS)]


def mpt(w, i, j):
    return w.float()[:, None, None] * (j - j.shape[-1] + 1)


SLOPES = {
    "times a distance": alibi,
    "of a row and a key": lambda w, i, j: -w[:, None, None] * (i - j).float(),
    "quotients": lambda w, i, j: (j - i)[None] / 4.0 * w[:, None, None],
    "a number": lambda w, i, j: 0.1 * (j - i),
    "integers": lambda w, i, j: (3 * j - 3 * i).float(),
    "powers": lambda w, i, j: torch.pow(2.0, -torch.arange(1, HEADS + 1) * 2.0)[:, None, None] * (j - i),
    "by key": mpt,
}


@pytest.mark.parametrize("of", SLOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask, fill", [(None, MIN), (causal, MIN), (causal_padded, MIN)])
def test_a_multiple_of_the_distance_is_a_slope(fuser, of, dtype, mask, fill):
    class Sloped(Bias):
        def forward(self, q, k, v, m):
            i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
            scores = q @ k.mT * 0.3 + self.of(self.weight, i, j)
            if mask is not None:
                scores = scores + torch.zeros(()).masked_fill(~mask(i, j, m), fill)
            return attend(scores, v)

    arguments = inputs(KEYS, KEYS, dtype=dtype)
    program = Sloped(SLOPES[of], HEADS)
    bias, rest, is_causal, _, last, _ = check(fuser, program, arguments)
    assert bias == ((1, 1) if of in ("a number", "integers") else (1, HEADS))
    assert is_causal is (mask is causal)
    assert (rest, last) == (((2, 1, 1, KEYS), True) if mask is causal_padded else (None, False))


@pytest.mark.parametrize("of, rows", [
    (lambda w, i, j: (w[:, None, None] * (j - i)).to(torch.bfloat16).float(), KEYS),  # a staircase
    (lambda w, i, j: w[:, None, None].half() * (j - i), KEYS),
    (lambda w, i, j: w[:, None, None] * (j - i - 2), KEYS),
    (lambda w, i, j: w[:, None, None] * (j - i).clamp(-2), KEYS),
    (lambda w, i, j: w[:, None, None] * (j - i) * (j - i), KEYS),
    (lambda w, i, j: w[:, None, None] * ((j - i) // 2), KEYS),
    (mpt, ROWS),  # of more keys than rows, what counts from the last key stays small where it matters
    (lambda w, i, j: w[:, None, None] / (j - i + 100), KEYS),
])  # fmt: skip
def test_other_biases_are_no_slopes(fuser, of, rows):
    bias, *_ = check(fuser, Bias(of, HEADS), inputs(rows, KEYS))
    assert bias is None or len(bias) > 2


def test_beside_a_sink_only_the_distance_itself_is_one(fuser):
    def program(q, k, v, w, sink, shift):
        i, j = torch.arange(KEYS)[:, None], torch.arange(KEYS)[None]
        bias = w[:, None, None] * (j - (i if shift == 0 else KEYS))
        scores = torch.cat([q @ k.mT * 0.3 + bias, sink.expand(2, HEADS, KEYS, 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v

    tensors = (*qkv(rows=KEYS, keys=KEYS), randn(HEADS, seed=7), randn(HEADS, 1, 1, seed=8))
    found = []
    for shift in (0, 1):
        fuser.graphs.clear(), fuser.steps.clear()
        found.append(check(fuser, program, (*tensors, shift))[0])
    assert found == [(1, HEADS), None]


def test_a_slope_and_another_bias_are_one_table(fuser):
    program = Bias(lambda w, i, j: w[:, 0, None, None] * (j - i) + clipped(w, i, j), HEADS, 8)
    assert check(fuser, program, inputs())[0] == (1, HEADS, EVERY)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("of", [
    relative, by_key, *(pytest.param(b, marks=pytest.mark.slow) for b in (alibi, clipped, absolute_distance)),
], ids=lambda f: f.__name__)  # fmt: skip
@pytest.mark.parametrize("mask, fill, expected", [
    (causal, MIN, (None, True, False, False, "zero")),
    (causal, -INF, (None, True, False, False, None)),
    (window, MIN, (None, False, True, True, "zero")),
    (padded, MIN, ((2, 1, 1, KEYS), False, False, False, "uniform")),
    (padded, -INF, ((2, 1, 1, KEYS), False, False, False, "nan")),
    (causal_padded, MIN, ((2, 1, 1, KEYS), False, False, True, "uniform")),
])  # fmt: skip
def test_masks_are_told_apart(fuser, of, together, mask, fill, expected):
    program = Bias(of, *BIASES[of], mask=mask, fill=fill, together=together)
    bias, *rest = check(fuser, program, inputs())
    if of is by_key and mask is causal and fill == -INF and not together:
        assert (bias, rest[:2]) == (None, [(HEADS, 1, KEYS), True])  # a mask of one row as it is
        return
    assert bias == {by_key: (1, HEADS, 1, KEYS), alibi: (1, HEADS)}.get(of, (1, HEADS, EVERY))
    assert tuple(rest) == expected or (tuple(rest[:-1]), expected[-1]) == (expected[:-1], None)


@pytest.mark.parametrize("of", [relative, alibi, by_key], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mask", [None, causal_padded], ids=["alone", "masked"])
def test_symbolic_sizes_stay_symbolic(fuser, of, mask):
    torch._dynamo.reset()
    program = Bias(of, *BIASES[of], mask=mask)
    compiled = torch.compile(program, backend=fuser, fullgraph=True)
    for rows, keys in ((11, 14), (13, 9), (4, 30)):
        q, k, v, m = inputs(rows, keys)
        for tensor, dims in ((q, (2,)), (k, (2,)), (v, (2,)), (m, (1,))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        with torch.no_grad():
            compare(compiled(q, k, v, m), program, (q, k, v, m))
    assert len(fuser.graphs) == 1
    if of is not by_key or mask is not None:
        assert fuser.calls[0][12] is not None


def test_rows_begin_at_a_place_known_at_run_time(fuser):
    """A static cache: a few rows, after as many keys as it holds."""

    class Cached(Bias):
        def forward(self, q, k, v, length):
            i = torch.arange(q.shape[2])[:, None] + length
            j = torch.arange(k.shape[2])[None]
            mask = torch.zeros(()).masked_fill(j > i, MIN)
            return attend(q @ k.mT * 0.3 + relative(self.weight, i, j) + mask, v)

    program = Cached(None, 8, HEADS)
    for length in (0, 9):
        fuser.graphs.clear(), fuser.steps.clear()
        found = check(fuser, program, (*qkv(rows=3, keys=20), torch.tensor(length)))
        assert found[0] == (1, HEADS, 22)
        assert found[1:4] == (None, False, False)
        assert found[4]


# What must stay as it is


@pytest.mark.parametrize("of, shape", [
    (lambda w, i, j: w[:, None, None] * i, (HEADS,)),
    (lambda w, i, j: w[:, None, None] * (i + j), (HEADS,)),
    (lambda w, i, j: w[None, :ROWS, None] * w[None, None, :KEYS], (EVERY,)),
    (lambda w, i, j: w, (HEADS, ROWS, KEYS)),
    (lambda w, i, j: w[:, i % 3 + j], (HEADS, EVERY)),
    (lambda w, i, j: w[:, 2 * j - i + ROWS], (HEADS, 2 * EVERY)),
    (lambda w, i, j: w[:, None, None] * (j - i) * (i > 4), (HEADS,)),
    (lambda w, i, j: w[:, None, None] * ((j - i) + i // 7), (HEADS,)),
])  # fmt: skip
@pytest.mark.parametrize("mask", [None, causal], ids=["alone", "causal"])
def test_other_biases_stay_masks(fuser, of, shape, mask):
    assert check(fuser, Bias(of, *shape, mask=mask), inputs())[0] is None


def test_a_row_and_a_batch_of_contents_stay_masks(fuser):
    def program(q, k, v, x):
        i, j = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None]
        return attend(q @ k.mT * 0.3 + x[:, None, :ROWS, None] * (j - i), v)

    assert check(fuser, program, (*qkv(rows=ROWS, keys=KEYS), randn(2, KEYS, seed=7)))[0] is None


@pytest.mark.parametrize("fill, apart", [(MIN, False), (-INF, True)])
def test_what_may_be_a_mask_itself_is_not_told_apart_from_finite_ones(fuser, fill, apart):
    """A table that is an input may rule out all keys that causality leaves: then the others count."""

    def program(q, k, v, table):
        i, j = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None]
        mask = torch.zeros(()).masked_fill(j > i, fill)
        return attend(q @ k.mT * 0.3 + table[:, j - i + (ROWS - 1)] + mask, v)

    table = randn(HEADS, EVERY, seed=7)
    table[:, : ROWS - 2] = MIN
    arguments = (*qkv(rows=ROWS, keys=KEYS), table)
    bias, mask, is_causal, *_ = check(fuser, program, arguments)
    assert is_causal is apart
    assert (bias is not None) or (mask is not None)


def test_an_opaque_mask_beside_a_bias_stays_one(fuser):
    def of(w, i, j):
        return relative(w, i, j)

    class Masked(Bias):
        def forward(self, q, k, v, given):
            i, j = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None]
            return attend(q @ k.mT * 0.3 + self.of(self.weight, i, j) + given, v)

    hard = torch.zeros(2, 1, ROWS, KEYS).masked_fill(torch.rand(2, 1, ROWS, KEYS) < 0.5, MIN)
    hard[0, 0, 3] = MIN
    found = check(fuser, Masked(of, 8, HEADS), (*qkv(rows=ROWS, keys=KEYS), hard))
    assert found == ((1, HEADS, EVERY), (2, 1, ROWS, KEYS), False, False, False, "nan")


def test_two_finite_masks_beside_a_bias_stay_masks(fuser):
    class Masked(Bias):
        def forward(self, q, k, v, m):
            i, j = torch.arange(ROWS)[:, None], torch.arange(KEYS)[None]
            one, other = (torch.zeros(()).masked_fill(~f(i, j, m), MIN) for f in (causal, padded))
            return attend(q @ k.mT * 0.3 + alibi(self.weight, i, j) + one + other, v)

    assert check(fuser, Masked(None, HEADS), inputs())[2:5] == (False, False, False)


def test_without_tables_everything_is_as_it_was(fuser, monkeypatch):
    monkeypatch.setattr(attending, "FUSIONS", (RaiseSoftmax(), RaiseEinsum(), FuseAttention()))
    assert check(fuser, Bias(alibi, HEADS, mask=causal), inputs())[:3] == (None, (HEADS, ROWS, KEYS), False)


@pytest.mark.parametrize("dtype, large, expected", [
    (torch.bfloat16, True, ((1, HEADS), None, True)), (torch.float32, True, (None, (HEADS, ROWS, KEYS), False)),
    (torch.bfloat16, False, (None, (HEADS, ROWS, KEYS), False)),
])  # fmt: skip
def test_on_a_gpu_slopes_are_the_default(fuser, monkeypatch, dtype, large, expected):
    monkeypatch.setattr("fxopt.passes.attention._on_gpu", lambda value: True)
    monkeypatch.setattr("fxopt.passes.attention.is_large", lambda rows, keys: large)
    monkeypatch.setattr(attending, "FUSIONS", (RaiseSoftmax(), RaiseEinsum(), FuseAttention()))
    program = Bias(lambda w, i, j: alibi(w.float(), i, j), HEADS, mask=causal, fill=torch.finfo(dtype).min)
    assert check(fuser, program, inputs(dtype=dtype))[:3] == expected


# Beyond one site


def test_layers_share_a_table(fuser):
    class Layers(Bias):
        def forward(self, q, k, v):
            i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
            bias = relative(self.weight, i, j)
            for _ in range(3):
                q = attend(q @ k.mT * 0.3 + bias, v)
            return q

    program = Layers(None, 8, HEADS)
    arguments = qkv(rows=ROWS, keys=KEYS)
    compare(fuser.run(program, *arguments), program, arguments)
    assert fuser.sites == 3
    merge_masks(fuser.graphs[0].graph)
    assert len({call[12] for call in fuser.calls}) == 1


@pytest.mark.parametrize("of", [relative, clipped, alibi], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mask, fill", [(None, MIN), (causal, MIN), (padded, -INF)])
def test_gradients_reach_the_numbers_that_the_bias_is_made_of(fuser, of, mask, fill):
    torch._dynamo.reset()
    program = Bias(of, *BIASES[of], mask=mask, fill=fill)
    q, k, v, m = inputs(left=3)

    def gradients(step, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = step(*leaves, m)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, program.weight])]

    ours = gradients(torch.compile(program, backend=fuser, fullgraph=True), torch.float32)
    eager, exact = gradients(program, torch.float32), gradients(program, torch.float64)
    assert fuser.sites == 1, fuser.reasons
    assert fuser.calls[0][12].meta["val"].dim() == 3  # also of slopes, which are learned
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        allowed = 2 * (theirs.double() - right).abs().max() + 1e-5 * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


PARTS = {
    "alibi": lambda a: lambda i, j: (j - i) * (0.1 * a),
    "steps": lambda a: lambda i, j: ((j - i) // (abs(a) + 1)).float(),
    "parity": lambda a: lambda i, j: ((j - i + a) % 3).float(),
    "near": lambda a: lambda i, j: ((j - i).abs() < abs(a)).float(),
    "key": lambda a: lambda i, j: (j * a).float() * 0.1,
    "row": lambda a: lambda i, j: (i * a).float() * 0.1,
    "sum": lambda a: lambda i, j: (i + j + a).float() * 0.1,
    "grid": lambda a: lambda i, j: ((i // 4) == (j // 4)).float() * a,
    "almost": lambda a: lambda i, j: torch.where(i == abs(a), 1.0, (j - i).float() * 0.1),
    "maximum": lambda a: lambda i, j: torch.maximum(j - i, i - 5).float() * 0.1,
}


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    parts=st.lists(st.tuples(st.sampled_from(sorted(PARTS)), st.integers(-5, 5)), min_size=1, max_size=3),
    masks=st.lists(st.sampled_from([causal, window, padded, causal_padded]), max_size=2),
    fill=st.sampled_from([-INF, MIN]),
    product=st.booleans(),
)
def test_any_bias(parts, masks, fill, product):
    terms = [PARTS[name](a) for name, a in parts]

    def program(q, k, v, m):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        bias = terms[0](i, j)
        for term in terms[1:]:
            bias = bias * term(i, j) if product else bias + term(i, j)
        s = q @ k.mT * 0.3 + bias
        for mask in masks:
            s = s + torch.zeros(()).masked_fill(~mask(i, j, m), fill)
        return attend(s, v)

    before, attending.FUSIONS = attending.FUSIONS, FUSIONS
    try:
        fuser = attending.Fuser()
        compare(fuser.run(program, *inputs(12, 9)), program, inputs(12, 9))
        assert fuser.sites == 1, fuser.reasons
        only_near = all(name in ("alibi", "steps", "parity", "near") for name, _ in parts)
        if only_near and not masks and fuser.calls[0][3] is not None:
            assert len(fuser.calls[0][3].meta["val"].shape) < 2 or len(parts) > 1
    finally:
        attending.FUSIONS = before


# Models of transformers

SMALL = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "umt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
}


def models():
    """(kind, padding, dynamic). With dynamic=True Falcon scales by a number that is known at run time only."""
    for kind in SMALL:
        for padding, dynamic in ((0, None), (4, None), (4, True)):
            if not (kind == "falcon" and dynamic):
                slow = padding or kind in ("mt5", "umt5")
                yield pytest.param(kind, padding, dynamic, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("kind, padding, dynamic", models())
def test_models(fuser, kind, padding, dynamic):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, **SMALL[kind])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.randint(0, 64, (2, 13))
    given = {"input_ids": ids, "use_cache": False}
    if padding:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, :padding] = 0
    if "t5" in kind:
        given["decoder_input_ids"] = ids[:, :7]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**given)[0]
        actual = torch.compile(model, backend=fuser, dynamic=dynamic)(**given)[0]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    own = [shapes(call)[0] for call in fuser.calls if "t5" not in kind or len(call) == 13]
    assert fuser.sites == (6 if "t5" in kind else 2)
    assert len(own) == (4 if "t5" in kind else 2)
    for bias in own:
        expected = (25, 13) if "t5" in kind else (4,) if kind == "mpt" or (kind == "bloom" and not padding) else (13,)
        assert dynamic or bias[-1] in expected  # BLOOM counts what is not padding
    for call in fuser.calls:
        mask = shapes(call)[1]
        assert mask is None or mask[-2] == 1 or "t5" in kind  # cross attention's is no site with a bias


def fixed(w, i, j):
    """ALiBi as models have it: its slopes are not learned."""
    return torch.exp2(-torch.arange(1.0, HEADS + 1, device=i.device))[:, None, None] * (j - i)


@pytest.mark.parametrize("of, dims", [(fixed, 2), (alibi, 0)])
def test_on_a_gpu_slopes_that_are_not_learned_are_the_default_in_training(fuser, monkeypatch, of, dims):
    monkeypatch.setattr("fxopt.passes.attention._on_gpu", lambda value: True)
    monkeypatch.setattr("fxopt.passes.attention.is_large", lambda rows, keys: True)
    monkeypatch.setattr(attending, "FUSIONS", (RaiseSoftmax(), RaiseEinsum(), FuseAttention()))
    torch._dynamo.reset()
    program = Bias(of, HEADS, mask=causal)
    leaves = [t.requires_grad_() for t in inputs()[:3]]
    torch.compile(program, backend=fuser, fullgraph=True)(*leaves).sum().backward()
    assert fuser.sites == 1, fuser.reasons
    (call,) = fuser.calls
    assert (len(call[12].meta["val"].shape) if len(call) == 13 else 0) == dims


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("of, implementation", [(fixed, "triton_trained"), (alibi, "decomposed")])
def test_on_a_gpu_biases_that_need_no_gradient_are_tables_in_training(of, implementation):
    program = Bias(of, HEADS, mask=causal, fill=torch.finfo(torch.bfloat16).min).cuda()
    tensors = [t.to("cuda", torch.bfloat16) for t in qkv(rows=1000, keys=1024, width=64)]

    def gradients(step, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = step(*leaves)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    torch._dynamo.reset()
    with fxopt.record() as rec:
        ours = gradients(torch.compile(program, backend="fxopt", fullgraph=True), torch.bfloat16)
    assert [site.implementation for site in rec.sites] == [implementation]
    for mine, theirs, right in zip(
        ours, gradients(program, torch.bfloat16), gradients(program, torch.float64), strict=True
    ):
        allowed = 2 * (theirs.double() - right).abs().max() + torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (mine.double() - right).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("of, mask", [
    *((of, mask) for of in (relative, alibi, by_key) for mask in (causal, causal_padded)), (relative, None),
    (alibi, None),
])  # fmt: skip
@pytest.mark.parametrize("rows, implementation", [(1000, "triton"), (100, "sdpa")])
def test_on_a_gpu_the_kernel_reads_tables_where_there_is_much_to_do(of, mask, rows, implementation):
    """SDPA gets them spread out."""
    fxopt.register(FuseAttention(tables=True))
    program = Bias(of, *BIASES[of], mask=mask, fill=torch.finfo(torch.bfloat16).min).cuda()
    q, k, v = (t.to("cuda", torch.bfloat16) for t in qkv(rows=rows, keys=rows + 24, width=64))
    m = torch.ones(2, rows + 24, dtype=torch.int64, device="cuda")
    torch._dynamo.reset()
    try:
        with fxopt.record() as rec, torch.no_grad():
            ours = torch.compile(program, backend="fxopt", fullgraph=True)(q, k, v, m)
            eager, exact = program(q, k, v, m), program(q.double(), k.double(), v.double(), m)
    finally:
        fxopt.unregister("attention")
    assert [site.implementation for site in rec.sites] == [implementation]
    allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", [None, causal, causal_padded])
@pytest.mark.parametrize("rows, dynamic", [(1000, False), (1024, True)])
def test_on_a_gpu_a_kernel_multiplies_slopes(mask, rows, dynamic):
    program = Bias(fixed, HEADS, mask=mask, fill=torch.finfo(torch.bfloat16).min).cuda()
    q, k, v = (t.to("cuda", torch.bfloat16) for t in qkv(rows=rows, keys=1024, width=64))
    m = torch.ones(2, 1024, dtype=torch.int64, device="cuda")
    m[1, 1000:] = 0
    torch._dynamo.reset()
    if dynamic:
        for t, dim in ((q, 2), (k, 2), (v, 2), (m, 1)):
            torch._dynamo.maybe_mark_dynamic(t, dim)
    with fxopt.record() as rec, torch.no_grad():
        ours = torch.compile(program, backend="fxopt", fullgraph=True)(q, k, v, m)
        eager, exact = program(q, k, v, m), program(q.double(), k.double(), v.double(), m)
    assert [site.implementation for site in rec.sites] == ["triton"]
    allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed
