"""Attention as models write it against what can be written by hand: SDPA, FlexAttention, Inductor on the same code.

    python benchmarks/attention.py FOLDER [--cases plain softcap decode ...] [--seconds 450] [--tiny]

    plain     the whole of it, causal or not: fxopt should be as fast as the best SDPA backend
    variants  soft cap, ALiBi, T5 bias, sliding window, documents, sink: against FlexAttention written by hand
    models    the biases of T5-base's encoder and of BLOOM-560m, at their sizes
    decode    one row over long caches: bytes of keys and values a second; a static cache that is filled in part

Every contestant's result is compared with float32 on one KV head's rows; one that is wrong is reported and not timed.
Results go to FOLDER/attention.json and FOLDER/attention.md after each measurement. What the time does not suffice for
is listed as such. --tiny runs everything once at small sizes, on a CPU too: to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxopt
from fxopt.kernels.attention import attention
from timing import graph_milliseconds, milliseconds

Call = Callable[..., Tensor]

#: scores of more bytes than that are not asked of Inductor
MOST_BYTES = 10 << 30
CAP, WINDOW, DOCUMENTS = 30.0, 1024, 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention; `window` and `documents` follow `keys` where everything is made small."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    width: int

    @property
    def window(self) -> int:
        return min(WINDOW, self.keys // 8)

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def __str__(self) -> str:
        length = f"{self.rows}" if self.rows == self.keys else f"{self.rows} of {self.keys}"
        return f"{self.batch}, {self.heads}, {self.kv_heads}, {length}, {self.width}"


@dataclass
class Case:
    """One thing to compute: `eager` is the model's code, `contestants` make what is compared with it."""

    name: str
    shape: Shape
    eager: Call
    inputs: tuple[Any, ...]
    contestants: dict[str, Callable[[], Call]]
    live: float = 1.0  # the share of the scores that is needed
    decode: bool = False
    written: int = 0  # keys that a cache holds, if not all
    notes: list[str] = field(default_factory=list)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, change: Call | None = None, sink: Tensor | None = None
) -> Tensor:
    """As transformers' eager_attention_forward has it; `change` is done to the scores."""
    group = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    scores = change(scores) if change is not None else scores
    if sink is not None:
        scores = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights if sink is None else weights[..., :-1], v)


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)[None]


def masked(live: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=live.device).masked_fill(~live, torch.finfo(dtype).min)


def operands(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(shape.batch, shape.heads, shape.rows, shape.width, device=device, dtype=dtype)
    k, v = (torch.randn(shape.batch, shape.kv_heads, shape.keys, shape.width, device=device).to(dtype) for _ in "kv")
    return q, k, v


def compiled(program: Call, backend: str, **options: Any) -> Callable[[], Call]:
    return lambda: torch.compile(program, backend=backend, fullgraph=True, dynamic=False, **options)


def sdpa(backend: SDPBackend | None, **more: Any) -> Callable[[], Call]:
    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        with contextlib.nullcontext() if backend is None or q.device.type == "cpu" else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **more)

    return lambda: run


def flex(
    shape: Shape, device: str, score: Any = None, live: Any = None, sink: Tensor | None = None
) -> Callable[[], Call]:
    """FlexAttention as its documentation says to write it: compiled once, with a block mask made beforehand."""

    def make() -> Call:
        blocks = None
        if live is not None:
            blocks = create_block_mask(live, None, None, shape.rows, shape.keys, device=device)
        compiled_flex: Any = torch.compile(flex_attention, dynamic=False) if device != "cpu" else flex_attention

        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            gqa = q.shape[1] != k.shape[1]
            if sink is None:
                return compiled_flex(q, k, v, score_mod=score, block_mask=blocks, scale=shape.scale, enable_gqa=gqa)
            out, lse = compiled_flex(
                q, k, v, score_mod=score, block_mask=blocks, scale=shape.scale, enable_gqa=gqa, return_lse=True
            )
            return out * torch.sigmoid(lse - sink.float()[None, :, None])[..., None].to(out.dtype)

        # With a sink the whole is compiled, so that the product is fused with what comes before it.
        return torch.compile(run, dynamic=False) if sink is not None and device != "cpu" else run

    return make


def kernel(shape: Shape, **more: Any) -> Callable[[], Call]:
    """fxopt's Triton kernel, called by itself."""

    def run(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        given = {"mask": None, "scale": shape.scale, "is_causal": False, "empty_rows": "zero", **more}
        return attention.run("triton", q, k, v, **given)

    return lambda: run


def plain(shape: Shape, causal: bool, device: str, dtype: torch.dtype) -> Case:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = places(q, k)
        return attend(q, k, v, shape.scale, (lambda s: s + masked(j <= i, s.dtype)) if causal else None)

    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=causal),
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION, is_causal=causal),
        "Flex": flex(shape, device, live=(lambda b, h, i, j: i >= j) if causal else None),
        "fxopt Triton": kernel(shape, is_causal=causal),
        "Inductor": compiled(eager, "inductor"),
    }
    name = f"plain{', causal' if causal else ''}"
    return Case(name, shape, eager, operands(shape, device, dtype), contestants, 0.5 if causal else 1.0)


def softcap(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = places(q, k)
        return attend(q, k, v, shape.scale, lambda s: torch.tanh(s / CAP) * CAP + masked(j <= i, s.dtype))

    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, lambda s, b, h, i, j: CAP * torch.tanh(s / CAP), lambda b, h, i, j: i >= j),
        "fxopt Triton": kernel(shape, is_causal=True, softcap=CAP),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("softcap, causal", shape, eager, operands(shape, device, dtype), contestants, 0.5)


def alibi(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    slopes = torch.exp2(-8 / shape.heads * torch.arange(1, shape.heads + 1, device=device)).float()

    def eager(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        i, j = places(q, k)
        bias = slopes[:, None, None] * (j - i)
        return attend(q, k, v, shape.scale, lambda s: s + bias + masked(j <= i, s.dtype))

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + slopes[h] * (j - i)

    i, j = (torch.arange(n, device=device) for n in (shape.rows, shape.keys))
    bias = (slopes[:, None, None] * (j[None] - i[:, None]))[None]
    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, score, lambda b, h, i, j: i >= j),
        "fxopt Triton": kernel(shape, is_causal=True, bias=slopes[None, :, None] * distances(shape, device)),
        "fxopt Triton, opaque mask": kernel(shape, is_causal=True, mask=bias),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("ALiBi, causal", shape, eager, (*operands(shape, device, dtype), slopes), contestants, 0.5)


def distances(shape: Shape, device: str) -> Tensor:
    """j - i for every distance of key and row, from the shortest on."""
    return torch.arange(1 - shape.rows, shape.keys, device=device)


def bucket(distance: Tensor, buckets: int = 32, far: int = 128) -> Tensor:
    """T5's, for an encoder: exact near 0, logarithmic farther out."""
    half, exact = buckets // 2, buckets // 4
    behind, near = (distance > 0).long() * half, distance.abs()
    large = exact + (torch.log(near.float() / exact) / math.log(far / exact) * (half - exact)).long()
    return behind + torch.where(near < exact, near, torch.min(large, torch.full_like(large, half - 1)))


def t5_encoder(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    weight = torch.randn(shape.heads, 32, device=device, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        i, j = places(q, k)
        return attend(q, k, v, shape.scale, lambda s: s + weight[:, bucket(j - i)])

    table = weight[:, bucket(distances(shape, device))]
    last = shape.rows - 1
    dense = torch.stack([table[:, last - i : last - i + shape.keys] for i in range(shape.rows)], 1)[None]
    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, lambda s, b, h, i, j: s + table[h, j - i + last]),
        "SDPA": sdpa(None, attn_mask=dense),
        "fxopt Triton": kernel(shape, bias=table[None]),
        "fxopt Triton, opaque mask": kernel(shape, mask=dense),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("T5 encoder", shape, eager, (*operands(shape, device, dtype), weight), contestants)


def bloom(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    slopes = torch.exp2(-8 / shape.heads * torch.arange(1, shape.heads + 1, device=device)).float()

    def eager(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        i, j = places(q, k)
        bias = (slopes[:, None, None] * j).to(dtype)  # as the model rounds it, whatever it is compared in
        return attend(q, k, v, shape.scale, lambda s: s + bias + masked(j <= i, s.dtype))

    bias = (slopes[:, None, None] * torch.arange(shape.keys, device=device)).to(dtype)[None]
    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, lambda s, b, h, i, j: s + bias[0, h, 0, j], lambda b, h, i, j: i >= j),
        "SDPA": sdpa(
            None, attn_mask=bias + masked(torch.ones(shape.rows, shape.keys, device=device).tril() > 0, dtype)
        ),
        "fxopt Triton": kernel(shape, is_causal=True, bias=bias),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("BLOOM, causal", shape, eager, (*operands(shape, device, dtype), slopes), contestants, 0.5)


def t5_bias(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    bias = torch.randn(1, shape.heads, shape.rows, shape.keys, device=device, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q, k, v, shape.scale, lambda s: s + bias)

    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, lambda s, b, h, i, j: s + bias[0, h, i, j]),
        "SDPA": sdpa(None, attn_mask=bias),
        "fxopt Triton": kernel(shape, mask=bias),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("T5 bias", shape, eager, (*operands(shape, device, dtype), bias), contestants)


def window(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    size = shape.window

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = places(q, k)
        return attend(q, k, v, shape.scale, lambda s: s + masked((j <= i) & (j > i - size), s.dtype))

    rows = torch.arange(shape.rows, device=device)[None, None]
    i, j = (torch.arange(n, device=device) for n in (shape.rows, shape.keys))
    live = (j[None] <= i[:, None]) & (j[None] > i[:, None] - size)
    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, live=lambda b, h, i, j: (i >= j) & (i - j < size)),
        "SDPA": sdpa(None, attn_mask=live),
        "fxopt Triton": kernel(shape, first=rows - (size - 1), last=rows),
        "fxopt Triton, opaque mask": kernel(shape, mask=live[None, None]),
        "Inductor": compiled(eager, "inductor"),
    }
    share = live.float().mean().item()
    return Case(f"window {size}", shape, eager, operands(shape, device, dtype), contestants, share)


def documents(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    numbers = torch.arange(shape.keys, device=device) * DOCUMENTS // shape.keys

    def eager(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        i, j = places(q, k)
        live = (numbers[:, None] == numbers[None]) & (j <= i)
        return attend(q, k, v, shape.scale, lambda s: s + masked(live, s.dtype))

    i = torch.arange(shape.rows, device=device)
    live = (numbers[:, None] == numbers[None]) & (i[None] <= i[:, None])
    first = torch.searchsorted(numbers, numbers)[None, None]
    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, live=lambda b, h, i, j: (numbers[i] == numbers[j]) & (i >= j)),
        "SDPA": sdpa(None, attn_mask=live),
        "fxopt Triton": kernel(shape, first=first, last=i[None, None]),
        "fxopt Triton, opaque mask": kernel(shape, mask=live[None, None]),
        "Inductor": compiled(eager, "inductor"),
    }
    share = live.float().mean().item()
    return Case(f"{DOCUMENTS} documents", shape, eager, (*operands(shape, device, dtype), numbers), contestants, share)


def sinks(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    sink = torch.randn(shape.heads, device=device, dtype=dtype)

    def eager(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        i, j = places(q, k)
        return attend(q, k, v, shape.scale, lambda s: s + masked(j <= i, s.dtype), sink)

    contestants = {
        "fxopt": compiled(eager, "fxopt"),
        "Flex": flex(shape, device, live=lambda b, h, i, j: i >= j, sink=sink),
        "fxopt Triton": kernel(shape, is_causal=True, sink=sink[None, :, None, None]),
        "Inductor": compiled(eager, "inductor"),
    }
    return Case("sink, causal", shape, eager, (*operands(shape, device, dtype), sink), contestants, 0.5)


def decode(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, shape.scale)

    contestants = {"SDPA": sdpa(None), "fxopt Triton": kernel(shape)}
    return Case("decode", shape, eager, operands(shape, device, dtype), contestants, decode=True)


def static_cache(shape: Shape, written: int, device: str, dtype: torch.dtype) -> Case:
    """As `generate` with a StaticCache: a mask over the whole cache, of which a part is written."""
    live = (torch.arange(shape.keys, device=device) < written)[None, None, None]
    mask = masked(live, dtype)
    last = torch.full((1, 1, 1), written - 1, device=device)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, shape.scale, lambda s: s + mask)

    contestants = {
        "SDPA": sdpa(None, attn_mask=mask),
        "fxopt Triton": kernel(shape, mask=mask, empty_rows="nan"),
        "fxopt Triton, bound": kernel(shape, last=last),
    }
    name = f"static cache, {written} written"
    inputs = operands(shape, device, dtype)
    return Case(name, shape, eager, inputs, contestants, decode=True, written=written)


def cases(wanted: list[str], device: str, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    """The cases whose names contain one of `wanted`, those that the comparison is about first. Made when asked for."""
    large, small, long = (
        Shape(4, 32, 8, 4096, 4096, 128),
        Shape(16, 16, 16, 1024, 1024, 64),
        Shape(2, 32, 8, 8192, 8192, 128),
    )
    equal, longest = Shape(4, 32, 32, 4096, 4096, 128), Shape(1, 32, 8, 16384, 16384, 128)
    t5_base, bloom_560m = Shape(16, 12, 12, 512, 512, 64), Shape(8, 16, 16, 1024, 1024, 64)
    rows = [Shape(16, 32, 8, 1, 4096, 128), Shape(64, 32, 8, 1, 2048, 128), Shape(1, 32, 8, 1, 8192, 128)]
    caches = [(Shape(1, 32, 8, 1, 1024, 128), 513), (Shape(1, 32, 8, 1, 16384, 128), 513)]
    if tiny:
        large, small, long = Shape(1, 4, 2, 64, 64, 16), Shape(2, 2, 2, 40, 40, 16), Shape(1, 4, 2, 128, 128, 16)
        equal, longest, rows = small, large, [Shape(2, 4, 2, 1, 200, 16)]
        t5_base = bloom_560m = Shape(2, 4, 4, 40, 40, 16)
        caches = [(Shape(1, 4, 2, 1, 256, 16), 40)]
    variants = {"softcap": softcap, "alibi": alibi, "t5": t5_bias, "documents": documents, "sink": sinks}
    makers: list[tuple[str, Callable[[], Case]]] = []
    makers += [("decode", lambda s=s: decode(s, device, dtype)) for s in rows]
    makers += [("decode cache", lambda s=s, n=n: static_cache(s, n, device, dtype)) for s, n in caches]
    makers += [("models t5", lambda: t5_encoder(t5_base, device, dtype))]
    makers += [("models bloom", lambda: bloom(bloom_560m, device, dtype))]
    makers += [("variants window", lambda: window(long, device, dtype))]
    for shape in (large, small):
        makers += [
            (f"variants {name}", lambda s=shape, make=make: make(s, device, dtype)) for name, make in variants.items()
        ]
    shapes = [(large, True), (equal, False), (small, False), (longest, True), (equal, True)]
    makers += [("plain", lambda s=s, causal=causal: plain(s, causal, device, dtype)) for s, causal in shapes]
    for names, make in makers:
        if not wanted or any(w in names for w in wanted):
            yield make()


def error(case: Case, out: Tensor) -> float:
    """The relative error (2-norm) on the query heads of the first KV head of the first batch, against float32."""
    shape = case.shape
    group = shape.heads // shape.kv_heads
    q, k, v, *rest = case.inputs
    parts = [q[:1, :group].float(), k[:1, :1].float(), v[:1, :1].float()]
    for extra in rest:  # numbers a head, or a bias
        per_head = extra.dim() < 3 and extra.shape[0] == shape.heads and extra.is_floating_point()
        parts.append(extra[:group].float() if per_head else extra[:, :group].float() if extra.dim() == 4 else extra)
    right = case.eager(*parts)
    return ((out[:1, :group].float() - right).norm() / right.norm()).item()


def measure(case: Case, run: Call, tiny: bool) -> float:
    """Milliseconds of one call."""
    if tiny:
        start = time.perf_counter()
        run(*case.inputs)
        return (time.perf_counter() - start) * 1e3
    if not case.decode:
        first = milliseconds(lambda: run(*case.inputs), warmup=2, repeats=3, calls=2)
        return milliseconds(lambda: run(*case.inputs), warmup=0, repeats=7, calls=max(1, min(20, int(30 / first))))
    # Keys and values of their own for each launch, so that none are in the cache of the one before.
    one = sum(t.numel() * t.element_size() for t in case.inputs[1:3])
    copies = max(2, min(32, (1 << 31) // one))
    sets = [tuple(t.clone() for t in case.inputs) for _ in range(copies)]
    return graph_milliseconds([lambda given=given: run(*given) for given in sets])


def run_case(case: Case, device: str, deadline: float, tiny: bool, keep: Callable[[dict[str, Any]], None]) -> None:
    shape = case.shape
    flops = 4 * shape.batch * shape.heads * shape.rows * shape.keys * shape.width * case.live
    read = 2 * shape.batch * shape.kv_heads * (case.written or shape.keys) * shape.width * case.inputs[1].element_size()
    for name, make in case.contestants.items():
        row: dict[str, Any] = {"case": case.name, "shape": str(shape), "contestant": name}
        scores = shape.batch * shape.heads * shape.rows * shape.keys * 2
        if time.monotonic() > deadline:
            row["skipped"] = "no time left"
        elif name == "Inductor" and scores > MOST_BYTES:
            row["skipped"] = f"scores of {scores >> 30} GiB"
        else:
            torch._dynamo.reset()
            try:
                start = time.perf_counter()
                with torch.no_grad():
                    run = make()
                    with fxopt.record() as rec:
                        out = run(*case.inputs)
                    row["implementations"] = sorted({site.implementation for site in rec.sites})
                    if device != "cpu":
                        torch.cuda.synchronize()
                    row["first_call_s"] = round(time.perf_counter() - start, 2)
                    row["error"] = float(f"{error(case, out):.3g}")
                    del out
                    if not row["error"] < 0.03:
                        row["failed"] = "wrong result"
                    else:
                        spent = measure(case, run, tiny)
                        row["ms"] = float(f"{spent:.4g}")
                        row["TFLOP/s"] = float(f"{flops / spent * 1e-9:.4g}")
                        row["TB/s"] = float(f"{read / spent * 1e-9:.4g}") if case.decode else None
            except Exception as problem:  # a contestant that can't do it is a result too
                row["failed"] = (
                    f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
                )
            if device != "cpu":
                torch.cuda.empty_cache()
        print(row, flush=True)
        keep(row)


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a line a case, a column a contestant; milliseconds, and Flex's over fxopt's."""
    rows = report["rows"]
    names = list(dict.fromkeys(r["contestant"] for r in rows))
    lines = [f"# Attention on {report['device']}", "", f"torch {report['torch']}, {report['dtype']}; milliseconds.", ""]
    lines += [f"| case | B, Hq, Hkv, S, D | {' | '.join(names)} | Flex / fxopt | TB/s |"]
    lines += ["|" + "---|" * (len(names) + 4)]
    ratios = []
    for case, shape in dict.fromkeys((r["case"], r["shape"]) for r in rows):
        found = {r["contestant"]: r for r in rows if (r["case"], r["shape"]) == (case, shape)}
        cells = [_cell(found.get(name)) for name in names]
        ms = {name: r["ms"] for name, r in found.items() if "ms" in r}
        ratio = ms["Flex"] / ms["fxopt"] if {"Flex", "fxopt"} <= ms.keys() else None
        ratios += [ratio] if ratio is not None and not case.startswith("plain") else []
        speeds = [f"{r['TB/s']:g}" for r in found.values() if r.get("TB/s")]
        lines.append(
            f"| {case} | {shape} | {' | '.join(cells)} | {f'{ratio:.2f}' if ratio else ''} | {', '.join(speeds)} |"
        )
    if ratios:
        lines += ["", f"Flex / fxopt over the variants: geometric mean {statistics.geometric_mean(ratios):.3f}, "
                      f"least {min(ratios):.2f}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['ms']:g}" if "ms" in row else row.get("skipped") or row["failed"].split(":")[0]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--cases", nargs="*", default=[], help="plain, variants, models, decode, or parts of their names"
    )
    parser.add_argument("--only", nargs="*", default=[], help="contestants, by name")
    parser.add_argument("--seconds", type=float, default=450.0, help="start nothing after so long")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not given.tiny:
        parser.error("needs a CUDA device; --tiny runs without one")
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "dtype": str(dtype),
        "rows": [],
    }

    def keep(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        (given.folder / "attention.json").write_text(json.dumps(report, indent=1))
        (given.folder / "attention.md").write_text(table(report))

    deadline = time.monotonic() + given.seconds
    for case in cases(given.cases, device, dtype, given.tiny):
        if given.only:
            case.contestants = {n: c for n, c in case.contestants.items() if n in given.only}
        run_case(case, device, deadline, given.tiny, keep)
        del case
    print(table(report))
    return report


if __name__ == "__main__":
    main()
