"""Sites to verify: a program, captured, and another one put beside it as a fusion would."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.graph.retrace import retrace
from fxopt.match.match import Match
from fxopt.rewrite.fusion import Fusion, Precision
from fxopt.rewrite.verify import Verifier


@dataclass(frozen=True)
class Toy(Fusion):
    hostile: tuple = field(default=(), compare=False)

    def find(self, node, scope):
        return None

    def rewrite(self, match):
        raise NotImplementedError

    def adversaries(self, match):
        return iter(self.hostile)


@dataclass(frozen=True)
class Bitwise(Toy):
    precision = Precision.BITWISE


@dataclass(frozen=True)
class Approximate(Toy):
    precision = Precision.APPROXIMATE


def site(original, replacement, *inputs, keep=()):
    """(match, replacements): `original` traced on fakes of `inputs`, with `replacement`'s nodes beside its own.

    Nodes whose op's name is in `keep` are left out of the match, as a shared prefix is.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # A fake is remembered by its tensor: the same tensor given twice would become one input.
    fakes = [mode.from_tensor(torch.empty_like(t)) if isinstance(t, Tensor) else t for t in inputs]
    with mode:
        module = make_fx(lambda *a: original(*a), pre_dispatch=True)(*fakes)
    for placeholder, given in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        placeholder.meta["example_value"] = given
    return place(module, replacement, keep)


def place(module, replacement, keep=()):
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    # Dynamo orders inputs by first use, and names them after the parameters.
    placeholders.sort(key=lambda n: n.name)
    tensors = [n for n in placeholders if isinstance(n.meta["val"], Tensor)]
    result = module.graph.output_node().args[0]
    outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    region = {n for n in module.graph.nodes if n.op == "call_function"}
    region -= {n for n in region if any(word in n.name for word in keep)}
    bindings = dict(zip("abcdefgh", tensors, strict=False))
    match = Match(outputs, frozenset(region), bindings)
    with match.fake_mode():
        traced = make_fx(lambda *a: replacement(*a), pre_dispatch=True)(*[n.meta["val"] for n in tensors])
    values: dict[Node, Node] = {}
    sources = iter(tensors)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(sources)
        elif node.op == "call_function":
            args = torch.fx.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = match.call(node.target, *args, **kwargs)
    made = traced.graph.output_node().args[0]
    return match, tuple(values[n] for n in (made if isinstance(made, (tuple, list)) else (made,)))


def verify(original, replacement, *inputs, fusion=None, level="numeric", keep=(), **options):
    match, replacements = site(original, replacement, *inputs, keep=keep)
    return Verifier(level, **options).verify(fusion or Toy(), match, replacements)


def verify_compiled(original, replacement, *inputs, dynamic=True, around=None):
    """The verdict, and the guards there were before and after, for a graph captured by torch.compile."""
    found = {}

    def backend(captured, example_inputs):
        mode = TracingContext.get().fake_mode
        module = retrace(captured, example_inputs)
        match, replacements = place(module, replacement)
        environment = mode.shape_env
        found["before"] = len(environment.guards), dict(environment.replacements)
        with around or mode:
            found["verdict"] = Verifier().verify(Toy(), match, replacements)
        found["after"] = len(environment.guards), dict(environment.replacements)
        return captured.forward

    torch._dynamo.reset()
    torch.compile(original, backend=backend, dynamic=dynamic)(*inputs)
    return found["verdict"], found["before"], found["after"]
