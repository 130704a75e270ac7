"""Prefill and decode of a Llama of the 8B shape: eager, Inductor in its modes, fxopt in the same modes, one run.

    python benchmarks/llama.py --layers 8 --out results.json

Random bf16 weights. Decode is one token against a StaticCache, as transformers' own generate() drives it. The limit is
the bytes of weights and of live keys and values over the measured copy bandwidth (decode), or the FLOPs over the
measured matrix rate (prefill). Errors are against float32 logits on the CPU's arithmetic of the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from timing import copy_bandwidth, matmul_rate, milliseconds

TUNED = {"coordinate_descent_tuning": True}
MODES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "eager": None,
    "inductor": ("inductor", {}),
    "inductor reduce-overhead": ("inductor", {"mode": "reduce-overhead"}),
    "inductor reduce-overhead, coordinate descent": ("inductor", {"options": {"triton.cudagraphs": True, **TUNED}}),
    "inductor max-autotune-no-cudagraphs": ("inductor", {"mode": "max-autotune-no-cudagraphs"}),
    "fxopt": ("fxopt", {}),
    "fxopt reduce-overhead": ("fxopt", {"mode": "reduce-overhead"}),
    "fxopt reduce-overhead, separate launches": (
        "fxopt",
        {"options": {"mode": "reduce-overhead", "inductor": {"combo_kernels": False}}},
    ),
    "fxopt reduce-overhead, PDL": (
        "fxopt",
        {"options": {"mode": "reduce-overhead", "inductor": {"triton.enable_pdl": True}}},
    ),
    "fxopt reduce-overhead, coordinate descent": (
        "fxopt",
        {"options": {"mode": "reduce-overhead", "inductor": TUNED}},
    ),
}
DEFAULT, GRAPHS = ["inductor", "fxopt"], ["inductor reduce-overhead", "fxopt reduce-overhead"]


def model_of(layers: int, attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=32768,
        rope_theta=500000.0,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        old = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(old)


def prefill(model: Any, batch: int, length: int) -> Any:
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)
    return lambda run: lambda: run(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def decode(model: Any, batch: int, cache_length: int, used: int) -> Any:
    """One decode step at position `used` of a static cache that holds random keys and values before it."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=cache_length)
    ids = torch.randint(0, model.config.vocab_size, (batch, used), device=model.device)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.randint(0, model.config.vocab_size, (batch, 1), device=model.device)

    def bind(run: Any) -> Any:
        for layer in cache.layers:  # every mode starts at the same position; a step advances it by one
            layer.cumulative_length.fill_(used)
            if hasattr(layer, "cumulative_length_int"):  # sliding windows count in Python too
                layer.cumulative_length_int = used
        return lambda: run(input_ids=token, past_key_values=cache, use_cache=True).logits

    return bind


def time_case(name: str, model: Any, bind: Any, which: list[str]) -> list[dict[str, Any]]:
    rows = []
    reference = None
    for mode in which:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        row: dict[str, Any] = {"case": name, "mode": mode}
        try:
            run, recorder = model, None
            chosen = MODES[mode]
            if chosen is not None:
                import fxopt

                backend, how = chosen
                recorder = fxopt.record()
                run = torch.compile(model, backend=backend, **how)
            step = bind(run)
            with torch.no_grad():
                start = time.perf_counter()
                if recorder is not None:
                    with recorder as rec:
                        out = step()
                    row["sites"] = rec.counts()
                    row["implementations"] = sorted({f"{s.fusion}:{s.implementation}" for s in rec.sites})
                    row["stages"] = {k: round(v, 3) for g in rec.graphs for k, v in g.seconds.items()}
                    row["passed_through"] = [g.reason for g in rec.graphs if not g.normalized]
                else:
                    out = step()
                torch.cuda.synchronize()
                row["compile_s"] = round(time.perf_counter() - start, 2)
                out = out.float().clone()
                if reference is None:
                    reference = out
                row["max_diff_to_eager"] = round((out - reference).abs().max().item(), 5)
                row["ms"] = round(milliseconds(step), 4)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("llama.json"))
    parser.add_argument("--cases", nargs="*", default=None, help="only cases whose name contains one of these")
    arguments = parser.parse_args()
    wanted = arguments.cases

    bandwidth, rate = copy_bandwidth(torch.device("cuda")), matmul_rate()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_TBps": round(bandwidth / 1e12, 3),
        "matmul_TFLOPs": round(rate / 1e12, 1),
        "rows": [],
    }
    for attention in ("sdpa", "eager"):
        model = model_of(arguments.layers, attention)
        weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
        cases = [
            (f"prefill 1x2048 {attention}", lambda m=model: prefill(m, 1, 2048), ["eager", *DEFAULT]),
            (f"prefill 8x512 {attention}", lambda m=model: prefill(m, 8, 512), ["eager", *DEFAULT]),
            (
                f"decode B=1 cache 2048 {attention}",
                lambda m=model: decode(m, 1, 2048, 513),
                ["eager", *DEFAULT, *GRAPHS],
            ),
        ]
        if attention == "sdpa":
            cases += [
                ("decode B=1 cache 16384 sdpa", lambda m=model: decode(m, 1, 16384, 513), ["eager", *GRAPHS]),
                *(
                    (f"decode B={b} cache 2048 sdpa", lambda m=model, b=b: decode(m, b, 2048, 513), ["eager", *GRAPHS])
                    for b in (16, 4, 8, 64)
                ),
                (
                    "tuned decode B=1 cache 2048 sdpa",
                    lambda m=model: decode(m, 1, 2048, 513),
                    ["fxopt reduce-overhead, PDL", *(g + ", coordinate descent" for g in GRAPHS)],
                ),
                (
                    "tuned prefill 1x2048 sdpa",
                    lambda m=model: prefill(m, 1, 2048),
                    ["inductor max-autotune-no-cudagraphs"],
                ),
            ]
        for name, make, modes in cases:
            if wanted and not any(w in name for w in wanted):
                continue
            rows = time_case(name, model, make(), modes)
            for row in rows:
                row["limit_ms"] = round(weights / bandwidth * 1e3, 3) if "decode" in name else None
            report["rows"] += rows
            arguments.out.write_text(json.dumps(report, indent=1))
        del model, cases
        torch.cuda.empty_cache()
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
