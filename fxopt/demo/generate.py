"""Greedy generation with two compiled functions over one static KV cache.

    prefill(ids [1, S])   writes keys and values of the whole prompt, returns the first new token [1, 1]
    decode(token [1, 1])  writes one position, returns the next token [1, 1]

The cache's tensors keep their addresses and its position is a tensor that the graph itself advances, so neither
function is compiled again at a later position; the prompt's length is marked dynamic, so one prefill graph serves all.
The argmax is inside the graphs: a step hands the host nothing to wait for but the token, and that is read at the end.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fxopt.demo.models import DemoError, Loaded
from fxopt.view.record import record
from fxopt.view.report import Report

Progress = Callable[[str], Any]

WARM_UP = 4  # tokens


@dataclass(frozen=True)
class Answer:
    """The tokens generated for one prompt, and how long they took, in seconds."""

    tokens: tuple[int, ...]
    first_token: float  # the prefill
    decoding: float  # all the others

    @property
    def tokens_per_second(self) -> float:
        """Rate of the decode loop."""
        return (len(self.tokens) - 1) / self.decoding if self.decoding > 0 else 0.0


@dataclass
class Generation:
    """What one backend did with all prompts.

    compiling: seconds of the first calls beyond what the same calls take later; 0 for eager mode
    graphs, breaks: graphs that Dynamo captured, and graph breaks
    cached: graphs that Inductor took from its cache on disk, which makes `compiling` shorter
    prefill, decode: what fxopt did with the graphs of the two functions (empty for other backends)
    """

    backend: str
    answers: list[Answer] = field(default_factory=list)
    compiling: float = 0.0
    graphs: int = 0
    breaks: int = 0
    cached: int = 0
    prefill: Report = field(default_factory=Report)
    decode: Report = field(default_factory=Report)

    @property
    def first_token(self) -> float:
        """Median time to the first token, compiled code being warm."""
        return median(answer.first_token for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Median rate of the decode loop."""
        return median(answer.tokens_per_second for answer in self.answers)


def encode(loaded: Loaded, prompt: str) -> Tensor:
    """Token ids [1, S] of one prompt, in the model's chat template if its tokenizer has one."""
    tokenizer = loaded.tokenizer
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    ids = ids["input_ids"]
    if ids.shape[-1] < 1:
        raise DemoError(f"the prompt {prompt!r} has no tokens: give one with words in it")
    return ids.to(loaded.device)


def decode_text(loaded: Loaded, tokens: tuple[int, ...]) -> str:
    """The text of generated tokens, up to the end-of-sequence token."""
    end = loaded.tokenizer.eos_token_id
    kept = tokens[: tokens.index(end)] if end in tokens else tokens
    return str(loaded.tokenizer.decode(kept, skip_special_tokens=True)).strip()


@torch.inference_mode()
def generate(
    loaded: Loaded, prompts: list[Tensor], tokens: int, backend: str, mode: str | None = None, progress: Progress = str
) -> Generation:
    """Generate `tokens` tokens for each prompt [1, S] with `backend` ("eager": not compiled). Raises DemoError."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    run = Generation(backend)
    cache = _static_cache(loaded, prompts[0], max(p.shape[-1] for p in prompts) + max(tokens, WARM_UP))
    prefill, decode = _functions(loaded.model, cache, backend, mode)
    start = time.perf_counter()
    if backend != "eager":
        with record() as run.prefill:
            progress(f"{backend}: compiling the prefill")
            token = _start(prefill, cache, prompts[0])
        with record() as run.decode:
            progress(f"{backend}: compiling the decode step")
            decode(token)
    # Once more, outside the results: CUDA graphs are captured in the second call, libraries warm up in the first.
    _answer(prefill, decode, cache, prompts[0], WARM_UP, loaded.device)
    first = time.perf_counter() - start
    for i, ids in enumerate(prompts):
        progress(f"{backend}: prompt {i + 1} of {len(prompts)}, {tokens} tokens")
        run.answers.append(_answer(prefill, decode, cache, ids, tokens, loaded.device))
    if backend != "eager":
        again = run.answers[0]  # the same prompt: a longer one may have been compiled for once more
        warm = 2 * again.first_token + WARM_UP / max(again.tokens_per_second, 1.0)
        run.compiling = max(0.0, first - warm)
    run.graphs = counters["stats"]["unique_graphs"]
    run.breaks = sum(counters["graph_break"].values())
    run.cached = counters["inductor"]["fxgraph_cache_hit"]
    return run


def _static_cache(loaded: Loaded, prompt: Tensor, length: int) -> Any:
    """A static cache of `length` positions, allocated: one call in eager mode gives each layer its own right shape."""
    from transformers import StaticCache

    accepted = inspect.signature(loaded.model.forward).parameters
    if "past_key_values" not in accepted:
        raise DemoError(f"{type(loaded.model).__name__} keeps no KV cache: the demo can't generate with it")
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DemoError(f"prompt and new tokens take {length} positions, the model has {limit}: lower --tokens")
    cache = StaticCache(config=loaded.model.config, max_cache_len=length)
    loaded.model(input_ids=prompt, past_key_values=cache, use_cache=True)
    return cache


def _functions(
    model: Any, cache: Any, backend: str, mode: str | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def decode(token: Tensor) -> Tensor:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True, **last).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    if backend == "eager":
        return prefill, decode
    return torch.compile(prefill, backend=backend, mode=mode), torch.compile(decode, backend=backend, mode=mode)


def _start(prefill: Callable[[Tensor], Tensor], cache: Any, ids: Tensor) -> Tensor:
    cache.reset()
    if ids.shape[-1] > 1:  # a length of 1 is always its own graph
        torch._dynamo.maybe_mark_dynamic(ids, 1)
    return prefill(ids).clone()  # under CUDA graphs the next call would overwrite it


def _answer(
    prefill: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    cache: Any,
    ids: Tensor,
    tokens: int,
    device: torch.device,
) -> Answer:
    made = []
    first = _timed(device, lambda: made.append(_start(prefill, cache, ids)))

    def loop() -> None:
        for _ in range(tokens - 1):
            made.append(decode(made[-1]).clone())

    rest = _timed(device, loop)
    return Answer(tuple(torch.cat(made, -1)[0].tolist()), first, rest)


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
