"""The parts of a decode step one by one: eager, Inductor in three modes, fxopt's kernels; held against bandwidth.

    python benchmarks/decode_ops.py --out FOLDER [--cases rms_norm qkv ...] [--seconds 330]
    python benchmarks/decode_ops.py --out FOLDER --table FOLDER/decode_ops.json

Writes FOLDER/decode_ops.json and FOLDER/decode_ops.md, anew after every case, so that a run that is cut short leaves
what it has. A time is the median of a call in a CUDA graph whose calls use several sets of arguments in turn, together
twice the L2 cache or more (`fxopt.tune.timing`, the tuner's own clock). Whatever is timed is compared with float64
first, and is left out if its error is more than twice eager mode's. The limit is the bytes of all operands and results
over the bandwidth of a large copy, measured first.

"fxopt" is the kernel as it guesses itself, "fxopt tuned" the best of its configurations. Cases are in order of
importance: what does not fit into --seconds is left out, the slowest modes first. What the tuner would make of it is
written to FOLDER/tune_table.json, for `fxopt/tune/tables/`; --table makes it of an earlier report.

On a CPU (--device cpu --tiny, Triton's interpreter) it shows that it runs, and no figure means anything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.kernels.gated_mlp import gated_activation
from fxopt.kernels.rms_norm import add_rms_norm, rms_norm
from fxopt.kernels.rotary import rotary_pair
from fxopt.kernels.shared_input_linear import gated_linear, linear_triple
from fxopt.kernels.small_linear import small_linear
from fxopt.ops import FusedOp, Target, spelled
from fxopt.rewrite.evaluate import Promote
from fxopt.tune import key, store, timing
from fxopt.tune.measure import Candidate, best
from fxopt.tune.timing import Timing
from timing import copy_bandwidth

MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {},
    "inductor coordinate descent": {"options": {"coordinate_descent_tuning": True}},
    "inductor max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}


@dataclass(frozen=True)
class Case:
    """An op with arguments of a model's: `shapes` says what they are, `make` draws a set of them."""

    group: str
    shapes: str
    op: FusedOp
    make: Callable[[], tuple[Any, ...]]
    slow_modes: bool = True  # whether max-autotune is worth its seconds


def cases(device: str, dtype: torch.dtype, tiny: bool) -> Iterator[Case]:
    """All cases, the most important first: Llama 3 8B's layers, and the norms that other compilers are measured on."""
    hidden, inner, heads, kv, lanes = (64, 96, 4, 2, 16) if tiny else (4096, 14336, 32, 8, 128)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def w(n: int, k: int) -> Tensor:
        return (torch.randn(n, k, device=device) / math.sqrt(k)).to(dtype)

    norm = (1e-5, 0.0, dtype)  # eps, offset, round_to: Llama's
    batches = (1, 3) if tiny else (1, 16, 4, 64)
    q, k = heads * lanes, kv * lanes

    def before(b: int, hidden: int) -> tuple[Any, ...]:
        return (x(hidden), *norm) if b == 1 else ()  # of several rows the norm has a launch of its own

    def qkv(b: int, hidden: int, q: int, k: int) -> tuple[Any, ...]:
        weights = w(q, hidden), w(k, hidden), w(k, hidden)
        return linear_triple.bind(x(b, 1, hidden), *weights, None, None, None, *before(b, hidden))

    def gate_up(b: int, hidden: int, inner: int) -> tuple[Any, ...]:
        weights = w(inner, hidden), w(inner, hidden)
        return gated_linear.bind(x(b, 1, hidden), *weights, "silu", None, None, *before(b, hidden))

    def onto(b: int, n: int, width: int) -> tuple[Any, ...]:
        return small_linear.bind(x(b, 1, width), w(n, width), None, x(b, 1, n))

    def head(b: int) -> tuple[Any, ...]:
        vocabulary = 200 if tiny else 128256
        return small_linear.bind(x(b, 1, hidden), w(vocabulary, hidden), None, None, None, *before(b, hidden))

    def layer(b: int, hidden: int, inner: int, q: int, k: int, slow: bool) -> Iterator[Case]:
        normed = "norm, " if b == 1 else ""
        yield Case("qkv", f"{normed}{b}x{hidden} -> {q}+{k}+{k}", linear_triple, lambda: qkv(b, hidden, q, k), slow)
        shapes = f"{normed}{b}x{hidden} -> {inner}+{inner}, silu"
        yield Case("gate_up", shapes, gated_linear, lambda: gate_up(b, hidden, inner), slow)
        yield Case("o", f"{b}x{q} -> {hidden}, + residual", small_linear, lambda: onto(b, hidden, q), slow)
        yield Case("down", f"{b}x{inner} -> {hidden}, + residual", small_linear, lambda: onto(b, hidden, inner), slow)

    def rope(b: int, length: int) -> tuple[Any, ...]:
        heads_of = x(b, length, q), x(b, length, k)  # as the projections leave them
        turned = [t.unflatten(-1, (-1, lanes)).transpose(1, 2) for t in heads_of]
        angles = torch.rand(1, 1, length, lanes, device=device) * 6
        return rotary_pair.bind(*turned, angles.cos().to(dtype), angles.sin().to(dtype))

    norms = [(3, 40), (5, 64)] if tiny else [(1, 5120), (192, 5120), (4096, 4096), (32768, 8192)]
    for rows, columns in norms:
        yield Case("rms_norm", f"{rows}x{columns} + residual", add_rms_norm,
                   lambda r=rows, c=columns: add_rms_norm.bind(x(r, c), x(r, c), x(c), *norm, dtype))  # fmt: skip
    for b in batches:
        yield from layer(b, hidden, inner, q, k, b in batches[:2])
    for smaller in () if tiny else ((2048, 8192, 2048, 512), (896, 4864, 896, 128)):  # Llama 3.2 1B, Qwen 2.5 0.5B
        for b in batches[:2]:
            yield from layer(b, *smaller, False)
    for b, length in ((1, 1), (3, 1), (1, 2)) if tiny else ((1, 1), (16, 1), (1, 2048)):
        shapes = f"{b}x{heads}+{kv}x{length}x{lanes}"
        yield Case("rotary", shapes, rotary_pair, lambda b=b, n=length: rope(b, n))
    for rows in (3,) if tiny else (1, 192, 4096):
        yield Case("gated_mlp", f"{rows}x{inner}, silu", gated_activation,
                   lambda r=rows: gated_activation.bind(x(r, inner), x(r, inner), "silu"))  # fmt: skip
    for b in batches[:2]:
        normed = "norm, " if b == 1 else ""
        yield Case("head", f"{normed}{b}x{hidden} -> vocabulary", small_linear, lambda b=b: head(b), False)
        yield Case("rms_norm", f"{b}x{hidden}", rms_norm,
                   lambda b=b: rms_norm.bind(x(b, 1, hidden), x(hidden), *norm, dtype), False)  # fmt: skip


def moved(args: Sequence[Any], result: Any) -> int:
    """Bytes of all operands and results, each once."""
    return sum(t.numel() * t.element_size() for t in tree_leaves((args, result)) if isinstance(t, Tensor))


def promoted(op: FusedOp, args: Sequence[Any]) -> Any:
    """The op's result in float64."""
    narrow = (torch.float16, torch.bfloat16, torch.float32)

    def wide(a: Any) -> Any:
        if isinstance(a, Tensor):
            return a.double() if a.dtype in narrow else a
        return torch.float64 if isinstance(a, torch.dtype) and a in narrow else a

    with Promote():
        return op.reference(*tree_map(wide, tuple(args)))


def error(result: Any, exact: Any) -> float:
    """The largest error relative to the largest element, on the device."""
    pairs = zip(tree_leaves(result), tree_leaves(exact), strict=True)
    worst = [((r.double() - e).abs().max() / e.abs().max()).item() for r, e in pairs]
    return max(math.inf if math.isnan(found) else found for found in worst)


def contenders(case: Case, modes: Sequence[str], most: int | None) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """(name, configuration, how to call it), the cheapest to build first; `most` configurations of ours."""
    kernel = next(i for i in case.op.implementations if i.name == "triton")
    metas = key.concrete(case.make())
    yield "fxopt", "", kernel.run
    for config in itertools.islice(kernel.configs(*metas) if kernel.configs is not None else (), most):
        yield "fxopt tuned", spelled(config), kernel.configured(config)
    for mode in modes:
        chosen = MODES[mode]
        if chosen is None:
            yield mode, "", case.op.reference
        elif mode != "inductor max-autotune" or case.slow_modes:
            yield mode, "", torch.compile(case.op.reference, dynamic=False, fullgraph=True, **chosen)


def measured(
    case: Case, modes: Sequence[str], bandwidth: float, device: torch.device, until: float, most: int | None
) -> dict[str, Any]:
    """One case: what each contender takes, in microseconds."""
    torch._dynamo.reset()
    first = case.make()
    eager, exact = case.op.reference(*first), promoted(case.op, first)
    size = moved(first, eager)
    count = 2 if device.type == "cpu" else min(timing.argument_sets(size, device), max(2, (16 << 30) // size))
    sets = [first, *(case.make() for _ in range(count - 1))]
    own = error(eager, exact)
    if not math.isfinite(own):
        raise ArithmeticError(f"eager mode overflows on what was drawn for {case.group} {case.shapes}")
    allowed = 2 * own + 4 * torch.finfo(first[0].dtype).eps
    row: dict[str, Any] = {"case": case.group, "shapes": case.shapes, "bytes": size, "sets": count}
    row["limit"], row["times"], row["left_out"] = round(size / bandwidth * 1e6, 3), {}, {}
    timing.time_all([case.op.reference], sets, device)  # what is timed first pays for memory that was never used
    for name, config, call in contenders(case, modes, most):
        label = f"{name} {config}".strip()
        try:
            if time.monotonic() > until:
                raise TimeoutError("out of time")
            found = error(call(*first), exact)
            if not found <= allowed:
                raise ArithmeticError(f"error {found:.3g} against float64, allowed {allowed:.3g}")
            (taken,) = timing.time_all([call], sets, device)
        except Exception as reason:
            row["left_out"][label] = f"{type(reason).__name__}: {str(reason)[:200]}"
            continue
        microseconds = round(taken.seconds * 1e6, 3)
        row["times"][label] = {"us": microseconds, "spread": round(taken.spread, 3), "error": found}
        best = row.setdefault("best", {}).get(name)
        if best is None or microseconds < best["us"]:
            row["best"][name] = {"us": microseconds, "config": config}
    return row


def markdown(report: dict[str, Any]) -> str:
    """The report as a table: microseconds, and the best of fxopt against the limit and against the best of Inductor."""
    names = ["eager", *(m for m in MODES if m != "eager"), "fxopt", "fxopt tuned"]
    lines = [
        f"{report['device']}, torch {report['torch']}, triton {report['triton']}, {report['dtype']}, copy bandwidth "
        f"{report['bandwidth'] / 1e12:.2f} TB/s; microseconds a call",
        "",
        "| case | shapes | limit | " + " | ".join(names) + " | of the limit | Inductor's best / fxopt |",
        "|---" * (len(names) + 5) + "|",
    ]
    for row in report["rows"]:
        best = {name: entry["us"] for name, entry in row.get("best", {}).items()}
        ours = min((best[n] for n in best if n.startswith("fxopt")), default=None)
        theirs = min((best[n] for n in best if n.startswith("inductor")), default=None)
        cells = [row["case"], row["shapes"], f"{row['limit']:.1f}"]
        cells += [f"{best[name]:.1f}" if name in best else "" for name in names]
        cells.append(f"{row['limit'] / ours:.0%}" if ours else "")
        cells.append(f"{theirs / ours:.2f}" if ours and theirs else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in report["rows"]:
        for why in dict.fromkeys(row["left_out"].values()):
            names = [name for name, reason in row["left_out"].items() if reason == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"- {row['case']} {row['shapes']}, {', '.join(names[:3])}{more}: {why}")
    return "\n".join(lines) + "\n"


def table(report: dict[str, Any]) -> list[store.Entry]:
    """What the tuner would know of a GPU whose report this is: an entry for each case with configurations."""
    known = {(case.group, case.shapes): case for case in cases("meta", getattr(torch, report["dtype"]), False)}
    target = Target(torch.device("cuda"), cuda_graphs=True)
    entries = []
    for row in report["rows"]:
        case = known.get((row["case"], row["shapes"]))
        if case is None or "tuned" not in " ".join(row.get("times", ())):
            continue
        kernel = next(i for i in case.op.implementations if i.name == "triton")
        own = next(i for i in case.op.implementations if i.name == "decomposed")
        times = {Candidate(own): row["times"]["inductor"]}
        for label, found in row["times"].items():
            if label.startswith("fxopt"):
                words = label.removeprefix("fxopt").removeprefix(" tuned").split()
                config = {name: int(value) for name, _, value in (word.partition("=") for word in words)}
                times[Candidate(kernel, config or None)] = found
        taken = {c: Timing(found["us"] * 1e-6, found["spread"]) for c, found in times.items()}
        args = case.make()
        incumbent = kernel if kernel.objection(target, *args) is None else own
        parts = key.describe(case.op, target, key.concrete(args), {})
        del parts["code"]  # that of today, maybe not what was measured
        parts |= {"device": report["device"] + " " + report["architecture"]}
        parts |= {"software": f"torch {report['torch']}, triton {report['triton']}"}
        entries.append(best(taken, incumbent, parts, {}))
    return entries


def versions() -> dict[str, str]:
    try:
        import triton

        return {"torch": torch.__version__, "triton": triton.__version__}
    except ImportError:
        return {"torch": torch.__version__, "triton": "none"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what the command line names; the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", help="only these groups")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seconds", type=float, default=330.0, help="no new measurement is begun after these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="sizes for a trial on a CPU")
    parser.add_argument("--table", type=Path, metavar="REPORT", help="measure nothing: a table from decode_ops.json")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.table is not None:
        report = json.loads(given.table.read_text())
        store.write_table(given.out / "tune_table.json", table(report))
        return report
    until = time.monotonic() + given.seconds
    device = torch.device(given.device)
    dtype: torch.dtype = getattr(torch, given.dtype)
    chosen = [c for c in cases(given.device, dtype, given.tiny) if not given.cases or c.group in given.cases]
    if not chosen:
        parser.error(f"no case is called {given.cases}")
    torch.manual_seed(0)
    with torch.no_grad():
        bandwidth = copy_bandwidth(device, 2**20 if given.tiny else 2**30)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        report = {
            "device": name,
            "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if device.type == "cuda" else "",
            **versions(),
            "dtype": given.dtype,
            "bandwidth": bandwidth,
            "rows": [],
        }
        for case in chosen:
            start = time.monotonic()
            try:
                row = measured(case, given.modes, bandwidth, device, until, 2 if given.tiny else None)
            except torch.cuda.OutOfMemoryError as reason:
                row = {"case": case.group, "shapes": case.shapes, "limit": 0.0, "left_out": {"all": str(reason)[:200]}}
            row["seconds"] = round(time.monotonic() - start, 1)
            report["rows"].append(row)
            (given.out / "decode_ops.json").write_text(json.dumps(report, indent=1) + "\n")
            (given.out / "decode_ops.md").write_text(markdown(report))
            print(row["case"], row["shapes"], row.get("best"), row["left_out"], f"{row['seconds']} s", flush=True)
        if device.type == "cuda" and not given.tiny:
            store.write_table(given.out / "tune_table.json", table(report))
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
