"""On a GPU: whole models against eager, in every mode, with CUDA graphs, static caches and padding."""

from __future__ import annotations

import pytest
import torch

import fxopt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}


def llama(attention="sdpa", dtype=torch.bfloat16):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=64, attn_implementation=attention
    )
    return LlamaForCausalLM(config).eval().to("cuda", dtype)


def bert(attention="sdpa", dtype=torch.bfloat16):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, num_attention_heads=4, attn_implementation=attention)).eval().to("cuda", dtype)


def closer_or_as_close(ours, eager, exact):
    """Error against the float64 model at most twice eager's own, and one unit in the last place."""
    allowed = 2 * (eager.double() - exact).abs().max() + torch.finfo(eager.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make, norm", [(llama, "rms_norm"), (bert, "layer_norm")])
def test_prefill_with_padding(make, norm, attention, mode):
    ids = torch.randint(0, 512, (2, 33), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0  # on the right: padding on the left leaves rows that cuDNN itself makes NaN in eager mode
    with torch.no_grad():
        exact = make("eager", torch.float64)(ids, attention_mask=mask)[0]
        model = make(attention)
        eager = model(ids, attention_mask=mask)[0]
        torch._dynamo.reset()
        with fxopt.record() as rec:
            compiled = torch.compile(model, backend="fxopt", mode=mode)
            for _ in range(3):
                ours = compiled(ids, attention_mask=mask)[0].clone()
    counts = rec.counts()
    assert counts["attention"] == 2
    assert counts[norm] == 5
    live = mask.bool()
    closer_or_as_close(ours[live], eager[live], exact[live])
    assert not ours.isnan().any()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_static_cache_decode(mode):
    from transformers import StaticCache

    model = llama("sdpa", torch.float32)
    ids = torch.randint(0, 512, (2, 9), device="cuda")

    def generate(step):
        cache = StaticCache(config=model.config, max_cache_len=64)
        logits = model(ids, past_key_values=cache).logits[:, -1:]
        out = []
        for _ in range(6):
            token = logits.argmax(-1)
            out.append(token)
            logits = step(input_ids=token, past_key_values=cache).logits.clone()
        return torch.cat(out, 1)

    with torch.no_grad():
        expected = generate(model)
        torch._dynamo.reset()
        ours = generate(torch.compile(model, backend="fxopt", mode=mode))
    assert ours.tolist() == expected.tolist()


def test_spelled_out_attention_with_padding_on_the_left():
    """Rows masked with finfo.min throughout are uniform in eager mode, and must not become NaN for the next layer."""
    model = llama("eager")
    ids = torch.randint(0, 512, (2, 33), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), fxopt.record() as rec:
        # In float64 a score below finfo.min is -inf, and such rows NaN: float32 is exact enough for bfloat16.
        exact = llama("eager", torch.float32)(ids, attention_mask=mask)[0].double()
        eager = model(ids, attention_mask=mask)[0]
        torch._dynamo.reset()
        ours = torch.compile(model, backend="fxopt")(ids, attention_mask=mask)[0]
    assert rec.counts()["attention"] == 2
    assert exact.isfinite().all()
    closer_or_as_close(ours, eager, exact)


def test_training_step():
    ids = torch.randint(0, 512, (2, 16), device="cuda")
    grads = []
    for compile_it in (False, True):
        model = llama("sdpa", torch.float32).train()
        torch._dynamo.reset()
        run = torch.compile(model, backend="fxopt") if compile_it else model
        run(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, eager in zip(*grads[::-1], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5)


def test_weights_swapped_under_cuda_graphs():
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.RMSNorm(64)).cuda()
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        run = torch.compile(layer, backend="fxopt", mode="reduce-overhead")
        for _ in range(3):
            run(x)
        layer[0].weight.data.copy_(torch.randn(64, 64))
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-4)
        layer[1].weight.data = torch.randn(64, device="cuda")
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-4)


def test_mixed_devices():
    run = torch.compile(lambda x, scale: torch.nn.functional.rms_norm(x * scale, (8,)), backend="fxopt")
    x, scale = torch.randn(3, 8, device="cuda"), torch.tensor(2.0)
    torch.testing.assert_close(run(x, scale), torch.nn.functional.rms_norm(x * scale, (8,)))


def test_a_mask_of_numbers_made_on_the_gpu_is_read():
    """`torch.tensor(0.0, device=...)` is a constant in the GPU's memory, and transformers' masks are made of it."""

    def program(q, k, v):
        i, j = torch.arange(600, device=q.device)[:, None], torch.arange(600, device=q.device)[None]
        zero = torch.tensor(0.0, device=q.device, dtype=q.dtype)
        mask = torch.where(j <= i, zero, torch.finfo(q.dtype).min)
        return torch.softmax(q @ k.mT * 0.125 + mask, -1) @ v

    q, k, v = (torch.randn(1, 4, 600, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    with fxopt.record() as rec, torch.no_grad():
        ours = torch.compile(program, backend="fxopt", fullgraph=True)(q, k, v)
    (call,) = [line for graph in rec.graphs for line in graph.after.splitlines() if "fxopt.attention" in line]
    assert "None, 0.125, True" in call
    closer_or_as_close(ours, program(q, k, v), program(q.double(), k.double(), v.double()))
