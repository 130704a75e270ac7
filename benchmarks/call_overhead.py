"""What a call of compiled code costs the host: a small model, its result not waited for.

    python benchmarks/call_overhead.py [--out overhead.json]

Two decoder layers of width 64 with one token: on a GPU the kernels take less time than the call, so that a row of calls
takes what the host needs for them (Dynamo's guards, the code around the graph, the graph's replay). "call" is that
time; "behind Dynamo" the part of it that is spent in what the backend returned. Contestants take turns, medians of 15
rows of 200 calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

import fxopt  # noqa: F401 - makes the backend's name known to torch.compile

ROWS, CALLS = 15, 200


def small_model(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def behind_dynamo(backend: str, mode: str | None, spent: list[float]) -> Callable[..., Any]:
    """`backend` as torch.compile would call it, with each call of its result timed."""
    compile_with = torch._dynamo.lookup_backend(backend)

    def compiler(module: Any, inputs: Any, **more: Any) -> Any:
        if backend == "inductor":
            options = {"triton.cudagraphs": True, "triton.cudagraph_trees": True} if mode else {}
            from torch._inductor.compile_fx import compile_fx

            run = compile_fx(module, inputs, config_patches=options)
        else:
            run = compile_with(module, inputs, **({"mode": mode} if mode else {}))

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            out = run(*arguments)
            spent.append(time.perf_counter() - start)
            return out

        return timed

    return compiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("overhead.json"))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    model = small_model(device)
    token = torch.randint(0, 128, (1, 1), device=device)
    contestants = [(b, m) for b in ("inductor", "fxopt") for m in (None, "reduce-overhead")]
    calls: dict[str, Callable[[], Any]] = {"eager mode": lambda: model(input_ids=token, use_cache=False).logits}
    inner: dict[str, list[float]] = {}
    with torch.no_grad():
        for backend, mode in contestants:
            name = f"{backend}, {mode or 'default'}"
            inner[name] = []

            def step(ids: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
                return logits

            # A code object of its own, or all contestants would share one list of compiled entries and its guards.
            step.__code__ = step.__code__.replace(co_name=f"step_{len(inner)}")
            run = torch.compile(step, backend=behind_dynamo(backend, mode, inner[name]), fullgraph=True)
            calls[name] = lambda run=run: run(token)
        for call in calls.values():
            for _ in range(5):
                call()
            wait()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for spent in inner.values():
            spent.clear()
        for _ in range(ROWS):
            for name, call in calls.items():
                wait()
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                wait()
                times[name].append((time.perf_counter() - start) / CALLS)
    rows = []
    for name, taken in times.items():
        row = {"contestant": name, "call_us": round(statistics.median(taken) * 1e6, 1)}
        if inner.get(name):
            row["behind_dynamo_us"] = round(statistics.median(inner[name]) * 1e6, 1)
        rows.append(row)
        print(row, flush=True)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    given.out.write_text(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
