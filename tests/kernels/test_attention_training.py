"""Attention with a backward of its own: its gradients against float64, through every argument that has one."""

import pytest
import torch
import torch._dynamo.backends.common

from fxopt.kernels.attention import attention
from fxopt.kernels.attention_training import attention_gradients, attention_stats, unserved
from fxopt.ops import Target

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INF = float("inf")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, HQ, HKV = 2, 4, 2
NAMES = (
    "q", "k", "v", "mask", "scale", "is_causal", "empty_rows", "softcap", "sink", "factor", "first", "last", "bias",
)  # fmt: skip


def settings(rows, keys, dtype=F32, device="cpu"):
    randn = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    i = torch.arange(rows, device=device)[None, None]
    padding = torch.rand(B, 1, 1, keys, device=device) < 0.7
    padding[..., 0] = True
    dead = padding.clone()
    dead[1] = False
    low = torch.finfo(dtype).min if dtype != F16 else -INF
    empty = torch.where(i % 5 == 0, i - 500, i + 7)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "soft cap": {"softcap": 3.0, "is_causal": True},
        "sink a head": {"sink": randn(1, HQ, 1, 1), "is_causal": True},
        "sink a row": {"sink": randn(B, HQ, rows, 1)},
        "factor": {"factor": randn(B, HQ, rows, keys)},
        "shared factor": {"factor": randn(rows, keys), "softcap": 2.0},
        "bias": {"mask": randn(1, HQ, rows, keys)},
        "bias a key": {"mask": randn(B, 1, 1, keys)},
        "bias and soft cap": {"mask": randn(rows, keys), "softcap": 3.0},
        "bias by distance": {"bias": randn(1, HQ, rows + keys - 1)},
        "bias by distance, causal, padded": {"bias": randn(B, 1, rows + keys - 1), "mask": padding, "is_causal": True},
        "slopes, causal, padded": {"bias": randn(B, HQ), "mask": padding, "is_causal": True},
        "a slope a head": {"bias": randn(1, HQ)},
        "a key's own bias and a mask": {"bias": randn(B, HQ, 1, keys), "mask": randn(1, HQ, rows, keys)},
        "padding": {"mask": padding},
        "padding added": {"mask": torch.zeros(padding.shape, device=device, dtype=dtype).masked_fill(~padding, low)},
        "window": {"first": i + keys - rows - 20, "last": i + keys - rows},
        "window, soft cap, sink": {"first": i - 9, "last": i + 9, "softcap": 3.0, "sink": randn(1, HQ, 1, 1)},
        "documents": {"first": i // 24 * 24, "last": i // 24 * 24 + 23},
        "empty rows": {"first": i + 3, "last": empty},
        "empty rows are averages": {"first": i + 3, "last": empty, "empty_rows": "uniform"},
        "empty batch": {"mask": dead},
        "empty batch is averages": {"mask": dead, "empty_rows": "uniform"},
    }


def dense(bias, rows, keys):
    """A bias by key or by distance for every score, copied row by row."""
    if bias.dim() == 4:
        return bias
    if bias.dim() == 2:
        bias = bias[..., None] * torch.arange(1 - rows, keys, device=bias.device)
    return torch.stack([bias[..., rows - 1 - i : rows - 1 - i + keys] for i in range(rows)], 2)


def exact(q, k, v, mask=None, scale=0.3, is_causal=False, empty_rows="zero", softcap=None, sink=None, factor=None,
          first=None, last=None, bias=None):  # fmt: skip
    """Spelled out in the dtype of q. A fill stops gradients: where nothing is live, q and k get none."""
    dtype, (rows, keys) = q.dtype, (q.shape[2], k.shape[2])
    k, v = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v))
    s = q @ k.mT * scale
    s = s if factor is None else s * factor
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    key = torch.arange(keys, device=q.device)
    s = s if bias is None else s + dense(bias, rows, keys)
    live = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=q.device)
    live = live.tril() if is_causal else live
    live = live if first is None else live & (key >= first[..., None])
    live = live if last is None else live & (key <= last[..., None])
    if mask is not None and mask.dtype == torch.bool:
        live = live & mask
    elif mask is not None:
        s = s + mask
    s = torch.where(live, s, -1e30 if dtype != F16 else -6e4)
    s = s if sink is None else torch.cat([s, sink.expand(B, HQ, rows, 1)], -1)
    p = torch.softmax(s, -1, dtype=F32 if dtype != F64 else None).to(dtype)[..., :keys]
    if empty_rows == "zero":
        p = torch.where(live.any(-1, keepdim=True), p, 0.0)
    return p @ v


def case(rows, keys, dtype=F32, device="cpu", width=16):
    make = lambda h, n, d: torch.randn(B, h, n, d, device=device).to(dtype)  # noqa: E731
    return make(HQ, rows, width), make(HKV, keys, width), make(HKV, keys, width + 8)


def gradients(run, tensors, more, dtype):
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in zip("qkv", tensors, strict=True)}
    leaves |= {
        n: t.detach().to(dtype).requires_grad_()
        for n, t in more.items() if isinstance(t, torch.Tensor) and t.is_floating_point() and n != "mask"
    }  # fmt: skip
    if isinstance(more.get("mask"), torch.Tensor) and more["mask"].is_floating_point():
        leaves["mask"] = more["mask"].detach().to(dtype).requires_grad_()
    out = run(**{**more, **leaves})
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))


def by_kernels(monkeypatch):
    """The two ops with their Triton kernels, whatever the device."""
    for op in (attention_stats, attention_gradients):
        (triton,) = [i for i in op.implementations if i.name == "triton"]
        monkeypatch.setattr(op, "select", lambda *a, chosen=triton: (chosen, []))

    def run(**given):
        given = {"mask": None, "scale": 0.3, "is_causal": False, "empty_rows": "zero", **given}
        return attention_stats(*[given.get(name) for name in NAMES])[0]

    return run


def compare(assert_as_good_as, run, rows, keys, kind, dtype, device):
    tensors, more = case(rows, keys, dtype, device), settings(rows, keys, dtype, device)[kind]
    out, ours = gradients(run, tensors, more, dtype)
    eager, theirs = gradients(exact, tensors, more, dtype)
    truth, right = gradients(exact, tensors, more, F64)
    assert_as_good_as(out, eager, truth, 4)
    for name in ours:
        if name == "bias" and ours[name].dim() == 2:
            eager, ulps = (theirs[name] - right[name]).abs().max(), 256 * right[name].abs().max()
            allowed = 2 * eager + torch.finfo(dtype).eps * torch.maximum(ulps, magnitudes(tensors, more))
            assert bool(((ours[name] - right[name]).abs() <= allowed).all())
        else:
            peaked = more.get("bias") is not None and more["bias"].dim() == 2 and name in "qk"
            terms = unsigned(tensors, more)[name].max() / right[name].abs().max() if peaked else 1
            assert_as_good_as(ours[name], theirs[name], right[name], 8 * max(1, float(terms)))


def unsigned(tensors, more):
    """What the gradients of q and k add up to without signs. Where slopes leave a row one live key, dP and delta are
    nearly equal, and p (dP - delta) is exact to an ulp of them, not of their difference (FlashAttention, algorithm 4).
    """
    q, k, v = (t.double() for t in tensors)
    more = {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in more.items()
    }
    eye = torch.eye(k.shape[2], dtype=F64, device=k.device).expand(B, HKV, -1, -1)
    p = exact(q, k, eye, **more)
    grad = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(1)).to(v)
    dp = grad @ v.repeat_interleave(HQ // HKV, 1).mT
    ds = 0.3 * p * (dp.abs() + (p * dp).sum(-1, keepdim=True).abs())
    keys = k.repeat_interleave(HQ // HKV, 1).abs()
    return {"q": ds @ keys, "k": (ds.mT @ q.abs()).unflatten(1, (HKV, -1)).sum(2)}


def magnitudes(tensors, more):
    """What a slope's gradient, a sum over all scores times distances, adds up to without signs (and without masks): at
    the size of a model thousands of times as much, and an ulp of that is what a sum is exact to."""
    rows, keys = tensors[0].shape[2], tensors[1].shape[2]
    distance = torch.arange(keys, device=tensors[0].device) - torch.arange(rows, device=tensors[0].device)[:, None]
    dense = more["bias"].double()[..., None, None] * distance
    _, found = gradients(exact, tensors, {**more, "bias": None, "mask": dense}, F64)
    return (found["mask"] * distance).abs().sum((-1, -2)).sum(0, keepdim=True)


@pytest.mark.parametrize("kind", settings(1, 1))
@pytest.mark.parametrize("rows, keys, dtype", [
    (40, 70, F32), pytest.param(3, 40, F32, marks=pytest.mark.slow), pytest.param(70, 70, BF16, marks=pytest.mark.slow),
])  # fmt: skip
def test_gradients_against_float64(assert_as_good_as, triton_device, monkeypatch, kind, rows, keys, dtype):
    compare(assert_as_good_as, by_kernels(monkeypatch), rows, keys, kind, dtype, triton_device)


@pytest.mark.parametrize("kind", ["window, soft cap, sink", "bias", "bias by distance"])
def test_gradients_in_float16(assert_as_good_as, triton_device, monkeypatch, kind):
    compare(assert_as_good_as, by_kernels(monkeypatch), 70, 90, kind, F16, triton_device)


@pytest.mark.parametrize("kind", settings(1, 1))
def test_the_references_are_the_same_thing(kind):
    """In float64, where the ops run as their references."""
    for rows, keys in ((9, 11),):
        tensors, more = case(rows, keys, F64, width=4), settings(rows, keys, F64)[kind]

        def run(**given):
            given = {"mask": None, "scale": 0.3, "is_causal": False, "empty_rows": "zero", **given}
            return attention_stats(*[given.get(name) for name in NAMES])[0]

        ours, theirs = gradients(run, tensors, more, F64), gradients(exact, tensors, more, F64)
        torch.testing.assert_close(ours, theirs)
        values = dict(zip("qkv", tensors, strict=True)) | {"mask": None, "scale": 0.3, "empty_rows": "zero"} | more
        torch.testing.assert_close(attention.reference(**values), theirs[0].detach())


@pytest.mark.parametrize("rows", [3, 70])
def test_rows_of_finfo_min_keep_the_gradients_of_averages(triton_device, monkeypatch, rows):
    """Their weights are 1 / N: what is lost where only the logarithm of the weight is kept."""
    tensors = case(rows, 90, F32, triton_device)
    mask = torch.full((1, 1, rows, 90), torch.finfo(F32).min, device=triton_device)
    _, ours = gradients(by_kernels(monkeypatch), tensors, {"mask": mask}, F32)
    mean = torch.randn(B, HQ, rows, 24, generator=torch.Generator().manual_seed(1)).sum(2) / 90
    right = mean.reshape(B, HKV, 2, 1, 24).sum(2).expand(-1, -1, 90, -1).to(triton_device)
    torch.testing.assert_close(ours["v"], right, atol=1e-5, rtol=1e-5)


def test_strides(triton_device, monkeypatch):
    run = by_kernels(monkeypatch)
    base = torch.randn(B, 70, 3, HQ, 16, device=triton_device)
    q, k, v = base[:, :, 0].transpose(1, 2), base[:, :, 1, :HKV].transpose(1, 2), base[:, :, 2, :HKV].transpose(1, 2)
    bias = torch.randn(70, 70, HQ, device=triton_device).permute(2, 0, 1)[None]
    ours = gradients(run, (q, k, v), {"mask": bias}, F32)
    theirs = gradients(exact, (q, k, v), {"mask": bias}, F64)
    torch.testing.assert_close(ours[1], {n: g.float() for n, g in theirs[1].items()}, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [
    "soft cap", "sink a head", "bias", "window", "factor", "bias by distance", "a slope a head",
])  # fmt: skip
def test_opcheck(kind):
    rows, keys = 5, 9
    given = dict(zip("qkv", case(rows, keys, F32, width=4), strict=True))
    given |= {"mask": None, "scale": 0.3, "is_causal": False, "empty_rows": "zero", **settings(rows, keys)[kind]}
    args = [given.get(name) for name in NAMES]
    torch.library.opcheck(attention_stats.overload, tuple(args))
    out, stats = attention_stats(*args)
    wanted = [isinstance(given.get(n), torch.Tensor) for n in ("mask", "sink", "factor", "bias")]
    torch.library.opcheck(attention_gradients.overload, (torch.randn_like(out), out, stats, *wanted, *args))


TRAINED = Target(CUDA, training=True)


@pytest.mark.parametrize("target, rows, more, chosen", [
    (TRAINED, 1024, {"softcap": 3.0}, "triton_trained"),
    (TRAINED, 1024, {"factor": True}, "triton_trained"),
    (TRAINED, 1024, {"first": True}, "triton_trained"),
    (TRAINED, 1024, {"sink": True, "is_causal": True}, "triton_trained"),
    (TRAINED, 1024, {"sink": True}, "sdpa"),
    (TRAINED, 64, {"first": True}, "sdpa_repeated"),
    (TRAINED, 1024, {"is_causal": True}, "sdpa"),
    (TRAINED, 1024, {"bias": True}, "triton_trained"),
    (Target(CPU, training=True), 1024, {"bias": True}, "decomposed"),
    (TRAINED, 1024, {"first": True, "empty_rows": "nan"}, "sdpa_filled"),
    (Target(CUDA), 1024, {"softcap": 3.0}, "triton"),
    (Target(CPU, training=True), 1024, {"softcap": 3.0}, "decomposed"),
    (Target(CUDA, training=True, opaque=False), 1024, {"softcap": 3.0}, "decomposed"),
])  # fmt: skip
def test_where_it_is_chosen(target, rows, more, chosen):
    pytest.importorskip("triton")
    q, k, v = case(rows, 1024, BF16)
    v = v[..., :16]
    made = {"first": torch.zeros(1, 1, rows, dtype=torch.int64), "sink": torch.zeros(1, HQ, 1, 1)}
    made |= {"factor": torch.ones(1, 1, 1, 1024), "bias": torch.ones(1, HQ, rows + 1023)}
    given = {n: made[n] if value is True and n in made else value for n, value in more.items()}
    args = attention.bind(q, k, v, None, 0.3, **({"empty_rows": "zero"} | given))
    assert attention.select(target, *args)[0].name == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("kind", settings(1, 1))
def test_gradients_at_the_size_of_a_model(assert_as_good_as, monkeypatch, kind, dtype):
    compare(assert_as_good_as, by_kernels(monkeypatch), 1000, 1100, kind, dtype, "cuda")


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_differentiated_by_aotautograd(dynamic):
    """Traced into a graph: one op forward, one backward, and nothing of rows x keys elements kept between them."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler)
    named = {i.name: i.run for i in attention.implementations}

    def program(q, k, v, first):
        return named["triton_trained"](q, k, v, None, 0.3, False, "zero", 3.0, None, None, first, None, None)

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (9, 12):
        q, k, v = (t.requires_grad_() for t in case(rows, 11))
        first = torch.arange(rows)[None, None] - 3
        out = compiled(q, k, v, first)
        right = exact(q, k, v, softcap=3.0, first=first)
        torch.testing.assert_close(out, right)
        grad = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(right, (q, k, v), grad)
        )
    called = [str(n.target) for g in graphs[:2] for n in g.graph.nodes if "fxopt" in str(n.target)]
    assert [name.split(".")[1] for name in called] == ["attention_stats", "attention_gradients"]


def test_rows_that_are_averages_of_some_keys_only_are_not_for_the_kernels():
    """Beside bounds an added mask leaves an empty row the keys outside of them; the kernels take all keys."""
    q, bound, added = torch.randn(1, 2, 4, 16), torch.arange(4), torch.zeros(1, 1, 4, 4)
    causal, free = (0.5, True, "uniform", None, None, None), (0.5, False, "uniform", None, None, None)
    for mask, rest in (
        (added, (*free, None, bound, None)),
        (None, (*causal, None, bound, None)),
        (added > 0, (*causal, None, None, None)),
    ):
        assert "over all keys" in unserved(q, q, q, mask, *rest)
    assert unserved(q, q, q, None, *free, None, bound, None) is None
    assert unserved(q, q, q, added, *free, None, None, None) is None
