"""Sentence embeddings: an encoder's last hidden state, averaged over each sentence's tokens and scaled to length 1.

embedding = normalise( sum_t mask[t] * hidden[t] / sum_t mask[t] )
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fxopt.demo.generate import Progress
from fxopt.demo.models import Loaded
from fxopt.view.record import record
from fxopt.view.report import Report

REPEATS = 10


@dataclass
class Embeddings:
    """What one backend did with a batch of sentences: float32 `vectors` [sentences, hidden], times in seconds."""

    backend: str
    vectors: Tensor = field(default_factory=lambda: torch.empty(0))
    compiling: float = 0.0  # the first call beyond what later ones take; 0 for eager mode
    seconds: float = 0.0  # median time of one batch, warm
    graphs: int = 0
    breaks: int = 0
    cached: int = 0
    report: Report = field(default_factory=Report)


@torch.inference_mode()
def embed(
    loaded: Loaded, sentences: list[str], backend: str, mode: str | None = None, progress: Progress = str
) -> Embeddings:
    """Embed the sentences as one padded batch with `backend` ("eager": not compiled)."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    run = Embeddings(backend)
    batch = _batch(loaded, sentences)
    function = _function(loaded.model)
    if backend != "eager":
        function = torch.compile(function, backend=backend, mode=mode)
        progress(f"{backend}: compiling")
    with record() as run.report:
        first, _ = _timed(function, batch, loaded.device)
    progress(f"{backend}: {REPEATS} batches of {len(sentences)} sentences")
    times = []
    for _ in range(REPEATS):
        seconds, vectors = _timed(function, batch, loaded.device)
        times.append(seconds)
        run.vectors = vectors.float().cpu().clone()
    run.seconds = median(times)
    run.compiling = max(0.0, first - run.seconds) if backend != "eager" else 0.0
    run.graphs = counters["stats"]["unique_graphs"]
    run.breaks = sum(counters["graph_break"].values())
    run.cached = counters["inductor"]["fxgraph_cache_hit"]
    return run


def _batch(loaded: Loaded, sentences: list[str]) -> dict[str, Tensor]:
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    encoded = tokenizer(sentences, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
    accepted = inspect.signature(loaded.model.forward).parameters
    return {name: tensor.to(loaded.device) for name, tensor in encoded.items() if name in accepted}


def _function(model: Any) -> Any:
    def sentence_embeddings(**batch: Tensor) -> Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return functional.normalize(mean, dim=-1)

    return sentence_embeddings


def _timed(function: Any, batch: dict[str, Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    vectors = function(**batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, vectors
