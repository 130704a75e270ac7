"""Fused ops: one definition, several ways to compute it.

An op is stated once, as a plain PyTorch function (its *reference*), and then given faster ways to compute the same
thing:

    @fused_op("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor")
    def rms_norm(x, weight, eps): ...                       # the reference: test oracle, shape rule, fallback

    @rms_norm.fake
    def _(x, weight, eps): ...                              # shapes and dtypes only

    @rms_norm.implementation("triton", opaque=True, when=lambda target, x, *_: needs_cuda(target))
    def _(x, weight, eps): ...

A *transparent* implementation is traced into the compiled graph, where Inductor fuses it with its neighbours; an
*opaque* one stays a single call. Implementations are tried in the order in which they were declared; the first whose
`when` and `pays` give no objection is used, and the reference is the last resort.

`when` says whether an implementation *can* serve, `pays` whether it is believed to be worth it: a measurement of the
tuner (`fxopt.tune`) overrules the second, never the first. An implementation that can be launched in several ways names
those that are worth a measurement in `configs`, and is then called with the one to use, or with None for its own guess:

    @rms_norm.implementation("triton", opaque=True, when=..., configs=lambda x, *_: [{"BLOCK": 1024}, {"BLOCK": 4096}])
    def _(x, weight, eps, *, config=None): ...

The overload is named after a hash of the file that defines the op: AOTAutograd's cache keys on the op's name and would
otherwise return the gradient, shape rule or kernel of an older version of the file after an edit. What else the op is
written in (helpers, templates) must be named in `sources`. An op typed into a notebook has a name of its own each time.
"""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.sources import defining_file, digest

NAMESPACE = "fxopt"

When = Callable[..., "str | None"]

#: one way to launch an implementation: block sizes, warps, splits, ... by name
Config = Mapping[str, int]
Configs = Callable[..., Iterable[Config]]


@dataclass(frozen=True)
class Target:
    """Where and how a fused op will run; what an implementation's `when` decides on.

    Attributes:
        device: where its arguments are
        training: gradients will flow through the op
        compiled: Inductor compiles the rest of the graph; False: it runs op by op
        opaque: kernels that the compiler can't see into may be chosen, where they were measured to pay
        cuda_graphs: launches are replayed from a CUDA graph: what an opaque call costs the host is nothing
    """

    device: torch.device
    training: bool = False
    compiled: bool = True
    opaque: bool = True
    cuda_graphs: bool = False


#: a target whose device is still to be filled in (by `dataclasses.replace`)
ANYWHERE = Target(torch.device("meta"))


@dataclass(frozen=True)
class Implementation:
    """One way to compute a fused op. `when` and `pays` of (target, *args) return an objection in words, or None.

    Attributes:
        name: "sdpa", "triton", "aten", "decomposed", "reference", or any other
        run: computes it, with the op's arguments and results
        opaque: it stays one call, which the compiler doesn't see into
        when: where it can't serve
        overload: of an opaque one: the call that stays in the compiled graph
        version: a hash of what it is written in, where the op's own doesn't cover that
        pays: where it is not believed to be worth it
        configs: of the op's arguments, every size a number: configurations that the tuner may try
    """

    name: str
    run: Callable[..., Any]
    opaque: bool = False
    when: When | None = None
    overload: torch._ops.OpOverload | None = None
    version: str = ""
    pays: When | None = None
    configs: Configs | None = None

    def unfit(self, target: Target, *args: Any) -> str | None:
        """Why this implementation can't serve these arguments there, or None."""
        if self.opaque and not target.opaque:
            return 'with tune="off" only what the compiler sees into is used'
        return self.when(target, *args) if self.when is not None else None

    def objection(self, target: Target, *args: Any) -> str | None:
        """Why this implementation can't serve these arguments there, or isn't believed to pay, or None."""
        found = self.unfit(target, *args)
        return found if found is not None or self.pays is None else self.pays(target, *args)

    def configured(self, config: Config | None) -> Callable[..., Any]:
        """What computes the op's arguments when launched as `config` says; None: as it thinks best."""
        return self.run if not config else functools.partial(self.run, config=config)


@dataclass
class FusedOp:
    """A fused op: reference, fake, implementations. Call it, or ask for one implementation with `run`.

    `fused_op` makes it.

    Attributes:
        name: its name in the namespace `fxopt`
        reference: the op as plain PyTorch: test oracle, fallback, and what is differentiated
        overload: what a graph calls; it is named after a hash of `sources`
        implementations: ways to compute it, in order of preference
        contiguous: results are contiguous whoever computes them
        sources: the files that it is written in
        code: a hash of those of them that say what runs, and how fast: all but this framework's own
        drawn: what `draw` declared
    """

    name: str
    reference: Callable[..., Any]
    overload: torch._ops.OpOverload = None  # type: ignore[assignment]  # set once it is defined
    implementations: list[Implementation] = field(default_factory=list)
    contiguous: bool = False
    sources: tuple[Path, ...] = ()
    code: str = ""
    drawn: Callable[..., tuple[Any, ...]] | None = None
    _library: Any = None
    _signature: str = ""  # the schema from its first parenthesis on
    _defaults: tuple[Any, ...] = ()  # of all parameters, in order
    _fake: Callable[..., Any] | None = None
    _gradient: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op through the dispatcher (one node in a traced graph)."""
        return self.overload(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """All arguments of a call, in order, defaults filled in."""
        signature = _signature_of(self.reference)
        if "config" not in signature.parameters:
            kwargs.pop("config", None)  # how an implementation is launched is not the op's
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def implementation(
        self,
        name: str,
        *,
        opaque: bool = False,
        when: When | None = None,
        pays: When | None = None,
        configs: Configs | None = None,
        sources: Sequence[Path | str] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declare a way to compute the op. Order of declaration is order of preference.

        `when(target, *args)` objects where it can't serve, `pays(target, *args)` where it is not believed to be worth
        it. `configs(*args)` gives the configurations that the tuner may try besides the implementation's own guess; it
        then takes one of them as the keyword `config`. Raises ValueError where it has `configs` but no such keyword.

        It may be in another file than the op; `sources` are further files that it is written in.
        """

        def declare(run: Callable[..., Any]) -> Callable[..., Any]:
            if configs is not None and "config" not in inspect.signature(run).parameters:
                raise ValueError(f"{self.name} ({name}) declares configs= but takes no keyword config")
            version = self._version(run, sources)
            overload = None
            if opaque:
                parts = (self.overload._overloadname, *([version] if version else []), name)
                overload = self._define("_".join(parts), run, configurable=configs is not None)
            self.implementations.append(Implementation(name, run, opaque, when, overload, version, pays, configs))
            return run

        return declare

    def fake(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the shape rule: takes fake tensors, returns empty ones of the result's shape, dtype and strides.

        Raises ValueError where it is in a file that the op's name doesn't cover: an edit of it would go unseen.
        """
        if self._version(fn, ()):
            where = (
                f"{home}: name it in the op's sources=" if (home := defining_file(fn)) else "no file, but the op in one"
            )
            raise ValueError(f"the fake of {self.name} is defined in {where}")
        self._fake = fn
        for overload in (self.overload, *(i.overload for i in self.implementations)):
            if overload is not None:
                self._register_fake(overload)
        return fn

    def draw(self, fn: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """Declare how the tuner draws arguments: takes meta tensors and numbers, returns real ones of their kind.

        Needed where normal numbers and integers that are all 0 won't do (packed weights, tables of indices).
        """
        self.drawn = fn
        return fn

    def gradient(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Declare the gradient, in place of the reference's, which is recomputed from the arguments.

        `fn(args, results, grads, wanted)` returns one gradient for each argument, None where it is not `wanted` (a bool
        an argument); `results` and `grads` are tuples, a gradient that didn't come is None. Where second derivatives
        are asked for (create_graph=True) the reference is differentiated. Raises ValueError where `fn` is in a file
        that the op's name doesn't cover.
        """
        if self._version(fn, ()):
            raise ValueError(f"the gradient of {self.name} is in {defining_file(fn)}: name it in the op's sources=")
        self._gradient = fn
        return fn

    def select(self, target: Target, *args: Any) -> tuple[Implementation, list[tuple[str, str]]]:
        """The implementation to use there, and (name, objection) of those passed over."""
        passed_over: list[tuple[str, str]] = []
        for candidate in self.implementations:
            objection = candidate.objection(target, *args)
            if objection is None:
                return candidate, passed_over
            passed_over.append((candidate.name, objection))
        return Implementation("reference", self.reference), passed_over

    def run(self, implementation: str, *args: Any, config: Config | None = None, **kwargs: Any) -> Any:
        """Run one named implementation directly, whatever its `when` says (tests and benchmarks)."""
        if implementation == "reference":
            return self.reference(*args, **kwargs)
        for candidate in self.implementations:
            if candidate.name == implementation:
                return candidate.configured(config)(*self.bind(*args, **kwargs))
        known = ", ".join([i.name for i in self.implementations] + ["reference"])
        raise ValueError(f"{self.name} has no implementation {implementation!r}; it has {known}")

    def _version(self, run: Callable[..., Any], sources: Sequence[Path | str]) -> str:
        """A hash of the files that `run` is written in; "" if the op's own name says it all."""
        if inspect.isbuiltin(run):
            return ""  # torch's own, whose version every cache looks at
        home = defining_file(run)
        if home is None:
            return uuid.uuid4().hex[:12] if self.sources else ""
        files = _existing(home, *sources)
        return "" if set(files) <= set(self.sources) else digest(files)

    def _define(
        self, overload_name: str, run: Callable[..., Any], *, configurable: bool = False
    ) -> torch._ops.OpOverload:
        """An overload of the op that runs `run`, with no choice left to make when it is called.

        A configurable one has a keyword more than the op: the configuration, as `spelled`.
        """

        def call(*args: Any, config: str = "") -> Any:
            given = {"config": parsed(config)} if config else {}
            return run(*self._filled(args), **given)

        known = getattr(getattr(torch.ops, NAMESPACE), self.name, None)
        name, signature = f"{self.name}.{overload_name}", self._signature
        if configurable:
            taken, returned = signature.rsplit(") ->", 1)
            signature = f'{taken}, *, str config="") ->{returned}'
        if known is None or overload_name not in known.overloads():
            self._library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        self._library.impl(name, call, "CompositeExplicitAutograd", allow_override=True)
        overload = getattr(getattr(getattr(torch.ops, NAMESPACE), self.name), overload_name)
        torch.library.register_autograd(
            _qualified(overload), self._backward, setup_context=self._save, lib=self._library
        )
        self._register_fake(overload)
        _OPS[overload] = self
        return overload

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments: the dispatcher drops trailing ones that are the defaults."""
        return (*args, *self._defaults[len(args) :])

    def _register_fake(self, overload: torch._ops.OpOverload) -> None:
        fake = self._fake
        if fake is None:
            return

        def call(*args: Any, config: str = "") -> Any:
            return fake(*self._filled(args))

        torch.library.register_fake(_qualified(overload), call, lib=self._library, allow_override=True)

    def _execute(self, *args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        chosen, _ = self.select(Target(device=device, compiled=False), *args)
        result = chosen.run(*args)
        if not self.contiguous:
            return result
        return tuple(r.contiguous() for r in result) if isinstance(result, (tuple, list)) else result.contiguous()

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
        """Keep the arguments for the backward, and the results where the gradient is declared."""
        results = () if self._gradient is None else tuple(output) if isinstance(output, (tuple, list)) else (output,)
        values = (*inputs, *results)
        where = [i for i, a in enumerate(values) if isinstance(a, Tensor)]
        rest = [None if isinstance(a, Tensor) else a for a in values]

        def restore(saved: Sequence[Tensor]) -> tuple[list[Any], tuple[Any, ...]]:
            found = list(rest)
            for i, tensor in zip(where, saved, strict=True):
                found[i] = tensor
            return found[: len(inputs)], tuple(found[len(inputs) :])

        ctx.save_for_backward(*(values[i] for i in where))
        ctx.fxopt_args = restore

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        """Gradients of the reference, recomputed from the saved inputs; differentiable where they are asked to be."""
        again = torch.is_grad_enabled()  # create_graph=True
        args, results = ctx.fxopt_args(ctx.saved_tensors)
        if self._gradient is not None and not again:
            return tuple(self._gradient(args, results, grads, tuple(ctx.needs_input_grad[: len(args)])))
        wanted = [
            i for i, a in enumerate(args) if isinstance(a, Tensor) and ctx.needs_input_grad[i] and a.is_floating_point()
        ]
        with torch.enable_grad():
            fresh = list(args)
            for i in wanted:
                # An alias: what one argument owes to another is not the op's to differentiate.
                fresh[i] = args[i].view_as(args[i]) if again else args[i].detach().requires_grad_()
            out = self.reference(*fresh)
            outs = out if isinstance(out, (tuple, list)) else (out,)
            pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [fresh[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=again,
            )
        result: list[Tensor | None] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)


_OPS: dict[torch._ops.OpOverload, FusedOp] = {}


def fused_op(
    schema: str, *, sources: Sequence[Path | str] = (), contiguous: bool = False
) -> Callable[[Callable[..., Any]], FusedOp]:
    """Define the op `schema` ("name(arguments) -> results"); the decorated function is its reference.

    `sources` are further files whose edits must make cached code stale (templates, shared kernels). `contiguous` says
    that all results are contiguous, as the fake states, although transparent implementations may return any strides.
    Raises ValueError where the schema's arguments and the reference's parameters differ in name or order, and where one
    of `sources` is not a file.
    """

    def define(reference: Callable[..., Any]) -> FusedOp:
        name, rest = schema.split("(", 1)
        schema_ = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
        if [a.name for a in schema_.arguments] != list(inspect.signature(reference).parameters):
            raise ValueError(f"the parameters of {reference.__qualname__} are not those of the schema {schema!r}")
        home = defining_file(reference)
        # Without a file nobody can tell one version from another: each definition is one of its own.
        files = _existing(home, __file__, *sources) if home is not None else ()
        version = digest(files) if files else uuid.uuid4().hex[:12]
        code = digest(file for file in files if file != Path(__file__).resolve()) if files else version
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        op = FusedOp(
            name, reference, contiguous=contiguous, sources=files, code=code, _library=library, _signature=f"({rest}",
            _defaults=tuple(p.default for p in inspect.signature(reference).parameters.values()),
        )  # fmt: skip
        op.overload = op._define(f"v{version}", op._execute)
        op.__doc__ = reference.__doc__
        return op

    return define


def spelled(config: Config) -> str:
    """A configuration as text: "BLOCK_K=512 BLOCK_N=8"."""
    return " ".join(f"{name}={int(config[name])}" for name in sorted(config))


def parsed(text: str) -> dict[str, int]:
    """The configuration that `spelled` wrote. Raises ValueError for another text."""
    return {name: int(value) for name, _, value in (word.partition("=") for word in text.split())}


def versions() -> list[str]:
    """The ops and implementations that are defined, each with the version of what it is written in."""
    return sorted(
        {str(overload) for overload in _OPS}
        | {f"{op.overload} {i.name} {i.version}" for op in _OPS.values() for i in op.implementations}
    )


_signature_of = functools.lru_cache(maxsize=256)(inspect.signature)


def find_op(target: Any) -> FusedOp | None:
    """The fused op behind a graph node's target, or None."""
    return _OPS.get(target)


def op_named(name: str) -> FusedOp | None:
    """The fused op of that name, defined last under it; None where there is none."""
    return next((op for op in reversed(_OPS.values()) if op.name == name), None)


def _qualified(overload: torch._ops.OpOverload) -> str:
    return f"{overload.namespace}::{overload._schema.name.split('::')[1]}.{overload._overloadname}"


def _existing(*sources: Path | str) -> tuple[Path, ...]:
    for source in sources:
        if not Path(source).is_file():
            raise ValueError(f"sources= names {str(source)!r}, which is not a file (give a full path)")
    return tuple(Path(source).resolve() for source in sources)
