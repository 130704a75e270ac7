"""Whole models of Hugging Face at full width: eager mode and Inductor, each with both attentions, against fxopt.

    python benchmarks/models.py FOLDER [--cases encode decode prefill ...] [--seconds 300] [--tiny]

    encode    BERT-base, GPT-2 medium, T5-base's encoder, Gemma 2 2B (6 layers), BLOOM-560m, ViT-B/16, Swin-T: a batch
    prefill   the shapes of Qwen3 8B, Gemma 2 2B, Mistral 7B, Phi-3 mini and GPT-2 XL with 4 layers: 1 x 2048 tokens
    decode    the same, one token against a static cache of 2048 with 513 written, in CUDA graphs
    llama     prefill and decode of the shape of Llama 3 8B with 8 layers, of several batches and caches, and with 32
              (with Inductor's modes that measure while they compile, coordinate descent and max-autotune, for three)

Random bfloat16 weights. A process a model compiles all its contestants side by side with the others, but for those that
measure then; after that, one process after the other and nothing beside it, each contestant is timed
(`timing.milliseconds`) and its peak memory beyond what was there before is taken. "error" is that of the result,
relative (2-norm) to the model's in float32, eager throughout; "limit" of a decode step the time that reading the
weights takes. Results: FOLDER/models.json and models.md.
--tiny does it at small sizes, on a CPU too: to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxopt
from llama import decode, prefill
from timing import copy_bandwidth, milliseconds

Step = Callable[[Any], Callable[[], torch.Tensor]]

DESCENT = "reduce-overhead, coordinate descent"


@dataclass(frozen=True)
class Contestant:
    """`attention` is transformers' attn_implementation; without a backend the model runs in eager mode.

    `mode` is one of torch.compile's or DESCENT.
    """

    attention: str
    backend: str | None = None
    mode: str | None = None

    @property
    def measures(self) -> bool:
        """Whether compiling it times kernels, and so must have the GPU for itself."""
        return self.mode is not None and (self.mode == DESCENT or self.mode.startswith("max-autotune"))

    def compiled(self, model: Any) -> Any:
        if self.backend is None:
            return model
        if self.mode != DESCENT:
            return torch.compile(model, backend=self.backend, **({"mode": self.mode} if self.mode else {}))
        tuned: dict[str, Any] = {"coordinate_descent_tuning": True}
        if self.backend == "fxopt":
            options: dict[str, Any] = {"mode": "reduce-overhead", "inductor": tuned}
        else:
            options = {"triton.cudagraphs": True, **tuned}
        return torch.compile(model, backend=self.backend, options=options)

    def __str__(self) -> str:
        return ", ".join(part for part in (self.backend or "eager mode", self.mode, self.attention) if part)


BATCHES = [Contestant(a, b) for b in (None, "inductor", "fxopt") for a in ("eager", "sdpa")]
PREFILLS = [
    Contestant("sdpa"),
    Contestant("sdpa", "inductor"),
    Contestant("sdpa", "fxopt"),
    Contestant("eager", "fxopt"),
]
DECODES = [Contestant("sdpa"), *(Contestant("sdpa", b, "reduce-overhead") for b in ("inductor", "fxopt"))]
ALL_DECODES = [
    *DECODES,
    Contestant("sdpa", "inductor"),
    *(Contestant("sdpa", b, DESCENT) for b in ("inductor", "fxopt")),
]
BOTH = [Contestant("sdpa"), *(Contestant(a, b) for a in ("sdpa", "eager") for b in ("inductor", "fxopt"))]


@dataclass(frozen=True)
class Case:
    """`make` gives the model's class and configuration, `bind` what one step is. With `compared` there is room for the
    model in float32 beside all others."""

    name: str
    make: Callable[[bool], tuple[Any, Any]]
    bind: Callable[[Any, bool], Step]
    contestants: list[Contestant]
    compared: bool = True


def ids(model: Any, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)


def tokens(batch: int, length: int, *, padded: bool = False, **more: Any) -> Callable[[Any, bool], Step]:
    """A step over `length` tokens; half the rows end in padding if `padded`."""

    def bind(model: Any, tiny: bool) -> Step:
        given = ids(model, *((2, 24) if tiny else (batch, length)))
        mask = torch.ones_like(given)
        if padded:
            mask[::2, given.shape[1] * 3 // 5 :] = 0
        return lambda run: lambda: run(input_ids=given, attention_mask=mask, **more)[0]

    return bind


def images(batch: int) -> Callable[[Any, bool], Step]:
    def bind(model: Any, tiny: bool) -> Step:
        size = model.config.image_size
        given = torch.randn(2 if tiny else batch, 3, size, size, device=model.device, dtype=torch.bfloat16)
        given = given.to(model.dtype)
        return lambda run: lambda: run(pixel_values=given)[0]

    return bind


def shape(model: str, config: str, small: dict[str, Any], **full: Any) -> Callable[[bool], tuple[Any, Any]]:
    """transformers' classes by name, at full size or with what makes them small."""

    def make(tiny: bool) -> tuple[Any, Any]:
        import transformers

        return getattr(transformers, model), getattr(transformers, config)(**full | (small if tiny else {}))

    return make


DECODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0,
}  # fmt: skip
NO_HEAD_DIM = {k: v for k, v in DECODER.items() if k != "head_dim"}
BERT = {
    k: v for k, v in DECODER.items() if k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
} | {"num_attention_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
GEMMA2 = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 256000,
}  # fmt: skip

ENCODERS = {
    "BERT-base, 32 x 512, padded": (
        shape("BertModel", "BertConfig", BERT),
        tokens(32, 512, padded=True),
    ),
    "GPT-2 medium, 8 x 1024": (
        shape("GPT2LMHeadModel", "GPT2Config", GPT2, n_embd=1024, n_layer=24, n_head=16),
        tokens(8, 1024, use_cache=False, logits_to_keep=1),
    ),
    "T5-base encoder, 16 x 512": (
        shape(
            "T5EncoderModel", "T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
        ),
        tokens(16, 512),
    ),
    "Gemma 2 2B shape, 6 layers, 2 x 2048": (
        shape("Gemma2ForCausalLM", "Gemma2Config", DECODER, num_hidden_layers=6, **GEMMA2),
        tokens(2, 2048, use_cache=False, logits_to_keep=1),
    ),
    "BLOOM-560m, 8 x 1024": (
        shape(
            "BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
            hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880,
        ),
        tokens(8, 1024, use_cache=False, logits_to_keep=1),
    ),
    "ViT-B/16, 64 images": (
        shape("ViTModel", "ViTConfig", {**BERT, "image_size": 32, "patch_size": 8}),
        images(64),
    ),
    "Swin-T, 64 images": (
        shape(
            "SwinModel", "SwinConfig",
            {"image_size": 64, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
            embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24],
        ),
        images(64),
    ),
}  # fmt: skip

DECODERS = {
    "Qwen3 8B shape": shape(
        "Qwen3ForCausalLM", "Qwen3Config", DECODER, hidden_size=4096, intermediate_size=12288, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
    ),
    "Gemma 2 2B shape": shape("Gemma2ForCausalLM", "Gemma2Config", DECODER, num_hidden_layers=4, **GEMMA2),
    "Mistral 7B shape": shape(
        "MistralForCausalLM", "MistralConfig", DECODER, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, vocab_size=32768, sliding_window=None,
    ),
    "Phi-3 mini shape": shape(
        "Phi3ForCausalLM", "Phi3Config", NO_HEAD_DIM, hidden_size=3072, intermediate_size=8192, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, pad_token_id=0,
    ),
    "GPT-2 XL shape": shape("GPT2LMHeadModel", "GPT2Config", GPT2, n_embd=1600, n_layer=4, n_head=25,
                            n_positions=2048),
}  # fmt: skip


LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 32768, "rope_theta": 500000.0,
}  # fmt: skip


def llama(layers: int) -> Callable[[bool], tuple[Any, Any]]:
    return shape("LlamaForCausalLM", "LlamaConfig", NO_HEAD_DIM, num_hidden_layers=layers, **LLAMA)


def llama_cases() -> list[Case]:
    found = []
    for batch, length, layers in (
        (1, 2048, 8), (1, 16384, 8), (4, 2048, 8), (8, 2048, 8), (16, 2048, 8), (64, 2048, 8), (1, 2048, 32)
    ):  # fmt: skip
        found.append(
            Case(
                f"llama decode, {layers} layers, B={batch}, cache {length}",
                llama(layers),
                lambda m, tiny, b=batch, n=length: decode(m, b, *((64, 17) if tiny else (n, 513))),
                ALL_DECODES if (batch, length, layers) in ((1, 2048, 8), (1, 16384, 8), (16, 2048, 8)) else DECODES,
                compared=batch < 64 and layers == 8,
            )
        )
    for batch, length in ((1, 2048), (8, 512)):
        found.append(
            Case(
                f"llama prefill, 8 layers, {batch} x {length}",
                llama(8),
                lambda m, tiny, b=batch, n=length: prefill(m, b, 40 if tiny else n),
                [*BOTH, *([Contestant("sdpa", "inductor", "max-autotune-no-cudagraphs")] if batch == 1 else [])],
            )
        )
    return found


def all_cases() -> list[Case]:
    found = [Case(f"encode {name}", make, bind, BATCHES) for name, (make, bind) in ENCODERS.items()]
    for name, make in DECODERS.items():
        found.append(
            Case(
                f"decode {name}",
                make,
                lambda m, tiny: decode(m, 1, *((64, 17) if tiny else (2048, 513))),
                DECODES,
            )
        )
        found.append(Case(f"prefill {name}", make, lambda m, tiny: prefill(m, 1, 40 if tiny else 2048), PREFILLS))
    return found + llama_cases()


def build(case: Case, tiny: bool) -> Any:
    kind, config = case.make(tiny)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(default)


def attend_with(model: Any, attention: str) -> None:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = attention


def exact(case: Case, model: Any, tiny: bool) -> torch.Tensor:
    """The result in eager mode of the same weights and inputs in float32."""
    precise = copy.deepcopy(model).float()
    attend_with(precise, case.contestants[0].attention)
    torch.manual_seed(1)
    result: torch.Tensor = case.bind(precise, tiny)(precise)().float().clone()
    return result


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters, without an embedding of which a step reads a row only."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = getattr(table, "weight", None)
    if head is not None and looked_up is head.weight:
        looked_up = None
    return sum(p.nbytes for p in model.parameters() if p is not looked_up)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernels(step: Callable[[], torch.Tensor], most: int = 8) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds) of the kernels that take longest in one step, as torch.profiler has them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, spent = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, spent + event.time_range.elapsed_us() / 1e3
    rows = [(name[:120], count, round(spent, 4)) for name, (count, spent) in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def work(
    name: str, given: argparse.Namespace, deadline: float, roomy: Any, ready: Any, turn: Any, results: Any
) -> None:
    """One model: compile all contestants, say so, wait for the turn, time them. `roomy` is held for what takes room."""
    (case,) = (c for c in all_cases() if c.name == name)
    tiny = given.tiny
    torch._dynamo.config.recompile_limit = 64
    rows: list[dict[str, Any]] = []
    steps: list[tuple[Contestant, Callable[[], torch.Tensor] | None, dict[str, Any]]] = []
    try:
        with torch.no_grad():
            model = build(case, tiny)
            with roomy:
                right = exact(case, model, tiny) if case.compared else None
                torch.cuda.empty_cache()
            weights = weight_bytes(model)
            torch.manual_seed(1)
            bind = case.bind(model, tiny)
            for contestant in case.contestants:
                if given.only and not any(part in str(contestant) for part in given.only):
                    continue
                row: dict[str, Any] = {"case": name, "contestant": str(contestant), "weights": weights}
                rows.append(row)
                if time.time() > deadline:
                    row["failed"] = "no time left"
                    continue
                if contestant.attention == "sdpa" and not model._supports_sdpa:
                    row["failed"] = "not offered"
                    continue
                if contestant.measures:
                    steps.append((contestant, None, row))
                    continue
                try:
                    steps.append((contestant, first_call(contestant, model, bind, row, right), row))
                except Exception as problem:
                    row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
            ready.put(name)
            with turn:
                for contestant, made, row in steps:
                    try:
                        step = made or first_call(contestant, model, bind, row, right)
                    except Exception as problem:
                        row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
                        continue
                    attend_with(model, contestant.attention)
                    measure(step, row, tiny)
                    if given.profile:
                        row["kernels"] = kernels(step)
    except Exception as problem:
        rows.append({"case": name, "contestant": "", "failed": f"{type(problem).__name__}: {str(problem)[:300]}"})
        ready.put(name)
    results.put(rows)


def first_call(
    contestant: Contestant, model: Any, bind: Step, row: dict[str, Any], right: torch.Tensor | None
) -> Callable[[], torch.Tensor]:
    """Compile by calling; what came of it goes into `row`."""
    attend_with(model, contestant.attention)
    step = bind(contestant.compiled(model))
    start = time.perf_counter()
    with fxopt.record() as rec:
        out = step()
    synchronize()
    row["first_call_s"] = round(time.perf_counter() - start, 2)
    row["sites"] = sorted({f"{s.fusion}: {s.implementation}" for s in rec.sites})
    row["passed_through"] = [g.reason for g in rec.graphs if not g.normalized]
    if right is not None:
        row["error"] = float(f"{((out.float() - right).norm() / right.norm()).item():.3g}")
    return step


def measure(step: Callable[[], torch.Tensor], row: dict[str, Any], tiny: bool) -> None:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        row["ms"] = round((time.perf_counter() - start) * 1e3, 3)
        return
    step()
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    row["peak_MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    once = milliseconds(step, warmup=1, repeats=3, calls=2)
    row["ms"] = float(f"{milliseconds(step, warmup=0, repeats=9, calls=max(1, min(20, int(60 / once)))):.4g}")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: a line a case, a column a contestant; milliseconds, and how fxopt compares."""
    rows = report["rows"]
    names = list(dict.fromkeys(r["contestant"] for r in rows if r["contestant"]))
    lines = [f"# Models on {report['device']}", "", f"torch {report['torch']}, bfloat16; milliseconds.", ""]
    head = [*names, "best other / best fxopt", "limit", "error / eager mode's"]
    lines += [f"| model | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    over_written = []
    for case in dict.fromkeys(r["case"] for r in rows):
        found = {r["contestant"]: r for r in rows if r["case"] == case}
        ms = {name: row["ms"] for name, row in found.items() if "ms" in row}
        ours = [t for name, t in ms.items() if name.startswith("fxopt")]
        others = [t for name, t in ms.items() if not name.startswith("fxopt")]
        ratio = f"{min(others) / min(ours):.2f}" if ours and others else ""
        cells = [f"{ms[n]:g}" if n in ms else found.get(n, {}).get("failed", "").split(":")[0] for n in names]
        limit, weights, bandwidth = "", next(iter(found.values())).get("weights"), report.get("bandwidth")
        if "decode" in case and weights and bandwidth:
            least = weights / bandwidth * 1e3
            limit = f"{least:.3f}" + (f" ({least / min(ours):.0%})" if ours else "")
        lines.append(f"| {case} | {' | '.join([*cells, ratio, limit, _worse(found)])} |")
        if {"fxopt, eager", "inductor, eager"} <= ms.keys() and case.startswith("encode"):
            over_written.append(ms["inductor, eager"] / ms["fxopt, eager"])
    if over_written:
        mean = statistics.geometric_mean(over_written)
        lines += ["", f"Inductor / fxopt, attention as written: geometric mean {mean:.3f}."]
    return "\n".join(lines) + "\n"


def _worse(found: dict[str, dict[str, Any]]) -> str:
    """The largest error of fxopt's over that of eager mode with the same attention, or with the one that was run."""
    eager = {
        name.split(", ")[-1]: row["error"] for name, row in found.items() if "eager mode" in name and "error" in row
    }
    ours = [
        row["error"] / eager.get(name.split(", ")[-1], max(eager.values()))
        for name, row in found.items()
        if name.startswith("fxopt") and "error" in row and eager
    ]
    return f"{max(ours):.2f}" if ours else ""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="*", default=[], help="parts of the cases' names")
    parser.add_argument("--seconds", type=float, default=300.0, help="compile nothing more after so long")
    parser.add_argument("--profile", action="store_true", help="list the kernels that take longest, too")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the contestants' names")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.tiny:
        parser.error("needs a CUDA device; --tiny runs without one")
    given.folder.mkdir(parents=True, exist_ok=True)
    names = [c.name for c in all_cases() if not given.cases or any(w in c.name for w in given.cases)]
    context = multiprocessing.get_context("spawn")
    ready, results, turn, roomy = context.Queue(), context.Queue(), context.Lock(), context.Lock()
    turn.acquire()
    deadline = time.time() + given.seconds
    shared = (given, deadline, roomy, ready, turn, results)
    processes = [context.Process(target=work, args=(name, *shared)) for name in names]
    for process in processes:
        process.start()
    for done in range(len(names)):
        print(f"{done + 1} of {len(names)} compiled: {ready.get()}, {deadline - time.time():.0f} s left", flush=True)
    on_gpu = torch.cuda.is_available()
    bandwidth = copy_bandwidth(torch.device("cuda")) if on_gpu else None
    turn.release()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "bandwidth": bandwidth,
        "rows": [],
    }
    for _ in names:
        report["rows"] += results.get()
        report["rows"].sort(key=lambda row: names.index(row["case"]))
        (given.folder / "models.json").write_text(json.dumps(report, indent=1))
        (given.folder / "models.md").write_text(table(report))
    for process in processes:
        process.join()
    print(table(report))
    return report


if __name__ == "__main__":
    main()
