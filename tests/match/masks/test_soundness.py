"""Masks that hypothesis makes up, nearly causal ones above all, are never misread: on other inputs, at other sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifting import lift

NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
small = st.integers(-4, 4)
positive = st.integers(1, 5)

# A vector of integers [N] is arange(N) moved about; a program is nested tuples, so that failures read well.
vectors = st.recursive(
    st.sampled_from([("arange",), ("arange",), ("arange", 2), ("positions",)]),
    lambda inner: st.one_of(
        st.tuples(st.just("flip"), inner),
        st.tuples(st.just("roll"), inner, small),
        st.tuples(st.just("shift"), inner, small),
        st.tuples(st.just("slice_cat"), inner, st.integers(0, 3)),
        st.tuples(st.just("pad"), inner, st.integers(0, 2), small),
        st.tuples(st.just("cumsum_ones"), st.just(0)),
        st.tuples(st.just("breaks"), inner),
        st.tuples(st.sampled_from(["at", "at signed"]), inner, inner),
        st.tuples(st.just("reshape"), inner),
    ),
    max_leaves=3,
)
integers = st.recursive(
    st.one_of(
        st.just(("i",)),
        st.just(("j",)),
        st.tuples(st.just("row"), vectors),
        st.tuples(st.just("key"), vectors),
        st.tuples(st.just("number"), small),
        st.sampled_from([("length",), ("lengths",), ("padding",)]),
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["+", "-", "max", "min"]), inner, inner),
        st.tuples(st.just("+"), inner, st.tuples(st.just("number"), small)),
        st.tuples(st.sampled_from(["//", "%", "trunc", "*"]), inner, positive),
        st.tuples(st.sampled_from(["abs", "neg"]), inner),
        st.tuples(st.just("clamp"), inner, small, positive),
        st.tuples(st.just("as"), inner, st.sampled_from(NARROW + FLOATS)),
        st.tuples(st.just("narrow"), inner, st.sampled_from(NARROW + FLOATS), st.sampled_from([40, 100])),
    ),
    max_leaves=4,
)
conditions = st.recursive(
    st.one_of(
        st.tuples(st.sampled_from(["<=", "<", ">", ">=", "==", "!="]), integers, integers),
        st.tuples(st.sampled_from(["<=", "<"]), st.just(("j",)), integers),
        st.tuples(st.sampled_from(["<=", ">", "=="]), integers, st.sampled_from([("half", 1), ("half", -3)])),
        st.sampled_from([("flag",), ("padded",), ("tril", 0), ("tril", 1), ("triu", -2)]),
    ),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["and", "and", "or", "xor", "both", "choose"]), inner, inner),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=4,
)
fills = st.sampled_from(["min", "-inf", "float32 min", -1e4])
masks = st.one_of(
    st.tuples(st.just("bool"), conditions),
    st.tuples(st.just("where"), conditions, fills, st.sampled_from(FLOATS)),
    st.tuples(st.just("filled"), conditions, fills, st.sampled_from(FLOATS)),
    st.tuples(st.just("times"), conditions, fills, st.sampled_from(FLOATS)),
    st.tuples(st.just("sum"), conditions, fills, conditions, fills, st.sampled_from(FLOATS)),
)

COMPARE = {"<=": torch.le, "<": torch.lt, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne}


class Program:
    """What a nested tuple computes, in plain torch."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, padding, positions, lengths, flag, length):
        self.given = {"padding": padding, "positions": positions, "lengths": lengths, "flag": flag, "length": length}
        self.n = padding.shape[1]
        return getattr(self, f"mask_{self.mask[0]}")(*self.mask[1:])

    def vector(self, program):
        kind, *rest = program
        if kind == "arange":
            return torch.arange(self.n) if not rest else torch.arange(0, self.n * rest[0], rest[0])
        if kind == "positions":
            return self.given["positions"]
        if kind == "cumsum_ones":
            return torch.ones(self.n, dtype=torch.long).cumsum(0) - 1
        x = self.vector(rest[0])
        if kind == "flip":
            return x.flip(0)
        if kind == "roll":
            return x.roll(rest[1], 0)
        if kind == "shift":
            return x + rest[1]
        if kind == "slice_cat":
            return torch.cat([x[rest[1] :], x[: rest[1]]])
        if kind == "pad":
            return torch.nn.functional.pad(x, (rest[1], 0), value=rest[2])[: self.n]
        if kind == "breaks":
            return torch.cumsum(torch.diff(x, prepend=x[:1] - 1) != 1, 0)
        if kind == "reshape":
            return x.reshape(1, -1, 1).transpose(1, 2).flatten()
        index = self.vector(rest[1])
        return x[index.remainder(self.n) if kind == "at" else index.clamp(-self.n, self.n - 1)]

    def integer(self, program):
        kind, *rest = program
        if kind in ("i", "j"):
            x = torch.arange(self.n)
            return x[:, None] if kind == "i" else x
        if kind == "row":
            return self.vector(rest[0])[:, None]
        if kind == "key":
            return self.vector(rest[0])
        if kind in ("number", "length"):
            return rest[0] if rest else self.given["length"]
        if kind == "half":
            return rest[0] / 2
        if kind == "lengths":
            return self.given["lengths"][:, None, None, None]
        if kind == "padding":
            return self.given["padding"][:, None, None, :]
        x = self.integer(rest[0])
        if not isinstance(x, torch.Tensor):
            x = torch.tensor(x)
        if kind in ("+", "-", "max", "min"):
            y = self.integer(rest[1])
            if kind in "+-":
                return x + y if kind == "+" else x - y
            y = y if isinstance(y, torch.Tensor) else torch.tensor(y)
            return torch.maximum(x, y) if kind == "max" else torch.minimum(x, y)
        if kind == "abs":
            return x.abs()
        if kind == "neg":
            return -x
        if kind == "as":
            return x.to(rest[1])
        if kind == "narrow":
            return x.to(rest[1]) * rest[2] + rest[2]
        if kind == "clamp":
            return x.clamp(rest[1], rest[2])
        if kind == "//":
            return x // rest[1]
        if kind == "trunc":
            return torch.div(x, rest[1], rounding_mode="trunc")
        return x % rest[1] if kind == "%" else x * rest[1]

    def condition(self, program):
        kind, *rest = program
        if kind in COMPARE:
            x, y = self.integer(rest[0]), self.integer(rest[1])
            return COMPARE[kind](x if isinstance(x, torch.Tensor) else torch.tensor(x), y)
        if kind == "flag":
            return self.given["flag"][:, None, None, :]
        if kind == "padded":
            return self.given["padding"][:, None, None, :].to(torch.bool)
        if kind in ("tril", "triu"):
            return getattr(torch.ones(self.n, self.n, dtype=torch.bool), kind)(rest[0])
        x = self.condition(rest[0])
        if kind == "not":
            return ~x
        y = self.condition(rest[1])
        if kind == "choose":
            return torch.where(self.given["flag"][:, None, None, :], x, y)
        return {"and": x & y, "or": x | y, "xor": x ^ y, "both": torch.logical_and(x, y) * x}[kind]

    def full(self, condition):
        return self.condition(condition).expand(2, 1, self.n, self.n)

    @staticmethod
    def filling(fill, dtype):
        if fill == "float32 min" and dtype == torch.float16:
            return float("-inf")
        numbers = {"min": torch.finfo(dtype).min, "-inf": float("-inf"), "float32 min": torch.finfo(torch.float32).min}
        return numbers.get(fill, fill)

    def mask_bool(self, condition):
        return self.full(condition)

    def mask_where(self, condition, fill, dtype):
        return torch.where(self.full(condition), torch.zeros((), dtype=dtype), self.filling(fill, dtype))

    def mask_filled(self, condition, fill, dtype):
        fill = torch.finfo(dtype).min if fill == "float32 min" else self.filling(fill, dtype)
        return torch.zeros(self.n, dtype=dtype).expand(2, 1, self.n, self.n).masked_fill(self.full(condition), fill)

    def mask_times(self, condition, fill, dtype):
        return (1.0 - self.full(condition).to(dtype)) * torch.finfo(dtype).min

    def mask_sum(self, first, fill, second, other, dtype):
        return self.mask_where(first, fill, dtype) + self.mask_where(second, other, dtype)


def inputs(seed, n):
    g = torch.Generator().manual_seed(seed)
    padding = torch.randint(-1, 3, (2, n), generator=g)
    positions = torch.arange(n) - torch.randint(0, n, (), generator=g)
    positions[n // 2 :] = torch.arange(n - n // 2)
    lengths = torch.randint(-1, n + 2, (2,), generator=g)
    return padding, positions, lengths, torch.rand(2, n, generator=g) < 0.6, torch.randint(-2, n, (), generator=g)


def check(mask, dynamic):
    sizes = (6, 9, 23) if dynamic else (7, 7)
    runs = [inputs(seed, n) for seed, n in enumerate(sizes)]
    program = Program(mask)
    if program(*runs[0]).shape != (2, 1, sizes[0], sizes[0]):
        return None
    checked = lift(program, *runs[0], dynamic=dynamic)
    for run in runs[1:]:
        checked(*run)
    return checked


common = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=60, **common)
@given(masks)
def test_made_up_masks(mask):
    check(mask, dynamic=False)


@settings(max_examples=25, **common)
@given(masks)
def test_made_up_masks_of_symbolic_sizes(mask):
    check(mask, dynamic=True)


@pytest.mark.slow
@settings(max_examples=250, **{**common, "derandomize": False})
@given(masks, st.booleans())
def test_many_made_up_masks(mask, dynamic):
    check(mask, dynamic)
