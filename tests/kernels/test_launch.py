"""Launches that come again are those that Triton would make: the same arguments, with nothing bound anew."""

import inspect

import pytest
import torch

from fxopt.kernels import _flash
from fxopt.kernels._launch import MOST, Launch, Launches, launch

B, H, N = 2, 8, 100


class Kernel:
    """Stands for a jitted function: keeps the arguments that its launches were given, in the order of its parameters.

    `bound` counts launches through the function itself, as against those of what it compiled.
    """

    def __init__(self, kernel):
        self.arg_names = list(inspect.signature(kernel.fn if hasattr(kernel, "fn") else kernel).parameters)
        self.launches, self.bound = [], 0

    def __getitem__(self, grid):
        def run(*args, **flags):
            self.bound += 1
            every = dict(zip(self.arg_names, args, strict=False)) | flags
            self.launches.append(((*grid, 1, 1)[:3], [pointer(every[name]) for name in self.arg_names]))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launches.append((grid, [pointer(a) for a in args]))


def pointer(argument):
    return ("pointer", argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton")
    stub = Kernel(_flash._prefill_kernel)
    monkeypatch.setattr(_flash, "_prefill_kernel", stub)
    monkeypatch.setattr(_flash, "_LAUNCHES", Launches())
    return stub


def qkv(rows=N, width=16):
    return tuple(torch.randn(B, H, rows, width, dtype=torch.bfloat16) for _ in range(3))


def numbers():
    return torch.arange(N)[None, None].clone()


KINDS = {
    "plain": dict,
    "causal, sink": lambda: {"is_causal": True, "sink": torch.randn(1, H, 1, 1)},
    "soft cap, factor": lambda: {"softcap": 3.0, "factor": torch.rand(N, N)},
    "padding": lambda: {"mask": torch.rand(B, 1, 1, N) < 0.5},
    "a mask a head": lambda: {"mask": torch.randn(1, H, N, N)},
    "window": lambda: {"first": numbers() - 9, "last": numbers()},
    "segments": lambda: {"mask": torch.cat([numbers(), numbers()], -1), "first": numbers() - 9},
    "slopes": lambda: {"bias": torch.rand(1, H)},
    "by distance": lambda: {"bias": torch.rand(1, H, 2 * N - 1)},
    "by key": lambda: {"bias": torch.rand(B, H, 1, N)},
}


def run(tensors, **given):
    arguments = {"mask": None, "scale": 0.3, "is_causal": False, "empty_rows": "zero"} | given
    return _flash.flash_attention(*tensors, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_launch_is_the_one_that_would_be_bound(kernel, kind):
    run(qkv(), **KINDS[kind]())
    tensors, given = qkv(), KINDS[kind]()
    found = []
    for _ in range(2):
        out = run(tensors, **given)
        grid, arguments = kernel.launches[-1]
        found.append((grid, ["out" if a == pointer(out) else a for a in arguments]))
        assert kernel.bound == len(found)
        _flash._LAUNCHES = Launches()
    assert found[0] == found[1]


def test_tensors_that_were_one_may_be_several(kernel):
    q, k, v = qkv()
    run((q, q, q))
    run((q, k, v))
    assert kernel.bound == 1
    assert kernel.launches[1][1][:3] == [pointer(t) for t in (q, k, v)]


@pytest.mark.parametrize("change", [
    {"scale": 0.4}, {"is_causal": True}, {"softcap": 2.0}, {"sink": torch.ones(1, H, 1, 1)},
    {"config": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}},
])  # fmt: skip
def test_other_settings_are_other_launches(kernel, change):
    tensors = qkv()
    run(tensors)
    run(tensors, **change)
    assert kernel.bound == 2


def test_other_layouts_are_other_launches(kernel):
    q, k, v = qkv()
    wide = torch.zeros(B, H, N, 24, dtype=torch.bfloat16)
    others = [
        (q, k, v.float()), (q, k, torch.zeros(B, N, H, 16, dtype=torch.bfloat16).transpose(1, 2)),
        (q, k, wide[..., :16]), (q, k, wide[..., 4:20]), qkv(90),
    ]  # fmt: skip
    run((q, k, v))
    for tensors in others:
        run(tensors)
    assert kernel.bound == 1 + len(others)


@pytest.mark.parametrize("given", [
    {"bias": torch.rand(1, 2 * N - 1, H).mT},
    {"mask": torch.zeros(B, H, N, N, dtype=torch.float64)},
    {"sink": torch.zeros(1, H, 1, 1, dtype=torch.float64)},
    {"mask": torch.zeros(N, N), "config": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}},
])  # fmt: skip
def test_what_is_copied_or_looked_through_is_launched_anew(kernel, monkeypatch, given):
    monkeypatch.setattr(_flash, "list_tiles", lambda given, m, n: given.q.new_zeros(1, 1, 1, dtype=torch.int32))
    tensors = qkv()
    for _ in range(2):
        run(tensors, **given)
    assert kernel.bound == 2


def test_a_dense_copy_is_made_each_time(kernel):
    q, k, v = qkv()
    k = torch.zeros(B, H, 16, N, dtype=torch.bfloat16).mT
    for _ in range(2):
        run((q, k, v))
    assert kernel.bound == 2


def test_the_interpreter_compiles_nothing():
    class Interpreted:
        def __getitem__(self, grid):
            return lambda *args, **flags: None

    launches = Launches()
    launches.keep("key", launch(Interpreted(), (1,), (torch.ones(1),), 3, BLOCK=4))
    assert launches.find("key") is None


def test_no_more_launches_are_kept_than_are_likely_to_come_again():
    launches = Launches()
    for i in range(MOST + 1):
        launches.keep(i, Launch(None, (1, 1, 1), ()))
    assert launches.find(0) is None
    assert launches.find(MOST) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_launch_that_comes_again_is_right(kind):
    _flash._LAUNCHES = Launches()
    for turn in range(3):
        tensors = [t.cuda() for t in qkv()]
        given = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in KINDS[kind]().items()}
        ours = run(tensors, **given)
        assert len(_flash._LAUNCHES._known) == 1
        _flash._LAUNCHES._known.clear() if turn == 2 else None
        anew = run(tensors, **given)
        assert torch.equal(ours, anew)
