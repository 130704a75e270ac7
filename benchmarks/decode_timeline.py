"""Where the time of one decode step goes: kernels a layer, gaps between them, and the largest losses by name.

    python benchmarks/decode_timeline.py --out FOLDER [--layers 8] [--batch 1] [--modes ...]

Writes FOLDER/decode_timeline.json (every kernel with its times) and FOLDER/decode_timeline.md. The model is a Llama of
the 8B shape with random bf16 weights and a StaticCache, compiled as each mode says; the step is traced by
torch.profiler after a few that warm up, several times, and the median one is shown.

The limit is the bytes of weights and of live keys and values over the bandwidth of a large copy. What a step takes more
than that is told apart: gaps (nothing runs), and the kernels by what they do: matmuls beyond their weights' bytes,
attention beyond its keys and values, and everything else as a whole. On a CPU (--device cpu --tiny) the leaves of the
operator trace stand for kernels: it shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from timing import copy_bandwidth

MODES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "eager": None,
    "inductor reduce-overhead": ("inductor", {"mode": "reduce-overhead"}),
    "inductor reduce-overhead, coordinate descent": (
        "inductor",
        {"options": {"triton.cudagraphs": True, "coordinate_descent_tuning": True}},
    ),
    "fxopt": ("fxopt", {}),
    "fxopt reduce-overhead": ("fxopt", {"mode": "reduce-overhead"}),
    "fxopt reduce-overhead, separate launches": (
        "fxopt",
        {"options": {"mode": "reduce-overhead", "inductor": {"combo_kernels": False}}},
    ),
    "fxopt reduce-overhead, combo kernels, PDL": (
        "fxopt",
        {"options": {"mode": "reduce-overhead", "inductor": {"combo_kernels": True, "triton.enable_pdl": True}}},
    ),
    "fxopt reduce-overhead, tuned": ("fxopt", {"options": {"mode": "reduce-overhead", "tune": "full"}}),
}

#: kinds of kernels by name, the first that fits
KINDS = (
    ("attention", r"attention|attn|flash|fmha|softmax|sdpa"),
    ("matmul", r"gemm|gemv|matmul|nvjet|cutlass|cublas|splitk|xmma|linear|_mm|::mm|addmm|bmm"),
    ("copy", r"memcpy|memset|copy|fill|index_put|scatter"),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel of the step: its times in microseconds from the step's begin."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        """What it does, as far as its name says."""
        return next((kind for kind, pattern in KINDS if re.search(pattern, self.name.lower())), "other")


@dataclass(frozen=True)
class Timeline:
    """What a step's kernels add up to, in microseconds."""

    span: float
    busy: float
    gaps: float
    kernels: int
    a_layer: float
    limit: float
    losses: list[tuple[str, float]]  # the largest first
    longest: list[tuple[str, int, float]]  # kernel, times launched, time in all


def analyse(kernels: Sequence[Kernel], layers: int, limits: dict[str, float]) -> Timeline:
    """The timeline of one step. `limits` are the microseconds that the bytes of each kind of kernel take.

    Where kernels overlap, that time is the earlier one's: a kernel that was launched early waits for it. Raises
    ValueError where there are none.
    """
    if not kernels:
        raise ValueError("the profiler saw no kernels in the step")
    ordered = sorted(kernels, key=lambda k: k.start)
    busy, until = 0.0, ordered[0].start
    kinds: dict[str, float] = {}
    names: dict[str, tuple[int, float]] = {}
    for kernel in ordered:
        taken = max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
        busy += taken
        kinds[kernel.kind] = kinds.get(kernel.kind, 0.0) + taken
        count, total = names.get(kernel.name, (0, 0.0))
        names[kernel.name] = count + 1, total + taken
    span = until - ordered[0].start
    losses = {"gaps between kernels": span - busy}
    for kind, taken in kinds.items():
        words = f"{kind} kernels beyond their bytes" if kind in limits else f"{kind} kernels"
        losses[words] = taken - limits.get(kind, 0.0)
    longest = sorted(((name, *found) for name, found in names.items()), key=lambda entry: -entry[2])
    return Timeline(
        span, busy, span - busy, len(ordered), len(ordered) / layers, sum(limits.values()),
        sorted(losses.items(), key=lambda entry: -entry[1]), longest[:12],
    )  # fmt: skip


def traced(step: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """The kernels of one call of `step`; on the CPU the operators that call no other."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [e for e in found.events() if e.time_range.end > e.time_range.start]
    if on_gpu:  # the ranges that compiled code announces are shown on the device too, and are no kernels
        events = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    else:
        events = [e for e in events if not e.cpu_children]
    first = min((e.time_range.start for e in events), default=0.0)
    return [Kernel(e.name, e.time_range.start - first, e.time_range.end - first) for e in events]


def model_of(layers: int, device: torch.device, tiny: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=100 if tiny else 128256, max_position_embeddings=32768,
        rope_theta=500000.0, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def decode(model: Any, batch: int, length: int, used: int, device: torch.device) -> Callable[[Any], Callable[[], Any]]:
    """One step at position `used` of a static cache of `length`, for the model or a compiled one."""
    from transformers import StaticCache

    vocabulary = model.config.vocab_size
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(
        input_ids=torch.randint(0, vocabulary, (batch, used), device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    token = torch.randint(0, vocabulary, (batch, 1), device=device)

    def bind(run: Any) -> Callable[[], Any]:
        for layer in cache.layers:
            layer.cumulative_length.fill_(used)
            if hasattr(layer, "cumulative_length_int"):  # sliding windows count in Python too
                layer.cumulative_length_int = used
        return lambda: run(input_ids=token, past_key_values=cache, use_cache=True).logits

    return bind


def limits_of(model: Any, batch: int, used: int, bandwidth: float) -> dict[str, float]:
    """Microseconds that the bytes of matmuls' weights, and of live keys and values, take."""
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    config, size = model.config, next(model.parameters()).element_size()
    lanes = config.hidden_size // config.num_attention_heads
    live = 2 * config.num_hidden_layers * batch * (used + 1) * config.num_key_value_heads * lanes * size
    return {"matmul": weights / bandwidth * 1e6, "attention": live / bandwidth * 1e6}


def markdown(report: dict[str, Any]) -> str:
    """The report in words and a table."""
    lines = [
        f"{report['device']}, torch {report['torch']}, {report['layers']} layers, batch {report['batch']}, copy "
        f"bandwidth {report['bandwidth'] / 1e12:.2f} TB/s; one decode step, microseconds",
        "",
        "| mode | span | limit | of the limit | busy | gaps | kernels | a layer |",
        "|---" * 8 + "|",
    ]
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['mode']} | {row['error']} |" + " |" * 6)
            continue
        t = row["timeline"]
        lines.append(
            f"| {row['mode']} | {t['span']:.1f} | {t['limit']:.1f} | {t['limit'] / t['span']:.0%} | {t['busy']:.1f} "
            f"| {t['gaps']:.1f} | {t['kernels']} | {t['a_layer']:.1f} |"
        )
    for row in report["rows"]:
        if "error" in row:
            continue
        lines += ["", f"{row['mode']}: the largest losses", ""]
        lines += [f"{i}. {name}: {loss:.1f}" for i, (name, loss) in enumerate(row["timeline"]["losses"][:3], 1)]
        lines += ["", "| kernel | launches | in all |", "|---|---|---|"]
        lines += [f"| `{name[:90]}` | {count} | {total:.1f} |" for name, count, total in row["timeline"]["longest"]]
    return "\n".join(lines) + "\n"


def measured(mode: str, model: Any, bind: Any, given: argparse.Namespace, limits: dict[str, float]) -> dict[str, Any]:
    """One mode: warmed up, traced `--repeats` times, the median step."""
    torch._dynamo.reset()
    chosen = MODES[mode]
    run = model if chosen is None else torch.compile(model, backend=chosen[0], **chosen[1])
    device = torch.device(given.device)
    step = bind(run)
    for _ in range(given.warmup):
        step()
    steps = [traced(step, device) for _ in range(given.repeats)]
    steps = sorted((s for s in steps if s), key=lambda s: max(k.end for k in s))
    if not steps:
        raise ValueError("the profiler saw no kernels in the step")
    middle = steps[len(steps) // 2]
    timeline = analyse(middle, given.layers, limits)
    return {"mode": mode, "timeline": asdict(timeline), "step": [asdict(kernel) for kernel in middle]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line names; the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cache", type=int, default=2048)
    parser.add_argument("--used", type=int, default=513)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--modes", nargs="*", choices=list(MODES), default=["inductor reduce-overhead", "fxopt reduce-overhead"]
    )
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        bandwidth = copy_bandwidth(device, 2**20 if given.tiny else 2**30)
        model = model_of(given.layers, device, given.tiny)
        bind = decode(model, given.batch, given.cache, given.used, device)
        limits = limits_of(model, given.batch, given.used, bandwidth)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        report: dict[str, Any] = {"device": name, "torch": torch.__version__, "layers": given.layers}
        report |= {"batch": given.batch, "bandwidth": bandwidth, "rows": []}
        for mode in given.modes:
            try:
                row = measured(mode, model, bind, given, limits)
            except Exception as error:  # one mode that fails must not cost the others
                row = {"mode": mode, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            report["rows"].append(row)
            (given.out / "decode_timeline.json").write_text(json.dumps(report) + "\n")
            (given.out / "decode_timeline.md").write_text(markdown(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
