"""Right rewrites pass, wrong ones don't, and nobody notices that they were checked."""

import dataclasses
import functools
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import sites
from fxopt import cachedir
from fxopt.match.match import Match
from fxopt.ops import fused_op
from fxopt.rewrite import verdicts
from fxopt.rewrite.compare import Distance, distance
from fxopt.rewrite.verify import Verifier

verify, site = sites.verify, sites.site


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path / "cache"))
    verdicts.clear()
    yield tmp_path / "cache"
    verdicts.clear()


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


Q = empty(2, 32, 2048, 128)
KV = empty(2, 8, 2048, 128)


def repeat(x, groups):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)


def causal(rows, keys):
    return torch.arange(rows)[:, None] >= torch.arange(keys)[None, :]


def attention(q, k, v):
    k, v = repeat(k, 4), repeat(v, 4)
    scores = q @ k.transpose(2, 3) * 128**-0.5
    scores = torch.where(causal(q.shape[2], k.shape[2]), scores, -math.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **({"is_causal": True} | options))


def rms_norm(x, w):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


# Right rewrites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_at_2048_is_checked_in_a_blink(dtype):
    inputs = (Q.to(dtype), KV.to(dtype), KV.to(dtype))
    match, replacements = site(attention, sdpa, *inputs)
    spent = []
    for _ in range(3):  # each by a verifier that knows nothing yet; the best, since neighbours on the core slow it down
        start = time.process_time()
        verdict = Verifier().verify(sites.Toy(), match, replacements)
        spent.append(time.process_time() - start)
        assert verdict.status == "equal", verdict
    assert min(spent) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    inputs = empty(1, 2048, 4096, dtype=dtype), empty(4096, dtype=dtype)
    verdict = verify(rms_norm, lambda x, w: F.rms_norm(x, (4096,), w, 1e-6), *inputs)
    assert verdict.status == "equal", verdict


def test_several_outputs():
    def add_norm(x, y, w):
        total = x + y
        return rms_norm(total, w), total

    def fused(x, y, w):
        total = y + x
        return F.rms_norm(total, (512,), w, 1e-6), total

    assert verify(add_norm, fused, empty(4, 512), empty(4, 512), empty(512)).status == "equal"


def test_a_mean_spelled_with_a_literal_size():
    x = empty(64, 4096)
    assert verify(lambda x: x.sum(-1) / 4096, lambda x: x.mean(-1), x).status == "equal"
    assert verify(lambda x: x.sum(-1) * (1 / 4096), lambda x: x.mean(-1), x).status == "equal"
    assert verify(lambda x: x.sum(-1) / 4095, lambda x: x.mean(-1), x).status == "failed"


def test_rotated_halves():
    def rotary(x, c, s):
        return x * c + torch.cat((-x[..., 64:], x[..., :64]), -1) * s

    def rolled(x, c, s):
        sign = torch.where(torch.arange(128) < 64, -1.0, 1.0)
        return x * c + torch.roll(x, 64, -1) * sign * s

    shapes = empty(1, 32, 2048, 128), empty(2048, 128), empty(2048, 128)
    assert verify(rotary, rolled, *shapes).status == "equal"
    assert verify(rotary, lambda x, c, s: x * c + torch.roll(x, 64, -1) * s, *shapes).status == "failed"


def test_int4_weights_by_group():
    def matmul(x, packed, scale):
        w = torch.stack((packed & 15, packed >> 4), -1).reshape(11008, 32, 128).to(x.dtype) - 8
        return F.linear(x, (w * scale[..., None]).reshape(11008, 4096))

    def other(x, packed, scale):
        w = torch.stack((packed & 15, packed >> 4), -1).reshape(11008, 4096).to(x.dtype)
        return F.linear(x, (w - 8) * scale.repeat_interleave(128, 1))

    def shifted(x, packed, scale):
        w = torch.stack((packed >> 4, packed & 15), -1).reshape(11008, 4096).to(x.dtype)
        return F.linear(x, (w - 8) * scale.repeat_interleave(128, 1))

    inputs = empty(1, 4096), empty(11008, 2048, dtype=torch.uint8), empty(11008, 32)
    assert verify(matmul, other, *inputs).status == "equal"
    assert verify(matmul, shifted, *inputs).status == "failed"


def test_indices_stay_inside_their_table():
    inputs = empty(50_000, 64), empty(2, 128, dtype=torch.int64)
    verdict = verify(lambda w, i: F.embedding(i, w), lambda w, i: w[i], *inputs, fusion=sites.Bitwise())
    assert verdict.status == "equal", verdict


def test_a_transposed_input_on_one_side_only():
    """The original reads kᵀ, which was made outside the match; the replacement reads k."""
    verdict = verify(lambda q, k: (q @ k.t()).relu(), lambda q, k: F.linear(q, k).relu(),
                     empty(64, 32), empty(128, 32), keep=["t"])  # fmt: skip
    assert verdict.status == "equal", verdict


def test_a_mask_made_outside_the_match():
    verdict = verify(
        attention, sdpa, Q, KV, KV, keep=["arange", "ge", "unsqueeze_2", "unsqueeze_3"]
    )  # the mask's chain is not matched, and the replacement doesn't read it
    assert verdict.status == "equal", verdict


@pytest.mark.parametrize(
    "when, write, status",
    [
        ("before", lambda mask: mask.logical_not_(), "failed"),
        ("before", lambda mask: mask[3:].logical_not_(), "failed"),  # through a view
        ("after", lambda mask: mask.logical_not_(), "equal"),
        ("after", lambda mask: mask[3:].logical_not_(), "equal"),
    ],
)
def test_a_mask_made_outside_the_match_and_overwritten(when, write, status):
    def program(q, k, v):
        mask = causal(40, 40)
        if when == "before":
            write(mask)
        scores = torch.where(mask, q @ k.transpose(2, 3) * 16**-0.5, -math.inf)
        out = torch.softmax(scores, -1) @ v
        if when == "after":
            write(mask)
        return out

    q = empty(2, 4, 40, 16)
    verdict = verify(program, F.scaled_dot_product_attention, q, q, q, keep=("arange", "ge", "slice", "logical_not"))
    assert verdict.status == "failed"
    fused = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    verdict = verify(program, fused, q, q, q, keep=("arange", "unsqueeze", "ge", "slice", "logical_not"))
    assert verdict.status == status, verdict


@pytest.mark.parametrize(
    "read, status",
    [
        (lambda x, four: x + four, "failed"),  # x is another one by then
        (lambda x, four: four + four, "equal"),
    ],
)
def test_what_was_made_of_a_value_before_it_is_overwritten(read, status):
    def program(x):
        four, eight = x * 4, x * 8
        x.view(-1).sin_()
        return read(x, four), eight

    module = make_fx(program, pre_dispatch=True, tracing_mode="fake")(empty(64))
    add, eight = module.graph.output_node().args[0]
    match = Match((add,), frozenset({add}), {})
    made = match.call(torch.ops.aten.mul.Tensor, eight, 1 if status == "equal" else 5 / 8)
    assert Verifier().verify(sites.Toy(), match, (made,)).status == status


def test_zero_size_and_scalar_values():
    assert verify(lambda x: x * 2, lambda x: x + x, empty(0, 64)).status == "equal"
    assert verify(lambda x: x * 2, lambda x: x + x, empty()).status == "equal"


def test_complex_values():
    z = empty(64, 64, dtype=torch.complex64)
    assert verify(lambda z: z * z.conj().resolve_conj(), lambda z: z.conj().resolve_conj() * z, z).status == "equal"
    assert verify(lambda z: z * z.conj().resolve_conj(), lambda z: z * z, z).status == "failed"


# Wrong rewrites


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: sdpa(q, k, v, is_causal=False),
        lambda q, k, v: sdpa(q, k, v, scale=1.0),
        lambda q, k, v: sdpa(q, k, v, scale=128**-0.5 * (1 + 1e-6)),
        lambda q, k, v: sdpa(q, v, k),
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat(1, 4, 1, 1), v.repeat(1, 4, 1, 1), is_causal=True
        ),  # heads in the order 0 1 2 .. 0 1 2 in place of 0 0 0 0 1 1 1 1
    ],
    ids=["not causal", "no scale", "scale off by 1e-6", "k for v", "head order"],
)
def test_wrong_attention(wrong):
    verdict = verify(attention, wrong, Q, KV, KV)
    assert verdict.status == "failed", verdict
    assert "float64" in verdict.detail


def test_softmax_over_another_dim():
    x = empty(512, 512)
    assert verify(lambda x: torch.softmax(x, 0), lambda x: torch.softmax(x, -1), x).status == "failed"


def test_a_window_is_inside_the_stand_in_sequence():
    def windowed(window):
        def run(x):
            rows, keys = torch.arange(8192)[:, None], torch.arange(8192)[None, :]
            return torch.where((rows >= keys) & (rows - keys < window), x, -math.inf)

        return run

    x = empty(8192, 8192)

    def plain(x):
        return torch.where(causal(8192, 8192), x, -math.inf)

    assert verify(windowed(4096), windowed(4096), x).status == "equal"
    assert verify(windowed(4096), windowed(4095), x).status == "failed"
    assert verify(windowed(4096), plain, x).status == "failed"


def test_a_mask_input_that_is_taken_for_causal():
    def masked(q, k, m):
        return torch.softmax(q @ k.transpose(-1, -2) + m, -1)

    def assumed(q, k, m):
        return torch.softmax(torch.where(causal(1024, 1024), q @ k.transpose(-1, -2), -math.inf), -1)

    shapes = empty(4, 1024, 64), empty(4, 1024, 64), empty(1024, 1024)
    assert verify(masked, assumed, *shapes).status == "failed"


def test_dead_rows():
    """A spelled-out softmax of a dead row is NaN; one that gives zero is another function."""

    def spelled(x, m):
        return torch.softmax(x + m, -1)

    def safe(x, m):
        return torch.nan_to_num(torch.softmax(x + m, -1))

    verdict = verify(spelled, safe, empty(1024, 1024), empty(1024, 1024))
    assert verdict.status == "failed"
    assert "masked rows" in verdict.detail


def test_a_hostile_value_of_the_fusion():
    """Clamping at 1e4 is right for everything that is drawn, and wrong for what the fusion itself proposes."""
    inputs = (empty(64, 64),)
    pair = (lambda x: x * 2, lambda x: x.clamp(-1e4, 1e4) * 2)
    assert verify(*pair, *inputs).status == "equal"
    verdicts.clear()
    hostile = sites.Toy(hostile=({"a": torch.full((64, 1), 1e5)}, {"unknown": torch.ones(1)}))
    verdict = verify(*pair, *inputs, fusion=hostile)
    assert verdict.status == "failed"
    assert "adversary 1" in verdict.detail


def test_large_rows():
    assert verify(lambda x: torch.tanh(x), lambda x: x.clamp(-9, 9).tanh(), empty(64, 64)).status == "failed"
    assert verify(lambda x: x + 0, lambda x: x.clamp(-500, 500), empty(64, 64)).status == "failed"


def test_division_by_zero():
    def norm(x):
        return x / x.pow(2).sum(-1, keepdim=True).sqrt()

    assert verify(norm, lambda x: F.normalize(x, dim=-1), empty(64, 64)).status == "failed"
    assert verify(norm, lambda x: x * x.pow(2).sum(-1, keepdim=True).rsqrt(), empty(64, 64)).status == "equal"


def test_another_default_eps():
    x = empty(64, 4096)
    eps = torch.finfo(torch.float32).eps
    assert verify(lambda x: F.rms_norm(x, (4096,)), lambda x: F.rms_norm(x, (4096,), None, eps), x).status == "equal"
    assert verify(lambda x: F.rms_norm(x, (4096,)), lambda x: F.rms_norm(x, (4096,), None, 1e-5), x).status == "failed"


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: x[:, :-1], "shape"),
        (lambda x: x.double(), "dtype"),
        (lambda x: x.view(64, 32), "memory"),
    ],
)
def test_metadata(wrong, words):
    verdict = verify(lambda x: x * 1.0, wrong, empty(64, 32))
    assert verdict.status == "failed"
    assert words in verdict.detail


# The kernel


def _mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


exact = fused_op("test_exact(Tensor x) -> Tensor")(lambda x: x.float().pow(2).sum(-1).to(x.dtype))
exact.fake(lambda x: x.new_empty(x.shape[:-1]))
coarse = fused_op("test_coarse(Tensor x) -> Tensor")(lambda x: x.float().pow(2).sum(-1).to(x.dtype))
coarse.fake(lambda x: x.new_empty(x.shape[:-1]))


@coarse.implementation("triton", opaque=True)
def _(x):
    total = x[..., 0] * 0
    for i in range(x.shape[-1]):  # one accumulator, rounded to bfloat16 at every step
        total = total + x[..., i] * x[..., i]
    return total


picky = fused_op("test_picky(Tensor x) -> Tensor")(lambda x: x.float().pow(2).sum(-1).to(x.dtype))
picky.fake(lambda x: x.new_empty(x.shape[:-1]))


@picky.implementation("aten", when=lambda target, x: None if x.shape[-1] == 4096 else f"{x.shape[-1]} is not 4096")
def _(x):
    assert x.shape[-1] == 4096
    return picky.reference(x) if x.shape[0] < 2048 else x[..., 0]


def sum_of_squares(x):
    return x.float().pow(2).sum(-1).to(x.dtype)


def test_a_kernel_that_accumulates_in_bfloat16():
    x = empty(64, 4096, dtype=torch.bfloat16)
    assert verify(sum_of_squares, exact, x).status == "equal"
    verdict = verify(sum_of_squares, coarse, x)
    assert verdict.status == "failed"
    assert "less exact than the original" in verdict.detail


def test_a_kernel_that_only_takes_the_real_width_runs_at_it():
    verdict = verify(sum_of_squares, picky, empty(512, 4096))
    assert verdict.status == "equal", verdict
    assert "aten" in verdict.detail


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_on_a_gpu_is_compared_at_its_real_sizes():
    wide = torch.empty(2048, 4096, device="cuda")
    verdict = verify(sum_of_squares, picky, wide)  # wrong from 2048 rows on
    assert verdict.status == "failed", verdict
    assert "the real sizes" in verdict.detail
    assert verify(sum_of_squares, picky, wide[1:]).status == "equal"
    assert verify(sum_of_squares, exact, wide).status == "equal"


def test_a_kernel_that_can_not_run_is_not_called_equal():
    never = fused_op("test_never(Tensor x) -> Tensor")(sum_of_squares)
    never.fake(lambda x: x.new_empty(x.shape[:-1]))
    never.implementation("aten", when=lambda target, x: None if x.shape[0] == 1 << 20 else "needs 2**20 rows")(
        sum_of_squares
    )
    x = torch.empty(1 << 20, 64, device="cpu")
    verdict = verify(sum_of_squares, never, x)
    assert verdict.status == "unchecked"
    assert "needs 2**20 rows" in verdict.detail


def test_a_kernel_that_raises():
    broken = fused_op("test_broken(Tensor x) -> Tensor")(sum_of_squares)
    broken.fake(lambda x: x.new_empty(x.shape[:-1]))

    @broken.implementation("triton", opaque=True)
    def _(x):
        raise RuntimeError("out of resources")

    verdict = verify(sum_of_squares, broken, empty(64, 64))
    assert verdict.status == "failed"
    assert "out of resources" in verdict.detail


blocks = fused_op("test_blocks(Tensor x, str layout) -> Tensor")(
    lambda x, layout: x.unflatten(-1, (-1, int(layout.split("/")[1]))).sum(-1)
)
blocks.fake(lambda x, layout: x.new_empty((x.shape[0], x.shape[1] // int(layout.split("/")[1]))))


def test_a_size_inside_a_string_stays():
    def original(x):
        return x.reshape(2048, 32, 128).sum(-1)

    verdict = verify(original, lambda x: blocks(x, "row/128"), empty(2048, 4096))
    assert verdict.status == "equal", verdict


def test_bitwise_means_every_bit():
    x = empty(64, 4096)
    halves = (lambda x: x.sum(-1), lambda x: x[:, ::2].sum(-1) + x[:, 1::2].sum(-1))
    assert verify(*halves, x).status == "equal"
    verdict = verify(*halves, x, fusion=sites.Bitwise())
    assert verdict.status == "failed"
    assert "bit for bit" in verdict.detail


def test_approximations_are_not_called_equal():
    verdict = verify(
        lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"), empty(64), fusion=sites.Approximate()
    )
    assert verdict.status == "meta"
    assert verdict.error > 1


# Symbolic sizes


def flexible(a, b, c):
    scores = a @ b.transpose(2, 3) * a.shape[-1] ** -0.5
    scores = torch.where(causal(a.shape[2], b.shape[2]), scores, -math.inf)
    return (torch.softmax(scores, -1) @ c).transpose(1, 2).reshape(a.shape[0], a.shape[2], -1)


def flexible_sdpa(a, b, c, **options):
    out = F.scaled_dot_product_attention(a, b, c, **({"is_causal": True} | options))
    return out.transpose(1, 2).reshape(a.shape[0], a.shape[2], -1)


@pytest.mark.parametrize(
    "replacement, status",
    [(flexible_sdpa, "equal"), (lambda a, b, c: flexible_sdpa(a, b, c, is_causal=False), "failed")],
)
def test_symbolic_sizes_add_no_guards(replacement, status):
    inputs = [torch.randn(2, 4, 50, 32) for _ in range(3)]
    for t in inputs:
        torch._dynamo.mark_dynamic(t, 0)
        torch._dynamo.mark_dynamic(t, 2)
    verdict, before, after = sites.verify_compiled(flexible, replacement, *inputs, dynamic=None)
    assert verdict.status == status, verdict
    assert before == after


def test_equal_at_the_example_only_is_wrong():
    """Two dims that happen to be equal in the example; the rewrite mixes them up."""

    def original(x, y):
        return (x @ y.t()) / x.shape[0] + 0 * y.sum()

    def mixed_up(x, y):
        return (x @ y.t()) / y.shape[0] + 0 * y.sum()

    x, y = torch.randn(24, 8), torch.randn(24, 8)
    # By default Dynamo gives equal sizes one symbol, and guards on it: then they are the same.
    verdict, before, after = sites.verify_compiled(original, mixed_up, x, y)
    assert verdict.status == "equal"
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        verdict, before, after = sites.verify_compiled(original, mixed_up, x, y)
    assert verdict.status == "failed", verdict
    assert before == after


# What nobody notices


def test_the_rng_is_untouched():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert verify(attention, sdpa, Q, KV, KV).status == "equal"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: torch.device("meta"),
        lambda: torch._subclasses.fake_tensor.FakeTensorMode(),
        lambda: torch.enable_grad(),
    ],
    ids=["autocast", "inference_mode", "default device", "fake mode", "grad"],
)
def test_surroundings_do_not_leak_in(context):
    match, replacements = site(rms_norm, lambda x, w: F.rms_norm(x, (512,), w, 1e-6), empty(8, 512), empty(512))
    plain = Verifier().verify(sites.Toy(), match, replacements)
    verdicts.clear()
    with context():
        inside = Verifier(seed=0).verify(sites.Toy(), match, replacements)
    assert inside == plain
    assert plain.status == "equal"


def test_a_default_dtype_does_not_leak_in_or_out():
    match, replacements = site(rms_norm, lambda x, w: F.rms_norm(x, (512,), w, 1e-6), empty(8, 512), empty(512))
    plain = Verifier().verify(sites.Toy(), match, replacements)
    verdicts.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Verifier().verify(sites.Toy(), match, replacements) == plain
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_graph_is_not_changed():
    match, replacements = site(attention, sdpa, Q, KV, KV)
    before = str(match.graph)
    Verifier().verify(sites.Toy(), match, replacements)
    assert str(match.graph) == before
    match.graph.lint()


# What can't be checked says so


def test_random_ops_are_unchecked():
    verdict = verify(lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.5), empty(64))
    assert verdict.status == "unchecked"
    assert "random" in verdict.detail


def test_over_budget_is_unchecked_and_strict_has_none():
    """A program whose sizes are tied in a way that nothing smaller satisfies, too large to run as it is."""

    def windows(x):
        return x.unfold(0, 2100, 7).sum(-1) * 2  # 2101 + 7 · 299 rows in 300 windows

    def other(x):
        return (x + x).unfold(0, 2100, 7).sum(-1)

    x = empty(4193, 17)
    verdict = verify(windows, other, x)
    assert verdict.status == "unchecked"
    assert "over the budget" in verdict.detail
    assert verify(windows, other, x, level="strict").status == "equal"


def test_levels():
    wrong = (lambda x: x * 2, lambda x: x * 3, empty(64))
    assert verify(*wrong, level="off").status == "unchecked"
    assert verify(*wrong, level="meta").status == "meta"
    assert verify(*wrong, level="strict").status == "failed"


# Signatures


def test_equal_layers_are_checked_once(monkeypatch):
    from fxopt.rewrite import verify as module

    runs = []
    original = module._Check.algebra
    monkeypatch.setattr(module._Check, "algebra", lambda self, *a, **k: runs.append(1) or original(self, *a, **k))
    for _ in range(3):
        assert verify(attention, sdpa, Q, KV, KV).status == "equal"
    assert len(runs) == 1
    assert verify(attention, sdpa, Q.half(), KV.half(), KV.half()).status == "equal"
    assert len(runs) == 2


def test_a_warm_process_reads_the_verdict_in_no_time(cache):
    match, replacements = site(attention, sdpa, Q, KV, KV)
    Verifier().verify(sites.Toy(), match, replacements)
    assert len(list((cache / "verdicts").iterdir())) == 1
    verdicts.clear()
    start = time.perf_counter()
    for _ in range(90):
        assert Verifier().verify(sites.Toy(), match, replacements).status == "equal"
    assert time.perf_counter() - start < 0.2


def test_constants_are_part_of_the_signature():
    def scaled(value):
        constant = torch.full((64,), value)
        return lambda x: x * constant

    for value in (2.0, 3.0):
        status = verify(scaled(value), lambda x: x * 2.0, empty(64)).status
        assert status == ("equal" if value == 2.0 else "failed")


def test_a_changed_seed_is_another_signature(cache):
    for seed in (0, 1):
        assert verify(rms_norm, rms_norm, empty(8, 512), empty(512), seed=seed).status == "equal"
    assert len(list((cache / "verdicts").iterdir())) == 2


def test_the_repro_shows_the_difference(cache):
    verdict = verify(lambda x: x * 2 + 1, lambda x: x * 3 + 1, empty(512, 64))
    path = Path(verdict.detail.split("repro: ")[1])
    assert path.parent == cache / "repro"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "largest difference" in done.stdout
    assert "largest difference 0," not in done.stdout


def test_rows_of_few_elements_are_measured_together():
    """A sum that cancels, alone in its row, says nothing; a small row of many elements counts as a large one does."""
    one, off = torch.tensor([[[1e-6], [1.0], [1.0]]]), torch.tensor([[[2e-6], [1.0], [1.0]]])
    assert distance(one, off).error == pytest.approx(1e-6, rel=1e-3)
    small = torch.cat([torch.full((1, 16), 1e-3), torch.ones(1, 16)])
    assert distance(small, small + 1e-6).error == pytest.approx(1e-3, rel=1e-2)


def test_what_one_draw_finds_less_exact_is_judged_by_more(monkeypatch):
    """An original that is exact by luck in the first draw; and a replacement that is less exact in every one."""
    from fxopt.rewrite import verify as module

    seeds = []
    measured = module._Check._measured

    def lucky(self, sizes, target, chosen, seed):
        found = measured(self, sizes, target, chosen, seed)
        seeds.append(seed)
        return [dataclasses.replace(one, before=Distance(0.0)) for one in found] if seed == 0 else found

    monkeypatch.setattr(module._Check, "_measured", lucky)
    x, w = empty(64, 512), empty(512)
    assert verify(rms_norm, lambda x, w: F.rms_norm(x, (512,), w, 1e-6), x, w).status == "equal"
    assert len(set(seeds)) == module.DRAWS
    worse = lambda x, w: F.rms_norm(x.bfloat16(), (512,), w.bfloat16(), 1e-6).float()  # noqa: E731
    verdict = verify(rms_norm, worse, x, w)
    assert verdict.status == "failed"
    assert "less exact" in verdict.detail
