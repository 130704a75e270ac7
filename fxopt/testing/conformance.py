"""What every fusion must do, checked on its own examples.

    described   it has a name, a first line that says before -> after, and an example that it must find
    examples    each is found as often as it says, or refused for the reason that it says
    float32, bfloat16, float16   it computes what eager mode does: at most twice as far from float64, plus rounding
    dynamic     with symbolic batch and length it finds the same or says why not, and computes the same
    training    gradients are those of eager mode
    embedded    it finds the example in a bigger program, which has it twice
    verified    the verifier has compared the numbers of each application, and found them equal

A raising rule (stage "raise") is undone where nothing fuses its result, so it counts as found when it was applied.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.rewrite.evaluate import Promote, promote
from fxopt.rewrite.fusion import Example, Fusion, Precision
from fxopt.testing.running import run, without_inductor
from fxopt.view.report import Report

#: units in the last place (of the largest value) that a whole program may be off besides twice eager's own error
ULPS = 4


def check(fusion: Fusion, what: str) -> None:
    """Run one of CHECKS on every example. Raises AssertionError, naming the example, where it fails."""
    CHECKS[what](fusion)


def conformance(fusion: Fusion, *, skip: dict[str, str] | None = None) -> Callable[[str], None]:
    """A test function for pytest, parametrised by the names of CHECKS.

    `skip` maps the names of those that don't apply to the reason, which pytest then shows.
    """
    import pytest

    unknown = set(skip or {}) - set(CHECKS)
    if unknown:
        raise ValueError(f"skip= names no check: {sorted(unknown)} (there are {', '.join(CHECKS)})")

    @pytest.mark.parametrize("what", CHECKS)
    def test(what: str) -> None:
        if skip and what in skip:
            pytest.skip(skip[what])
        with without_inductor():
            check(fusion, what)

    test.__doc__ = f"The conformance of {fusion.name}: {what_it_does(fusion)}"
    return test


def what_it_does(fusion: Fusion) -> str:
    """The first line of the fusion's docstring."""
    return (inspect.getdoc(type(fusion)) or "").strip().split("\n")[0]


def _described(fusion: Fusion) -> None:
    assert fusion.name, "it has no name"
    assert hash(fusion) == hash(fusion), "it can't be hashed: make it a frozen dataclass"
    line = what_it_does(fusion)
    if line.startswith(f"{type(fusion).__name__}("):
        line = ""  # made up by @dataclass, where there is none
    assert line, "it has no docstring: its first line tells users what is rewritten, as before -> after"
    examples = list(fusion.examples())
    assert any(example.refused is None for example in examples), "examples() has none that must be found"


def _examples(fusion: Fusion) -> None:
    for label, example in _labelled(fusion):
        with torch.no_grad():
            _, report = run(fusion, _program(example), example.inputs())
        found, wanted = _found(fusion, report), 0 if example.refused is not None else example.sites
        assert found == wanted, f"{label}: {found} sites, not {wanted}: {_reasons(fusion, report)}"
        if example.refused is not None:
            told = _reasons(fusion, report)
            assert any(example.refused in reason for reason in told), f"{label}: not refused so: {told}"


def _numbers(dtype: torch.dtype) -> Callable[[Fusion], None]:
    def compare(fusion: Fusion) -> None:
        for label, example in _labelled(fusion):
            torch.manual_seed(0)
            program, inputs = _program(example, dtype), _cast(example.inputs(), dtype)
            try:
                with torch.no_grad():
                    eager = program(*_copies(inputs))
            except RuntimeError:
                continue  # the example is not for this dtype
            with torch.no_grad():
                with Promote():
                    exact = _program(example, torch.float64)(*tree_map(promote, _copies(inputs)))
                actual, _ = run(fusion, program, _copies(inputs))
            if fusion.precision is not Precision.APPROXIMATE:
                _as_good_as(actual, eager, exact, f"{label} in {dtype}")

    return compare


def _dynamic(fusion: Fusion) -> None:
    for label, example in _labelled(fusion):
        inputs = example.inputs()
        with torch.no_grad():
            _, static = run(fusion, _program(example), _copies(inputs))
            actual, report = run(fusion, _program(example), _symbolic(_copies(inputs)))
            expected = _program(example)(*_copies(inputs))
        found, wanted, reasons = _found(fusion, report), _found(fusion, static), _reasons(fusion, report)
        assert found == wanted or reasons, f"{label}: {found} sites with symbolic sizes, not {wanted}, and no reason"
        _close(actual, expected, fusion, label)


def _symbolic(inputs: Any) -> Any:
    """The inputs with batch and length symbolic: all but the last dimension of the first, and of those shaped like it.

    Sizes that the program itself ties to a number stay what they are.
    """
    shapes = [x.shape[:-1] for x in inputs if _floating(x) and x.dim() > 1]
    for x in inputs:
        if _floating(x) and x.dim() > 1 and x.shape[:-1] == shapes[0]:
            for dim in range(x.dim() - 1):
                torch._dynamo.maybe_mark_dynamic(x, dim)
    return inputs


def _training(fusion: Fusion) -> None:
    for label, example in _labelled(fusion):
        inputs = example.inputs()
        eager = _gradients(_program(example), inputs)
        if eager is None:
            continue
        with Promote():
            exact = _gradients(_program(example, torch.float64), tree_map(promote, tuple(inputs)))
        actual = _gradients(lambda *fresh, e=example: run(fusion, _program(e), fresh)[0], inputs)
        if fusion.precision is not Precision.APPROXIMATE:
            _as_good_as(actual, eager, exact, f"{label}, gradients")


def _gradients(program: Callable[..., Any], inputs: Any) -> list[Any] | None:
    """Gradients of a random projection of all results, one an input; None where nothing can be differentiated."""
    fresh = [x.detach().clone().requires_grad_() if _floating(x) else x for x in inputs]
    leaves = [leaf for leaf in tree_leaves(program(*fresh)) if _differentiable(leaf)]
    if not leaves:
        return None
    generator = torch.Generator().manual_seed(0)
    torch.autograd.backward(leaves, [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves])
    return [x.grad if x.grad is not None else torch.zeros_like(x) for x in fresh if _floating(x)]


def _embedded(fusion: Fusion) -> None:
    for label, example in _labelled(fusion):
        if example.refused is not None:
            continue
        program, inputs = _program(example), example.inputs()

        def bigger(*values: Any, program: Callable[..., Any] = program) -> Any:
            first = tree_map(lambda v: v.relu() if _floating(v) else v, program(*values))
            return first, program(*values)

        with torch.no_grad():
            actual, report = run(fusion, bigger, _copies(inputs))
            expected = bigger(*_copies(inputs))
        found = _found(fusion, report)
        # Twice as often, or as often: some fusions take two places that share their inputs in one.
        assert found >= example.sites, f"{label}, twice: {found} sites: {_reasons(fusion, report)}"
        _close(actual, expected, fusion, label)


def _verified(fusion: Fusion) -> None:
    wanted = ("equal", "meta") if fusion.precision is Precision.APPROXIMATE else ("equal",)
    for label, example in _labelled(fusion):
        with torch.no_grad():
            _, report = run(fusion, _program(example), example.inputs(), verify="strict")
        for step in report.steps:
            if step.fusion == fusion.name:
                # What a raising rule made may be undone since: the verdict then says so, and what it said before.
                assert step.verdict.status in wanted, f"{label}: {step.verdict.status}: {step.verdict.detail}"


CHECKS: dict[str, Callable[[Fusion], None]] = {
    "described": _described,
    "examples": _examples,
    "float32": _numbers(torch.float32),
    "bfloat16": _numbers(torch.bfloat16),
    "float16": _numbers(torch.float16),
    "dynamic": _dynamic,
    "training": _training,
    "embedded": _embedded,
    "verified": _verified,
}


def _labelled(fusion: Fusion) -> Iterator[tuple[str, Example]]:
    for i, example in enumerate(fusion.examples()):
        torch.manual_seed(0)
        yield f"example {example.name or i}", example


def _program(example: Example, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    if not isinstance(example.program, torch.nn.Module):
        program: Callable[..., Any] = example.program
        return program
    module = copy.deepcopy(example.program)
    return module.to(dtype) if dtype is not None else module


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if _floating(v) else v, tuple(inputs))


def _copies(inputs: Any) -> Any:
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tuple(inputs))


def _found(fusion: Fusion, report: Report) -> int:
    """How often it was applied; of a raising rule, also where nothing then fused the result."""
    steps = [step for step in report.steps if step.fusion == fusion.name]
    return sum(step.applied or (fusion.stage == "raise" and step.verdict.status != "failed") for step in steps)


def _reasons(fusion: Fusion, report: Report) -> list[str]:
    graphs = [f"passed through: {graph.reason}" for graph in report.graphs if not graph.normalized]
    undone = [f"undone: {s.verdict.detail}" for s in report.steps if s.fusion == fusion.name and not s.applied]
    return [*(miss.reason for miss in report.misses if miss.fusion == fusion.name), *undone, *graphs]


def _as_good_as(actual: Any, eager: Any, exact: Any, label: str) -> None:
    for a, e, x in zip(tree_leaves(actual), tree_leaves(eager), tree_leaves(exact), strict=True):
        if not _floating(e):
            assert not isinstance(e, Tensor) or torch.equal(a, e), f"{label}: other integers"
            continue
        assert a.dtype == e.dtype, f"{label}: {a.dtype}, not {e.dtype}"
        assert a.shape == e.shape, f"{label}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
        finite = x.isfinite() & e.isfinite()
        assert torch.equal(a.isfinite() & finite, finite), f"{label}: infinite or NaN where eager mode is finite"
        if finite.any():
            truth = x[finite].double()
            own = (e[finite].double() - truth).abs().max().item()
            error = (a[finite].double() - truth).abs().max().item()
            allowed = 2 * own + ULPS * torch.finfo(e.dtype).eps * truth.abs().max().item()
            assert error <= allowed, f"{label}: error {error:.3g} against float64, {allowed:.3g} is allowed"


def _close(actual: Any, expected: Any, fusion: Fusion, label: str) -> None:
    if fusion.precision is Precision.APPROXIMATE:
        return

    def labelled(message: str) -> str:
        return f"{label}: {message}"

    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(e, Tensor):
            rtol, atol = (10 * t for t in torch.testing._comparison.default_tolerances(e))
            scale = max(1.0, e.abs().max().item()) if _floating(e) and e.numel() else 1.0
            torch.testing.assert_close(a, e, rtol=rtol, atol=atol * scale, equal_nan=True, msg=labelled)
