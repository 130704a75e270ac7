"""The backend as torch.compile sees it: registration, modes, options, reset, and inputs of every odd kind."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import fxopt
from fxopt.options import OptionError, Options

KNOWN = ["attention", "rms_norm", "layer_norm", "dequant_matmul"]


pytestmark = pytest.mark.usefixtures("without_inductor")


def run(program, *inputs, **kwargs):
    with fxopt.record() as rec:
        out = torch.compile(program, backend="fxopt", **kwargs)(*inputs)
    return out, rec


def check(program, *inputs, **kwargs):
    out, rec = run(program, *inputs, **kwargs)
    expected = program(*inputs)
    torch.testing.assert_close(out, expected, equal_nan=True)
    return rec


def norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


x, w = torch.randn(3, 8), torch.randn(8)


def test_works_without_importing_fxopt():
    code = (
        "import torch, sys; assert 'fxopt' in torch.compiler.list_backends(); assert 'fxopt' not in sys.modules;"
        "f = torch.compile(lambda x: x.sin(), backend='fxopt', options={'inductor': {}});"
        "print(f(torch.zeros(2)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.0", done.stderr


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_inductors(mode):
    assert Options.parse(mode, None, KNOWN).mode == mode
    assert Options.parse(None, {"mode": mode}, KNOWN).mode == mode
    check(norm, x, w, mode=mode)


@pytest.mark.parametrize(
    "mode, options, words",
    [
        ("reduce-overheads", None, "did you mean 'reduce-overhead'"),
        (None, {"verfy": "off"}, "did you mean 'verify'"),
        (None, {"verify": "numerics"}, "did you mean 'numeric'"),
        (None, {"tune": "ful"}, "did you mean .full.*known: off, auto, full"),
        (None, {"fusions": ["rmsnorm"]}, "did you mean 'rms_norm'"),
        (None, {"disable": "atention"}, "did you mean 'attention'"),
        (None, {"inductor": ["x"]}, "takes a dict"),
    ],
)
def test_an_unknown_option_says_what_was_meant(mode, options, words):
    with pytest.raises(OptionError, match=words):
        Options.parse(mode, options, KNOWN)


def test_an_option_error_reaches_the_caller_of_torch_compile():
    with pytest.raises(Exception, match="did you mean 'verify'"):
        torch.compile(norm, backend="fxopt", options={"verfy": "off"})(x, w)


def test_fusions_and_disable():
    assert check(norm, x, w).counts() == {"rms_norm": 1}
    torch._dynamo.reset()
    assert check(norm, x, w, options={"disable": ["rms_norm"]}).counts() == {}
    torch._dynamo.reset()
    assert check(norm, x, w, options={"fusions": ["layer_norm"]}).counts() == {}


@pytest.mark.parametrize("verify", ["off", "meta", "numeric", "strict"])
def test_verify_levels(verify):
    rec = check(norm, x, w, options={"verify": verify})
    assert rec.counts() == {"rms_norm": 1}
    status = {"off": "unchecked", "meta": "meta", "numeric": "equal", "strict": "equal"}[verify]
    assert rec.sites[0].verdict.status == status


def test_reset_forgets():
    from fxopt.rewrite import verdicts

    check(norm, x, w)
    assert verdicts._memory
    torch._dynamo.reset()
    assert not verdicts._memory


def test_fullgraph_dynamic_and_grad_modes():
    for kwargs in ({"fullgraph": True}, {"dynamic": True}, {"dynamic": False}):
        torch._dynamo.reset()
        assert check(norm, x, w, **kwargs).counts() == {"rms_norm": 1}
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with mode():
            assert check(norm, x, w).counts() == {"rms_norm": 1}


def test_training():
    grads = []
    for program in (norm, torch.compile(norm, backend="fxopt")):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        program(a, b).pow(2).sum().backward()
        grads.append((a.grad, b.grad))
    torch.testing.assert_close(*grads)


def test_recompiles_with_new_shapes_stay_right():
    compiled = torch.compile(norm, backend="fxopt")
    for rows, columns in ((3, 8), (5, 8), (5, 16), (1, 8), (0, 8), (7, 1)):
        a, b = torch.randn(rows, columns), torch.randn(columns)
        torch.testing.assert_close(compiled(a, b), norm(a, b), equal_nan=True)


class Hooked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(8)
        self.norm.register_forward_hook(lambda module, args, out: out * 2)
        self.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.norm(x)


def test_a_model_with_hooks():
    with torch.no_grad():
        assert check(Hooked(), x).counts() == {"rms_norm": 1}


ODD = {
    "no tensors": (lambda n: n + 1, (3,)),
    "zero-size": (lambda x: x.softmax(-1) @ x.mT, (torch.randn(0, 4, 4),)),
    "empty reduction": (lambda x: x.sum(1).softmax(0), (torch.randn(3, 0),)),
    "one-size": (lambda x: x.softmax(-1), (torch.randn(1, 1, 1),)),
    "complex": (lambda x: (x * x.conj()).real.sqrt(), (torch.randn(3, 3, dtype=torch.complex64),)),
    "complex rotary": (
        lambda x, f: torch.view_as_real(torch.view_as_complex(x.reshape(3, 4, 2)) * f).flatten(1),
        (torch.randn(3, 8), torch.randn(4, dtype=torch.complex64)),
    ),
    "float8": (lambda x: x.to(torch.float8_e4m3fn).to(torch.float32) + 1, (torch.randn(4, 4),)),
    "float8 input": (lambda x: x.to(torch.bfloat16) * 2, (torch.randn(4, 4).to(torch.float8_e5m2),)),
    "bool and int": (lambda b, i: torch.where(b, i, -i).cumsum(0), (torch.tensor([True, False]), torch.tensor([3, 4]))),
    "float64": (norm, (x.double(), w.double())),
    "output is input": (lambda x: (x, x.sin()), (x,)),
    "output is a view": (lambda x: x.t()[1:], (x,)),
    "same tensor twice": (lambda a, b: a * b + a, (x, x)),
    "overlapping inputs": (lambda a, b: (a + b).softmax(-1), (x[:2], x[1:])),
    "nonzero": (lambda x: x[x > 0].sum() + x.nonzero().shape[0], (x,)),
    "item": (lambda x: x * x.sum().item(), (x,)),
    "python branch on data": (lambda x: x.sin() if x.sum() > 0 else x.cos(), (x,)),
    "dict and tuple results": (lambda x: {"a": x + 1, "b": (x * 2, None, 3)}, (x,)),
    "non-contiguous": (norm, (torch.randn(8, 3).t(), torch.randn(16)[::2])),
    "expanded": (norm, (torch.randn(1, 8).expand(3, 8), w)),
    "sparse": (lambda s, y: (s @ y).relu(), (torch.eye(3).to_sparse(), torch.randn(3, 8))),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_inputs(name):
    program, inputs = ODD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(program, *inputs)


def test_meta_tensors():
    out, _ = run(norm, x.to("meta"), w.to("meta"))
    assert out.device.type == "meta"
    assert out.shape == (3, 8)


def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    out, rec = run(lambda n: torch.nn.functional.rms_norm(n, (8,)) * 2, nested)
    torch.testing.assert_close(out.values(), torch.nn.functional.rms_norm(nested.values(), (8,)) * 2)
    assert all("nested" in g.turned_away or "subclass" in g.turned_away for g in rec.graphs)


class Tagged(torch.Tensor):
    pass


def test_tensor_subclass(monkeypatch):
    # aot_eager itself refuses such a subclass, so this one runs op by op.
    monkeypatch.setattr("fxopt.backend.missing_compiler", lambda inputs: "not for this test")
    out, rec = run(lambda t: t.sin() + 1, torch.randn(3).as_subclass(Tagged))
    assert isinstance(out, Tagged)
    assert "subclass" in rec.graphs[0].reason


def test_two_tensor_wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.randn(3, 8), torch.randn(3, 8)
    out, rec = run(lambda t: norm(t, w), TwoTensor(a, b))
    torch.testing.assert_close(out.a, norm(a, w))
    torch.testing.assert_close(out.b, norm(b, w))
    assert "subclass" in rec.graphs[0].turned_away
    assert rec.counts() == {"rms_norm": 2}


def test_in_place_and_aliasing():
    def program(x, y):
        x[0].mul_(2)
        y.copy_(x)
        z = x.view(-1)
        z[3] = 1.0
        return x, norm(y, w)

    mine, theirs = [x.clone(), x * 0], [x.clone(), x * 0]
    out, _ = run(program, *mine)
    torch.testing.assert_close(out, program(*theirs))
    torch.testing.assert_close(mine, theirs)


def test_weights_replaced_after_compiling():
    layer = torch.nn.RMSNorm(8)
    compiled = torch.compile(layer, backend="fxopt")
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.weight.copy_(torch.randn(8)),
            lambda: layer.weight.data.copy_(torch.randn(8)),
            lambda: setattr(layer.weight, "data", torch.randn(8)),
            lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(8))),
        ):
            change()
            torch.testing.assert_close(compiled(x), layer(x))


def test_one_compiled_layer_serves_several_modules():
    forward = torch.compile(torch.nn.RMSNorm.forward, backend="fxopt")
    with torch.no_grad():
        for _ in range(3):
            layer = torch.nn.RMSNorm(8)
            layer.weight.copy_(torch.randn(8))
            torch.testing.assert_close(forward(layer, x), layer(x))


def test_threads_compile_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def one(n):
        a, b = torch.randn(n, 8), torch.randn(8)
        compiled = torch.compile(lambda a, b: norm(a, b) + n, backend="fxopt")
        return torch.allclose(compiled(a, b), norm(a, b) + n, atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(one, range(2, 6)))


def test_a_failure_inside_fxopt_falls_back_to_the_graph_as_it_was(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("fxopt.backend.run_fusions", broken)
    rec = check(norm, x, w)
    assert "a bug of ours" in rec.graphs[0].reason
    assert not rec.graphs[0].normalized


def test_without_a_compiler_it_runs_op_by_op_and_says_so_once(monkeypatch):
    monkeypatch.setattr("fxopt.backend.missing_compiler", lambda inputs: "no compiler for this test")
    with pytest.warns(RuntimeWarning, match="op by op.*no compiler for this test"):
        rec = check(norm, x, w)
    assert rec.counts() == {"rms_norm": 1}
    assert rec.sites[0].implementation == "aten"
    assert rec.graphs[0].lowering.startswith("eager")


def test_what_dynamo_answers_with_a_graph_break_is_no_warning(caplog):
    """The gradient of `values` has a size that depends on data: the graph can't be compiled, whoever made it."""
    values, mask = torch.randn(2, requires_grad=True), torch.tensor([True, False, True])
    with caplog.at_level("WARNING", logger="fxopt"):
        check(lambda x, mask, values: (norm(x, w), x[:, 0].index_put((mask,), values)), x, mask, values)
    assert not [r for r in caplog.records if r.name.startswith("fxopt")]
