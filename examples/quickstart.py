"""Attention spelled out, compiled with fxopt, and what fxopt did to it: the example of the README."""

import torch

import fxopt


def attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ v


q, k, v = torch.randn(3, 2, 8, 256, 64)
with fxopt.record() as rec:
    y = torch.compile(attention, backend="fxopt")(q, k, v)
torch.testing.assert_close(y, attention(q, k, v))
print(rec)
