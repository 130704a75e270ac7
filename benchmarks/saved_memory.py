"""Bytes saved for the backward: fxopt's against Inductor's, for four models and for each fusion alone.

    python benchmarks/saved_memory.py [--quick]

Both go through Inductor's decompositions, joint-graph passes and min-cut partitioner, which decides what is saved and
what is computed again; code is not generated, so nothing depends on the machine. Counted are the storages that the
compiled forward hands to autograd, once each, without parameters, inputs and outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxopt
import fxopt.backend


def partitioned(module: Any, inputs: Sequence[Any], options: Any = None) -> Any:
    """Inductor up to its partitioner; the two graphs then run op by op."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, list(inputs), inner_compile=lambda graph, inputs, **rest: graph.forward)


@contextmanager
def without_code() -> Iterator[None]:
    """fxopt's graphs are lowered by `partitioned`."""
    before = fxopt.backend.compile_graph
    fxopt.backend.compile_graph = partitioned
    try:
        yield
    finally:
        fxopt.backend.compile_graph = before


def saved_bytes(program: Callable[..., Any], inputs: Mapping[str, Any] | Sequence[Any], backend: Any) -> int:
    """What one call of the compiled program keeps for its backward."""
    torch._dynamo.reset()
    positional, named = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with without_code():
        compiled = torch.compile(program, backend=backend)
        compiled(*positional, **named)
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = compiled(*positional, **named)
    module = [*program.parameters(), *program.buffers()] if isinstance(program, nn.Module) else []
    result = list(result.values()) if isinstance(result, dict) else result
    for tensor in tree_leaves((module, positional, named, result)):
        if isinstance(tensor, Tensor):
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def compare(program: Callable[..., Any], inputs: Any) -> tuple[int, int, dict[str, int]]:
    """(Inductor's bytes, fxopt's bytes, what fused)."""
    before = saved_bytes(program, inputs, partitioned)
    with fxopt.record() as rec:
        after = saved_bytes(program, inputs, "fxopt")
    return before, after, rec.counts()


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = 97


def models(
    attention: str, tokens: int = 128
) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]]]:
    """(name, maker of the model and its inputs); "padded" ones have an attention mask."""
    import transformers as hf

    ids = torch.randint(3, VOCABULARY, (2, tokens))
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    text = {"input_ids": ids, "labels": ids}
    common = {"vocab_size": VOCABULARY, "attn_implementation": attention}

    def llama() -> tuple[nn.Module, dict[str, Tensor]]:
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, **common)), text

    def bert() -> tuple[nn.Module, dict[str, Tensor]]:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return hf.BertForMaskedLM(hf.BertConfig(**SIZES, **dropout, **common)), text

    def vit() -> tuple[nn.Module, dict[str, Tensor]]:
        config = hf.ViTConfig(**SIZES, image_size=64, patch_size=8, num_labels=5, attn_implementation=attention)
        return hf.ViTForImageClassification(config), {
            "pixel_values": torch.randn(2, 3, 64, 64),
            "labels": torch.tensor([1, 4]),
        }

    def t5() -> tuple[nn.Module, dict[str, Tensor]]:
        sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **common)), text

    def padded(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]) -> Any:
        def made() -> tuple[nn.Module, dict[str, Tensor]]:
            model, inputs = make()
            return model, inputs | {"attention_mask": mask}

        return made

    for name, make in (("Llama", llama), ("BERT", bert), ("ViT", vit), ("T5", t5)):
        yield name, make
        if make is not vit:
            yield f"{name}, padded", padded(make)


def rms(x: Tensor) -> Tensor:
    """RMSNorm as Llama spells it."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def fusions(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Each fusion alone, in its forms."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def qkv(keys: int = 64, kv_heads: int = 4, width: int = 32, values: int = 32) -> tuple[Tensor, ...]:
        return randn(2, 4, 64, width), randn(2, kv_heads, keys, width), randn(2, kv_heads, keys, values)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = q @ k.mT * 0.2
        return torch.softmax(scores if mask is None else scores + mask, -1, dtype=torch.float32).to(q.dtype) @ v

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        above = torch.ones(q.shape[2], k.shape[2], device=q.device).triu(1).bool()
        return torch.softmax((q @ k.mT * 0.2).masked_fill(above, -torch.inf), -1) @ v

    def filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT * 0.2).masked_fill(~keep, -1e9 if q.dtype == torch.float32 else -3e4), -1) @ v

    def int8(x: Tensor, w: Tensor, s: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, w.to(x.dtype) * s[:, None], b)

    def int4(x: Tensor, p: Tensor, s: Tensor) -> Tensor:
        q = torch.stack([p & 15, p >> 4], -1).reshape(p.shape[0], -1, 32).to(x.dtype) - 8
        return F.linear(x, (q * s[:, :, None]).reshape(p.shape[0], -1))

    def gated(gate: Tensor, up: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.silu(gate.sin()) * up.sin(), w)

    def gelu(gate: Tensor, up: Tensor, w: Tensor) -> Tensor:
        gate, up = gate.sin(), up.sin()
        inner = 0.7978845608028654 * (gate + 0.044715 * gate.pow(3))
        return F.linear(0.5 * gate * (1 + torch.tanh(inner)) * up, w)

    def half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (q * cos + half(q) * sin) @ (k * cos + half(k) * sin).mT

    rows, weight = (2, 64, 128), randn(128)
    tables = torch.randn(64, 32).to(dtype), torch.randn(64, 32).to(dtype)
    keep = torch.rand(2, 1, 64, 64) < 0.7
    mask = torch.zeros(2, 1, 64, 64, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min)
    frozen = torch.rand(96).to(dtype)
    eight, four = torch.randint(-127, 128, (96, 128), dtype=torch.int8), torch.randint(0, 256, (96, 64)).to(torch.uint8)
    sdpa = F.scaled_dot_product_attention
    return {
        "attention": (attend, qkv()),
        "attention, few keys": (attend, qkv(keys=8)),
        "attention, values of another width": (attend, qkv(values=16)),
        "attention, grouped heads": (grouped, qkv(kv_heads=2)),
        "attention, causal": (causal, qkv()),
        "attention, mask added": (attend, (*qkv(), mask)),
        "attention, mask filled in": (filled, (*qkv(), keep)),
        "attention, learnt bias": (attend, (*qkv(), randn(1, 4, 64, 64))),
        "SDPA": (sdpa, qkv()),
        "SDPA, boolean mask": (sdpa, (*qkv(), keep)),
        "SDPA, float mask": (sdpa, (*qkv(), mask)),
        "RMSNorm": (lambda x, w: rms(x) * w, (randn(*rows), weight)),
        "F.rms_norm": (lambda x, w: F.rms_norm(x, (128,), w), (randn(*rows), weight)),
        "add, RMSNorm": (lambda x, r, w: (rms(x + r) * w, x + r), (randn(*rows), randn(*rows), weight)),
        "add, RMSNorm, the sum unused": (lambda x, r, w: rms(x + r) * w, (randn(*rows), randn(*rows), weight)),
        "gated MLP": (gated, (randn(*rows), randn(*rows), randn(64, 128))),
        "gated MLP, gelu spelled out": (gelu, (randn(*rows), randn(*rows), randn(64, 128))),
        "rotary, q and k": (rotated, (*qkv()[:2], *tables)),
        "L2 norm": (lambda x: F.normalize(x.sin(), dim=-1), (randn(*rows),)),
        "GroupNorm, SiLU": (lambda x, w: F.silu(F.group_norm(x, 4, w)).sin(), (randn(2, 64, 128), randn(64))),
        "LayerNorm": (lambda x, w, b: F.layer_norm(x, (128,), w, b), (randn(*rows), weight, randn(128))),
        "add, LayerNorm": (
            lambda x, r, w: (F.layer_norm(x + r, (128,), w), x + r),
            (randn(*rows), randn(*rows), weight),
        ),
        "int8_matmul": (int8, (randn(*rows), eight, frozen)),
        "int8_matmul, learnt scale and bias": (int8, (randn(*rows), eight, randn(96), randn(96))),
        "int4_matmul": (int4, (randn(*rows), four, torch.rand(96, 4).to(dtype))),
        "int4_matmul, learnt scale": (int4, (randn(*rows), four, randn(96, 4))),
    }


def table(rows: Iterator[tuple[str, tuple[int, int, dict[str, int]]]]) -> None:
    """Print rows as a Markdown table."""
    print("| | fused | Inductor | fxopt | |\n|---|---|---|---|---|", flush=True)
    for name, (before, after, counts) in rows:
        fused = ", ".join(f"{n} {fusion}" for fusion, n in counts.items()) or "nothing"
        share = f"{after / before:.2f}" if before else "1.00" if after == before else "more"
        print(f"| {name} | {fused} | {before / 1024:.1f} | {after / 1024:.1f} | {share} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 only")
    dtypes = [torch.float32] if parser.parse_args().quick else [torch.float32, torch.bfloat16]
    print(f"torch {torch.__version__}, KiB saved for the backward\n")
    for dtype in dtypes:
        for attention in ("sdpa", "eager"):
            print(f"\n{dtype}, attn_implementation={attention}\n")
            table((name, _model(make, dtype)) for name, make in models(attention))
        print(f"\n{dtype}, each fusion alone\n")
        table((name, compare(*case)) for name, case in fusions(dtype).items())


def _model(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], dtype: torch.dtype
) -> tuple[int, int, dict[str, int]]:
    torch.manual_seed(0)
    model, inputs = make()
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return compare(model.to(dtype).train(), cast)


if __name__ == "__main__":
    main()
