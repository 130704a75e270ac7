"""What the tests of masks share: graphs in normal form, and a lifted mask compared with the one that the graph makes.

A program is captured once and then run on other inputs and other sizes; each run's mask is computed from the lifted
program by the evaluator and compared with what the graph itself gave.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.canonical import canonicalise
from fxopt.graph.normalise import normal_forms
from fxopt.graph.scope import Scope
from fxopt.match.masks import MaskProgram, addends, evaluate, read_mask
from fxopt.match.masks.evaluate import evaluate as evaluate_form
from fxopt.match.masks.reader import lifter_of

aten = torch.ops.aten


class Recorder(Interpreter):
    """Runs a graph and keeps what it is asked for: values as they were at an epoch, and what symbols stand for."""

    def __init__(self, module, scope, wanted):
        super().__init__(module)
        self.lifter = lifter_of(scope)
        self.wanted = set(wanted)
        self.elements, self.symbols = {}, {}

    def run_node(self, n):
        self._keep(n)
        result = super().run_node(n)
        value = n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(result, Tensor):
            for size, actual in zip(value.shape, result.shape, strict=True):
                self._bind(size, actual)
        else:
            self._bind(value, result)
        self.env[n] = result
        if (n, self.lifter.epoch(n, n)) in self.wanted and isinstance(result, Tensor):
            self.elements[n, self.lifter.epoch(n, n)] = result.clone()
        return result

    def finish(self):
        self._keep(None)

    def _keep(self, reader):
        for node, epoch in self.wanted - self.elements.keys():
            if node in self.env and self.lifter.epoch(node, reader) == epoch:
                self.elements[node, epoch] = self.env[node].clone()

    def _bind(self, symbolic, actual):
        if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
            self.symbols[str(symbolic.node.expr)] = int(actual)


class Site:
    """A mask of a graph with its program, or the Miss."""

    def __init__(self, node, sizes, at, scope, **how):
        self.node, self.sizes, self.at, self.how = node, sizes, at, how
        self.program = read_mask(node, scope, sizes, at=at, **how)

    @property
    def read(self):
        return isinstance(self.program, MaskProgram)


def compare(program, actual, elements, symbols, shape, *, keep=True, hard=None):
    """The mask `actual` that a graph made, against its program evaluated at the same elements and sizes."""

    def of(value, dtype=torch.bool):
        return evaluate_form(value, program.coordinates, shape, elements, symbols, dtype=dtype)

    dense = actual.expand(shape)
    if dense.dtype == torch.bool:
        live = dense if keep else ~dense
    else:
        live = ~(dense <= (torch.finfo(dense.dtype).min if hard is None else hard))
        bias = torch.zeros_like(dense) if program.bias is None else of(program.bias, dense.dtype)
        torch.testing.assert_close(torch.where(live, bias, 0), torch.where(live, dense, 0), rtol=0, atol=0)
        assert set(dense[~live].tolist()) <= set(program.hard)
    assert torch.equal(of(program.live), live)
    assert torch.equal(of(program.together()), live)
    keys = torch.arange(shape[-1])
    if program.lower is not None:
        assert not (live & (keys < of(program.lower))).any()
    if program.upper is not None:
        assert not (live & (keys > of(program.upper))).any()
    if program.empty_rows == "never":
        assert live.any(-1).all()
    if program.empty_rows in ("uniform", "nan"):
        assert dense.dtype != torch.bool
        assert set(program.hard) == {-math.inf} if program.empty_rows == "nan" else -math.inf not in program.hard


class Checked:
    """A graph with its mask sites; running it compares every site."""

    def __init__(self, module, sites, scope):
        self.module, self.sites, self.scope = module, sites, scope
        self.runs = 0

    def __call__(self, *inputs):
        wanted = {(r.node, r.epoch) for s in self.sites if s.read for r in s.program.leaves}
        lifter = lifter_of(self.scope)
        wanted |= {(s.node, lifter.epoch(s.node, s.node)) for s in self.sites}
        recorder = Recorder(self.module, self.scope, wanted)
        result = recorder.run(*inputs, enable_io_processing=False)
        recorder.finish()
        for site in self.sites:
            if not site.read:
                continue
            actual = recorder.elements[site.node, lifter.epoch(site.node, site.node)]
            known = recorder.symbols
            shape = [
                n
                if isinstance(n, int)
                else int(n.node.expr.xreplace({s: known[str(s)] for s in n.node.expr.free_symbols}))
                for n in site.sizes
            ]
            compare(site.program, actual, recorder.elements, known, shape, **site.how)
        self.runs += 1
        return result


def lift(function, *inputs, dynamic=False, **how):
    """A function that returns a mask, traced and lifted: call the result to compare it on other inputs."""
    with torch.no_grad():
        module = make_fx(function, pre_dispatch=True, tracing_mode="symbolic" if dynamic else "fake")(*inputs)
    canonicalise(module)
    scope = Scope(module.graph)
    mask = module.graph.output_node().args[0]
    shape = mask.meta["val"].shape
    sizes = (1,) * (4 - len(shape)) + tuple(shape)
    checked = Checked(module, [Site(mask, sizes, None, scope, **how)], scope)
    checked(*inputs)
    return checked


def program_of(function, *inputs, **how):
    """The program of such a mask (or the Miss), compared on the inputs that it was traced with."""
    return lift(function, *inputs, **how).sites[0].program


# Models


def sites_of(module):
    """The masks of all attentions in a graph in normal form."""
    scope = Scope(module.graph)
    found = []
    for node in module.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, _, mask = (*node.args, None)[:4]
            sizes = (*q.meta["val"].shape[:3], k.meta["val"].shape[2])
            masks = [] if mask is None else [mask]
        elif node.target is aten.add.Tensor and _is_scores(node.args[0]) != _is_scores(node.args[1]):
            scores, mask = node.args[:2] if _is_scores(node.args[0]) else node.args[1::-1]
            sizes, masks = scores.meta["val"].shape, addends(mask)
        else:
            continue
        found += [Site(mask, sizes, node, scope) for mask in masks]
    return Checked(module, found, scope)


def _is_scores(node):
    """Whether a node holds q kᵀ: [..., rows, keys], from a product through pointwise ops."""
    while isinstance(node, torch.fx.Node) and node.target in (
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.tanh.default,
    ):
        node = node.args[0]
    return isinstance(node, torch.fx.Node) and node.target in (aten.matmul.default, aten.baddbmm.default)


class Capture:
    """A backend that reads the masks of each graph and compares them at every call."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        normal = normal_forms(module, inputs)[0]
        canonicalise(normal)
        checked = sites_of(normal)
        self.graphs.append(checked)
        return checked

    @property
    def sites(self):
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def programs(self):
        return [site.program for site in self.sites]


__all__ = ["Capture", "Checked", "Site", "evaluate", "lift", "program_of", "sites_of"]
