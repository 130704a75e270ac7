"""Every op that torch's own tests know, through torch.compile(f, backend="fxopt"), forward and backward.

    python tests/opinfo/sweep.py run --dtype float32 --samples 5 --shard 1/4 --out float32.jsonl
    python tests/opinfo/sweep.py run --ops add,nn.functional.layer_norm --out one.jsonl
    python tests/opinfo/sweep.py summary float32.jsonl bfloat16.jsonl

The graph that runs is the one that retrace and canonicalisation made, even where nothing fused, and it is lowered
without code generation: what is tested is fxopt, not Inductor. A result that differs from eager, or an error, is
fxopt's own failure only where backend="aot_eager" gets the same sample right. A warning from fxopt counts as its own
failure too: something inside it failed, although the model still ran.

Each op runs in a process of its own with a time limit, and becomes one line of JSON; ops that are in the output already
are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db

import fxopt
from fxopt.graph import query
from fxopt.rewrite.plugins import fusions

sys.path.append(str(Path(__file__).parents[1] / "shared"))  # pytest has it there; a program of its own has not
import running

#: ops whose values are whatever the memory held before: only dtype, shape and strides are compared
UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}

VARIANTS = ("function", "in-place")


def key(op: Any) -> str:
    """The name of an entry, unique in op_db."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def plainly(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of wrapper_set_seed, which Dynamo can't trace; the seed is set around the whole run."""
    return op(*args, **kwargs)


common_methods_invocations.wrapper_set_seed = plainly


def traceable(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` as Dynamo traces it, which skips what lives in torch's own test code."""
    if not isinstance(call, types.FunctionType) or f"{os.sep}testing{os.sep}" not in call.__code__.co_filename:
        return call
    code = call.__code__.replace(co_filename=__file__)
    made = types.FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


def program(op: Any, variant: str) -> Callable[..., Any] | None:
    """The entry as a function of its sample; None where it has no such variant."""
    if variant == "function":
        call = traceable(op.get_op())
        return lambda input, args, kwargs: call(input, *args, **kwargs)
    change = op.get_inplace()
    if change is None:
        return None
    # On a copy, since a leaf that needs gradients can't be written to; the sum sees that the write is ordered.
    return lambda input, args, kwargs: (lambda x: (change(x, *args, **kwargs), x))(input.clone())


def takes_part() -> set[str]:
    """The names of ops that fusions begin at, or that canonicalisation and matching treat as views, casts or copies."""
    targets = {*query.RESHAPES, *query.PERMUTES, *query.CASTS, *query.COPIES}
    targets |= {anchor for fusion in fusions().values() for anchor in fusion.anchors}
    return {str(target).removeprefix("aten.").split(".")[0] for target in targets}


def samples(op: Any, variant: str, dtype: torch.dtype, count: int) -> list[Any]:
    """At most `count` of the entry's samples: the first, the last, and evenly between them."""
    torch.manual_seed(0)
    random.seed(0)
    differentiable = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    found = list(op.sample_inputs("cpu", dtype, requires_grad=differentiable))
    if variant == "in-place":
        found = [s for s in found if isinstance(s.input, Tensor) and not s.broadcasts_input]
    if len(found) <= count:
        return found
    picks = sorted({round(i * (len(found) - 1) / max(count - 1, 1)) for i in range(count)})
    return [found[i] for i in picks]


def run_once(call: Callable[..., Any], sample: Any, backward: bool) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """(outputs, gradients, inputs afterwards, which input each output lives in) of one run on a copy of the sample."""
    given = running.copy_of((sample.input, sample.args, sample.kwargs))
    torch.manual_seed(1)
    random.seed(1)
    outputs = call(*given)
    found = running.tensors(outputs)
    grads = running.gradients(found, given) if backward else []
    inputs = running.tensors(given)
    return outputs, grads, inputs, running.homes(found, inputs)


def differences(expected: Any, actual: Any, values: bool, exact: Any = None) -> list[str]:
    """How two runs differ, in words. Numbers may differ where they are as near to those of the run `exact`."""
    before, after = running.tensors(expected[0]), running.tensors(actual[0])
    if len(before) != len(after):
        return [f"{len(after)} outputs, not {len(before)}"]
    found = []
    pairs = [("output", a, b) for a, b in zip(before, after, strict=True)]
    pairs += [("gradient", a, b) for a, b in zip(expected[1], actual[1], strict=True)]
    pairs += [("input", a, b) for a, b in zip(expected[2], actual[2], strict=True)]
    right = [*running.tensors(exact[0]), *exact[1], *exact[2]] if exact is not None else [None] * len(pairs)
    for i, ((what, a, b), c) in enumerate(zip(pairs, right, strict=True)):
        if a is None or b is None:
            if a is not b:
                found.append(f"{what} {i} is missing in one of them")
            continue
        if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
            found.append(f"{what} {i}: {b.dtype} {tuple(b.shape)}, not {a.dtype} {tuple(a.shape)}")
        elif what == "output" and running.layout(a) != running.layout(b):
            found.append(f"{what} {i}: strides {b.stride()}, not {a.stride()}")
        elif what == "output" and a.requires_grad != b.requires_grad:
            found.append(f"{what} {i}: requires_grad is {b.requires_grad}, not {a.requires_grad}")
        elif values:
            try:
                torch.testing.assert_close(b.detach(), a.detach(), equal_nan=True, check_stride=False)
            except AssertionError as error:
                if c is None or not as_near(a, b, c):
                    found.append(f"{what} {i}: {' '.join(str(error).split())[:200]}")
    if expected[3] != actual[3]:
        found.append(f"the outputs live in the inputs {actual[3]}, not {expected[3]}")
    return found


def as_near(eager: Tensor, found: Tensor, exact: Tensor) -> bool:
    """Whether the largest error of `found` is at most twice eager's and two ulps of the largest number."""
    one, other, right = (t.detach().double() for t in (eager, found, exact))
    if one.shape != right.shape or not all(t.isfinite().all() for t in (one, other, right)):
        return False
    ulp = torch.finfo(eager.dtype).eps * right.abs().max()
    return bool((other - right).abs().max() <= 2 * (one - right).abs().max() + 2 * ulp)


def in_float64(call: Callable[..., Any], sample: Any, backward: bool) -> Any:
    """The run in float64 of a sample whose numbers are narrower than float32; None where there is none."""

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype not in (torch.bfloat16, torch.float16):
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    tensors = running.tensors((sample.input, sample.args, sample.kwargs))
    if not any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors):
        return None
    try:
        return run_once(call, sample.transform(widened), backward)
    except Exception:  # the op takes no float64 where it takes a narrow dtype: there is nothing to compare with
        return None


def attempt(
    call: Callable[..., Any], sample: Any, expected: Any, backend: Any, backward: bool, values: bool, exact: Any = None
) -> list[str]:
    """What goes wrong with the sample under one backend, in words; empty where nothing does."""
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend)
    try:
        return differences(expected, run_once(compiled, sample, backward), values, exact)
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def check(op: Any, variant: str, dtype: torch.dtype, count: int, backward: bool) -> dict[str, Any]:
    """All samples of one entry: how many were right, failed like aot_eager, failed in fxopt only, can't run at all."""
    call = program(op, variant)
    tally: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    values = op.name not in UNINITIALISED
    chosen = samples(op, variant, dtype, count) if call is not None else []
    for i, sample in enumerate(chosen):
        try:
            expected = run_once(call, sample, backward)
        except Exception as error:  # a sample that is meant to raise, or in-place on a result that does not fit
            tally["eager raises"] += 1
            reasons[f"eager: {type(error).__name__}"] += 1
            continue
        with running.listening() as messages, fxopt.record() as record:
            wrong = attempt(call, sample, expected, "fxopt", backward, values)
        wrong += [f"warning: {m[:300]}" for m in messages]
        tally["graphs"] += len(record.graphs)
        tally["normalised"] += sum(graph.normalized for graph in record.graphs)
        tally["fused"] += len(record.sites)
        reasons.update(graph.reason for graph in record.graphs if graph.reason)
        if not wrong:
            tally["ok"] += 1
        elif theirs := _aot_eager_too(call, sample, expected, backward, values, messages):
            tally["like aot_eager"] += 1
            reasons[f"aot_eager: {theirs[0][:100]}"] += 1
        elif not messages and _as_good(call, sample, expected, backward, values):
            tally["ok"] += 1
            reasons["other numbers than eager's, as near to float64's"] += 1
        else:
            tally["own"] += 1
            failures.append(f"sample {i}: {'; '.join(wrong)}")
    return {"tally": dict(tally), "reasons": dict(reasons), "failures": failures}


def _as_good(call: Callable[..., Any], sample: Any, expected: Any, backward: bool, values: bool) -> bool:
    """Whether all that fxopt does otherwise is rounding, measured against float64."""
    exact = in_float64(call, sample, backward)
    return exact is not None and not attempt(call, sample, expected, "fxopt", backward, values, exact)


def _aot_eager_too(
    call: Callable[..., Any], sample: Any, expected: Any, backward: bool, values: bool, messages: list[str]
) -> list[str]:
    """What goes wrong under aot_eager, if it excuses fxopt.

    A warning is excused only where AOTAutograd fails on Dynamo's own graph: that fxopt's failed is nothing new then.
    """
    theirs = attempt(call, sample, expected, "aot_eager", backward, values)
    expected_to = all(m.startswith("fxopt compiles ") for m in messages)
    return theirs if not messages or (expected_to and any("BackendCompilerFailed" in t for t in theirs)) else []


def check_apart(op: Any, variant: str, dtype: torch.dtype, count: int, backward: bool, limit: float) -> dict[str, Any]:
    """`check` in a process of its own; where that dies, aot_eager in one too, to see whose fault it is."""
    began = time.perf_counter()
    result = running.in_a_fork(lambda: check(op, variant, dtype, count, backward), limit)
    if "died" in result:
        alone = running.in_a_fork(lambda: _aot_only(op, variant, dtype, count, backward), limit)
        kind = "like aot_eager" if "died" in alone else "own"
        result = {"tally": {kind: 1}, "reasons": {}, "failures": [f"the process died: {result['died']}"]}
    seconds = round(time.perf_counter() - began, 2)
    return {"op": key(op), "variant": variant, "dtype": str(dtype).removeprefix("torch."), **result, "seconds": seconds}


def _aot_only(op: Any, variant: str, dtype: torch.dtype, count: int, backward: bool) -> dict[str, Any]:
    call = program(op, variant)
    for sample in samples(op, variant, dtype, count) if call is not None else []:
        run_once(call, sample, backward)
        attempt(call, sample, run_once(call, sample, backward), "aot_eager", backward, False)
    return {}


def entries(dtype: torch.dtype, shard: tuple[int, int], names: set[str] | None) -> Iterator[tuple[Any, str]]:
    """The entries of this shard that support `dtype` on the CPU, with each variant that they have."""
    number, of = shard
    for i, op in enumerate(op_db):
        if i % of != number - 1 or (names is not None and not {op.name, key(op)} & names):
            continue
        if dtype in op.supported_dtypes("cpu"):
            yield op, "function"
            if op.get_inplace() is not None:
                yield op, "in-place"


def run(options: argparse.Namespace) -> int:
    """Sweep, one line of JSON for each op and variant; the number of fxopt's own failures."""
    done, own = set(), 0
    if options.out.exists():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        done = {(line["op"], line["variant"], line["dtype"]) for line in lines}
    dtype = getattr(torch, options.dtype)
    names = set(options.ops.split(",")) if options.ops else None
    with running.rewritten_always(), running.lowered_by(aot_eager), options.out.open("a") as out:
        torch.compile(lambda x: x + 1, backend="fxopt")(torch.ones(2))  # what is imported once is in every fork
        closer = takes_part()
        for op, variant in entries(dtype, options.shard, names):
            if (key(op), variant, options.dtype) in done:
                continue
            shallow = options.quick and not {op.name, op.aten_name, op.name.split(".")[-1]} & closer
            count = 1 if shallow else options.samples
            line = check_apart(op, variant, dtype, count, not (shallow or options.forward), options.limit)
            line["torch"] = torch.__version__
            out.write(json.dumps(line) + "\n")
            out.flush()
            own += line["tally"].get("own", 0)
            for failure in line["failures"]:
                print(f"{line['op']} ({variant}, {options.dtype}): {failure}", flush=True)
    return own


def summary(paths: list[Path]) -> str:
    """The results of several runs as markdown: totals, failures, why graphs passed through, and every op."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    columns = ("ok", "like aot_eager", "own", "eager raises")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["dtype"], line["variant"]), []).append(line)
    text = [
        "| dtype | variant | ops | samples ok | fail like aot_eager | fxopt's own failures | eager raises | graphs |"
        " normalised |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (dtype, variant), rows in sorted(groups.items()):
        total = sum((Counter(row["tally"]) for row in rows), Counter())
        cells = [len(rows), *(total[c] for c in columns), total["graphs"], total["normalised"]]
        text.append(f"| {dtype} | {variant} | " + " | ".join(map(str, cells)) + " |")
    failures = [(line, failure) for line in lines for failure in line["failures"]]
    if failures:
        text += ["", "Failures:", ""]
        text += [f"- `{line['op']}` ({line['variant']}, {line['dtype']}): {failure}" for line, failure in failures]
    reasons = sum((Counter({_general(r): n for r, n in line["reasons"].items()}) for line in lines), Counter())
    if reasons:
        text += ["", "| why a graph was not normalised, or a sample not run | times |", "|---|--:|"]
        text += [f"| {reason} | {times} |" for reason, times in reasons.most_common()]
    kinds = sorted({(line["dtype"], line["variant"]) for line in lines})
    text += ["", "| op | " + " | ".join(f"{d}, {v}" for d, v in kinds) + " |", "|---|" + "---|" * len(kinds)]
    by_op: dict[str, dict[Any, str]] = {}
    for line in lines:
        by_op.setdefault(line["op"], {})[line["dtype"], line["variant"]] = _cell(line["tally"])
    text += [f"| {op} | " + " | ".join(cells.get(k, "") for k in kinds) + " |" for op, cells in sorted(by_op.items())]
    return "\n".join(text)


def _general(reason: str) -> str:
    return reason.split(" (at ")[0].split("\n")[0][:120].replace("|", "/")


def _cell(tally: dict[str, int]) -> str:
    parts = [f"{tally['ok']} ok"] if tally.get("ok") else []
    parts += [f"{tally['like aot_eager']} like aot_eager"] if tally.get("like aot_eager") else []
    parts += [f"**{tally['own']} own**"] if tally.get("own") else []
    return ", ".join(parts) or "no sample"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("run", help="run ops, one line of JSON each")
    sweep.add_argument("--shard", type=lambda s: tuple(map(int, s.split("/"))), default=(1, 1), help="i/n, from 1/n")
    sweep.add_argument("--dtype", default="float32")
    sweep.add_argument("--samples", type=int, default=5, help="at most so many of an op's samples")
    sweep.add_argument("--ops", help="only these, comma-separated")
    sweep.add_argument("--forward", action="store_true", help="no gradients")
    sweep.add_argument(
        "--quick", action="store_true", help="one sample without gradients, but for ops that fxopt itself knows"
    )
    sweep.add_argument("--limit", type=float, default=120, help="seconds for one op")
    sweep.add_argument("--out", type=Path, required=True)
    tell = commands.add_parser("summary", help="print the results as markdown")
    tell.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "summary":
        print(summary(options.files))
        return 0
    warnings.simplefilter("ignore")
    return 1 if run(options) else 0


if __name__ == "__main__":
    sys.exit(main())
