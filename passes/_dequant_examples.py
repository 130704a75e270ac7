"""Programs whose dequantised matmuls must be found, and look-alikes that must be refused, as people write them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.rewrite.fusion import Example

N, K, G = 24, 128, 32  # outputs, inputs, group size


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, K).to(dtype)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def _scale(*shape: int) -> Tensor:
    return torch.rand(shape) / 16 + 0.01


def _nibbles(w: Tensor) -> Tensor:
    return torch.stack([w & 15, w >> 4], -1).reshape(w.shape[0], -1)


def _grouped(q: Tensor, scale: Tensor) -> Tensor:
    """[N, K] times one scale a group."""
    return (q.reshape(q.shape[0], -1, G).to(scale.dtype) * scale.unsqueeze(-1)).reshape(q.shape[0], -1)


def int8_examples() -> Iterator[Example]:
    """8-bit weights, one scale an output."""

    def two() -> tuple[Tensor, ...]:
        return _x(), _int8(N, K), _scale(N)

    def three() -> tuple[Tensor, ...]:
        return _x(torch.bfloat16), _int8(N, K), _scale(N).bfloat16(), torch.randn(N).bfloat16()

    yield Example(lambda x, w, s: F.linear(x, w * s[:, None]), two, name="int8, promoted by the scale")
    yield Example(
        lambda x, w, s, b: F.linear(x, w.to(x.dtype) * s.unsqueeze(1), b), three, name="int8, cast and scaled, bias"
    )
    yield Example(lambda x, w, s, b: F.linear(x, w.to(x.dtype)) * s + b, three, name="int8, scaled after the product")
    yield Example(
        lambda x, w, s: x @ (w.t().float() * s), lambda: (_x(), _int8(N, K), _scale(N)), name="int8, matmul, transposed"
    )
    yield Example(
        lambda x, w, s: x @ (w.float() * s), lambda: (_x(), _int8(K, N), _scale(N)), name="int8, stored inputs first"
    )
    yield Example(
        lambda x, w, s: F.linear(x, (w.float() * s.float()).to(x.dtype)),
        lambda: (_x(torch.bfloat16), _int8(N, K), _scale(N, 1)),
        name="int8, dequantised in float32",
    )
    yield Example(lambda x, w, s: F.linear(x, w.float() * s), lambda: (_x(), _int8(N, K), _scale()), name="one scale")
    yield Example(
        lambda x, w, s, b: torch.addmm(b, x, (w.float() * s[:, None]).t()),
        lambda: (_x()[0], _int8(N, K), _scale(N), torch.randn(N)),
        name="int8, addmm",
    )
    yield Example(
        lambda x, w, s: F.linear(x, w.float() * s),
        lambda: (_x(), _int8(N, K), _scale(K)),
        sites=0,
        refused="differs along the inputs",
        name="int8, a scale for each input",
    )
    yield Example(
        lambda x, w, s: F.linear(x, _grouped(w, s)),
        lambda: (_x(), _int8(N, K), _scale(N, K // G)),
        sites=0,
        refused="8-bit weights with groups",
        name="int8 in groups",
    )
    yield Example(
        lambda x, w, s, z: F.linear(x, (w.float() - z) * s),
        lambda: (_x(), _int8(N, K), _scale(N, 1), torch.randn(N, 1)),
        sites=0,
        refused="zero points",
        name="int8 with zero points",
    )
    yield Example(
        lambda x, w, s: (F.linear(x, w.float() * s[:, None]), (w.float() * s[:, None]).sum()),
        two,
        name="dequantised twice, once for a product",
    )
    yield Example(_shared_weight, two, sites=0, refused="also used by", name="the weight is used elsewhere too")
    yield Example(
        lambda x, w, s, b: F.linear(x, w.to(x.dtype), b) * s,
        three,
        sites=0,
        refused="bias is added before",
        name="the bias is scaled",
    )
    yield Example(lambda x, w: F.linear(x, w.float()), lambda: two()[:2], sites=0, refused="not scaled", name="bare")
    yield Example(
        lambda x, w, s: F.linear(x, w.float() * s * s),
        lambda: (_x(), _int8(N, K), _scale(N, 1)),
        sites=0,
        refused="two scales",
        name="scaled twice",
    )
    yield Example(
        lambda x, w, s: F.linear(x, w.float() / s),
        lambda: (_x(), _int8(N, K), _scale(N, 1)),
        sites=0,
        refused="divided by its scale",
        name="divided",
    )


def _shared_weight(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    dense = w.float() * s[:, None]
    return F.linear(x, dense), dense.sum(0)


def int4_examples() -> Iterator[Example]:
    """4-bit weights: layouts, zero points and minima, and what must not be taken for them."""

    def grouped(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return _x(dtype), _bytes(N, K // 2), _scale(N, K // G).to(dtype)

    def offset_first(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        low, high = (w & 15).to(torch.int8) - 8, (w >> 4).to(torch.int8) - 8
        return F.linear(x, _grouped(torch.stack([low, high], -1).flatten(-2), s))

    def per_output(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, (_nibbles(w).to(torch.int8) - 8).to(x.dtype) * s.to(x.dtype))

    def arithmetic(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, _grouped(torch.stack([w % 16, w // 16], -1).reshape(N, K).to(s.dtype) - 8.0, s))

    def halves(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, _grouped(torch.cat([w & 15, (w >> 4) & 15], 1).to(s.dtype) - 7.5, s))

    def ggml_blocks(x: Tensor, w: Tensor, s: Tensor, m: Tensor) -> Tensor:
        shift = torch.arange(0, 8, 4, dtype=torch.uint8, device=w.device).reshape(1, 2, 1)
        q = (w.reshape(-1, 1, G // 2) >> shift).reshape(-1, G) & 15
        return F.linear(x, (s.reshape(-1, 1) * q + m.reshape(-1, 1)).reshape(N, K))

    def signed_words(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, device=w.device)
        q = ((w.unsqueeze(-1) >> shifts) & 15).reshape(N, K)
        return F.linear(x, (q - 8) * s.repeat_interleave(G, 1))

    def gptq(x: Tensor, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=w.device).unsqueeze(0)
        zeros = torch.bitwise_right_shift(z.unsqueeze(2).expand(-1, -1, 8), shifts.unsqueeze(0)).to(torch.int8)
        zeros = (torch.bitwise_and(zeros, 15) + 1).reshape(-1, 1, N)
        q = torch.bitwise_right_shift(w.unsqueeze(1).expand(-1, 8, -1), shifts.unsqueeze(-1)).to(torch.int8)
        q = torch.bitwise_and(q, 15).reshape(-1, G, N)
        return torch.matmul(x, (s.reshape(-1, 1, N) * (q - zeros)).reshape(K, N))

    def zeros_of(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return *grouped(), torch.randint(0, 16, (N, K // G)).to(dtype)

    def asymmetric(x: Tensor, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        q = _nibbles(w).reshape(N, -1, G).float()
        return F.linear(x, ((q - z[:, :, None]) * s[:, :, None]).reshape(N, K))

    def wrapping(x: Tensor, w: Tensor, s: Tensor, z: Tensor) -> Tensor:
        q = _nibbles(w).reshape(N, -1, G)
        return F.linear(x, ((q - z[:, :, None]) * s[:, :, None]).reshape(N, K))

    def bias_after_scale(x: Tensor, w: Tensor, s: Tensor, m: Tensor) -> Tensor:
        q = _nibbles(w).reshape(N, -1, G).to(s.dtype)
        return F.linear(x, (q * s[:, :, None] - m[:, :, None]).reshape(N, K))

    yield Example(offset_first, grouped, name="int4, offset taken off in int8")
    yield Example(offset_first, lambda: grouped(torch.bfloat16), name="int4, bfloat16")
    yield Example(per_output, lambda: (_x(), _bytes(N, K // 2), _scale(N, 1)), name="int4, one scale an output")
    yield Example(arithmetic, grouped, name="int4, unpacked by division")
    yield Example(halves, grouped, name="int4, halves of a row, offset 7.5")
    yield Example(halves, lambda: (_x(), _int8(N, K // 2), _scale(N, K // G)), name="int4 in signed bytes")
    yield Example(ggml_blocks, lambda: (*grouped(), torch.randn(N, K // G)), name="int4, blocks with a minimum")
    yield Example(signed_words, lambda: (_x(), _words(N, K // 8), _scale(N, K // G)), name="int4 in int32")
    yield Example(gptq, lambda: (_x(), _words(K // 8, N), _scale(K // G, N), _words(K // G, N // 8)), name="GPTQ")
    yield Example(asymmetric, lambda: zeros_of(torch.float32), name="int4, float zero points")
    yield Example(asymmetric, lambda: zeros_of(torch.uint8), name="int4, integer zero points")
    yield Example(bias_after_scale, lambda: (*grouped(), torch.randn(N, K // G)), name="int4, minimum subtracted")
    yield Example(
        wrapping, lambda: zeros_of(torch.uint8), sites=0, refused="wraps around", name="unsigned zero points wrap"
    )
    yield Example(
        lambda x, w, s: F.linear(x, _grouped((w.to(torch.int8) >> 4).repeat(1, 2).reshape(N, K), s)),
        grouped,
        sites=0,
        name="high halves twice, by an op that no chain has",
    )
    yield Example(
        lambda x, w, s: F.linear(x, _grouped(torch.stack([w & 15, w & 15], -1).reshape(N, K), s)),
        grouped,
        sites=0,
        refused="none of the known layouts",
        name="low halves twice",
    )
    yield Example(
        lambda x, w, s: F.linear(x, _grouped(torch.stack([w & 15, w.view(torch.int8) >> 4], -1).reshape(N, K), s)),
        grouped,
        sites=0,
        refused="none of the known layouts",
        name="the high half keeps its sign",
    )
    yield Example(
        lambda x, w, s: F.linear(x, (_nibbles(w).float().reshape(N, G, -1) * s[:, None, :]).reshape(N, K)),
        grouped,
        sites=0,
        refused="the scale is not one number",
        name="strided groups",
    )
    yield Example(
        lambda x, w, s: F.linear(x, torch.cat([w & 15, w >> 4], 0).float() * s),
        lambda: (_x(), _bytes(N // 2, K), _scale(N, 1)),
        sites=0,
        refused="several outputs are joined",
        name="outputs packed together",
    )
    yield Example(
        lambda x, w, s, c: F.linear(x, _grouped((torch.stack([w, w], -1) >> c).reshape(N, K) & 15, s)),
        lambda: (*grouped(), torch.tensor([0, 4], dtype=torch.uint8)),
        sites=0,
        refused="its value may change",
        name="shifts given as an input",
    )
    yield Example(
        lambda x, w, s: F.linear(x, _grouped(_nibbles(w), s)[:, :64]),
        lambda: (_x()[..., :64], _bytes(N, K // 2), _scale(N, K // G)),
        sites=0,
        name="only a part of the weight",
    )


def examples() -> Iterator[Example]:
    """All examples."""
    yield from int8_examples()
    yield from int4_examples()
