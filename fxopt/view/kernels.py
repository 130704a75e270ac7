"""The kernels of a report as files that run by themselves: source, the site's shapes and strides, a reference, a check.

    paths = rec.kernels("kernels/")          # one file for each op and kind of arguments
    $ python kernels/rms_norm_0.py           # on a GPU, or on the CPU under Triton's interpreter

A file needs torch and Triton, and fxopt only for what is no kernel. Edit it and run it again: it says whether the
result is still as close to float64 as the reference is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fxopt.ops import FusedOp, Implementation, op_named
from fxopt.view import text
from fxopt.view.report import Kernel, Report, Site
from fxopt.view.save import write
from fxopt.view.standalone import Collector, Unwritable

_BEFORE = """\
from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is declared
"""

_TENSOR = '''\
def tensor(shape, stride, dtype, device=DEVICE):
    """Random numbers so laid out; integers are 0, an index into anything, and booleans True."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if 0 not in shape else 0
    if dtype.is_floating_point or dtype.is_complex:
        flat = torch.randn(span, dtype=torch.promote_types(dtype, torch.float32), device=device).to(dtype)
    else:
        flat = torch.full((span,), dtype == torch.bool, dtype=dtype, device=device)
    return flat.as_strided(shape, stride)


def narrowed(value):
    """On the CPU float32 for bfloat16: Triton's interpreter truncates where a GPU rounds."""
    if DEVICE == "cpu" and isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
        return value.float()
    return torch.float32 if DEVICE == "cpu" and value is torch.bfloat16 else value
'''

_MADE = """\
def make_arguments():
    return tuple(map(narrowed, site(tensor)))
"""

_DRAWN = """\
def make_arguments():
    def like(shape, stride, dtype):
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    return tuple(narrowed(a.to(DEVICE) if isinstance(a, torch.Tensor) else a) for a in draw(*site(like)))
"""

_CHECK = '''\
def wide(value):
    """Of the same kind in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def error(actual, exact):
    """The largest difference where `exact` is finite; inf where they are not finite in the same places."""
    actual, finite = actual.double(), exact.isfinite()
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    return (actual - exact)[finite].abs().max().item() if finite.any() else 0.0


def main():
    torch.manual_seed(0)
    args = make_arguments()
    results, eager, exact = (
        list(found) if isinstance(found, (tuple, list)) else [found]
        for found in (launch(*args), reference(*args), reference(*map(wide, args)))
    )
    good = True
    for i, (a, e, x) in enumerate(zip(results, eager, exact)):
        if a.shape != e.shape or a.dtype != e.dtype:
            good = False
            print(f"result {i}: {a.dtype}{list(a.shape)}, the reference gives {e.dtype}{list(e.shape)}")
            continue
        ulp = torch.finfo(a.dtype).eps * x.nan_to_num(0, 0, 0).abs().max().item() if a.is_floating_point() else 0.0
        ours, theirs = error(a, x), error(e, x)
        close = ours <= 2 * theirs + 2 * ulp
        good = good and close
        print(f"result {i} {a.dtype}{list(a.shape)}: error {ours:.3g} against float64, the reference's {theirs:.3g}:",
              "equal" if close else "DIFFERS")
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU, interpreted"
    if DEVICE == "cuda":
        from triton.testing import do_bench

        kernel, eager = (do_bench(lambda: run(*args)) for run in (launch, reference))
        print(f"{1000 * kernel:.1f} us, the reference in eager mode {1000 * eager:.1f} us (launches included)")
    print("verdict:", "equal" if good else "DIFFERS", "on", where)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
'''


#: implementation -> its source; it reads files, and a notebook asks for it at each display
_read: dict[str, Kernel] = {}


def kernel_sources(report: Report) -> list[Kernel]:
    """The kernels of the report's sites, each once: those that it was saved with, or from the ops that are registered.

    Of an op with several it is the one that computed a site, else the first that the op has.
    """
    if report.kernel_sources is not None:
        return report.kernel_sources
    found: dict[tuple[str, str], Kernel] = {}
    for name, used in dict.fromkeys((site.op, site.implementation) for site in report.sites):
        op = op_named(name)
        chosen = _chosen(op, used) if op is not None else None
        if op is not None and chosen is not None:
            found[name, chosen.name] = kernel(op, chosen)
    return list(found.values())


def kernel_of(site: Site, kernels: Sequence[Kernel]) -> Kernel | None:
    """The one of `kernels` that computes the site, else another of the same op, or None."""
    own = [found for found in kernels if found.op == site.op]
    return next((found for found in own if found.implementation == site.implementation), own[0] if own else None)


def kernel(op: FusedOp, chosen: Implementation) -> Kernel:
    """The source of one implementation; where it can't be written out, imports of it, and why."""
    key = f"{chosen.overload or op.overload} {chosen.name} {chosen.version}"
    if key not in _read:
        home = op.reference.__module__
        try:
            found = Collector(home)
            found.add(op.reference, "reference")
            found.add(chosen.run, "launch")
            if op.drawn is not None:
                found.add(op.drawn, "draw")
            source = found.text()
        except Unwritable as error:
            source = _imported(op, chosen, home, str(error))
        _read[key] = Kernel(op.name, chosen.name, source, op.drawn is not None)
    return _read[key]


def write_kernels(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """A file in `folder` for each opaque kernel of the report's sites, by op and arguments; their paths.

    Where a site was computed by something else (on a CPU, or decomposed for the compiler), it is the kernel that the op
    has, and the file says so. Ops without one have no file. Raises ValueError where an op of the report isn't
    registered here (a plugin that isn't installed), and its kernel wasn't saved with the report.
    """
    root, paths = Path(folder), []
    groups: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
    for site in report.sites:
        groups.setdefault((site.op, site.arguments), []).append(site)
    kernels = kernel_sources(report)
    numbers: dict[str, int] = {}
    for (name, arguments), sites in groups.items():
        found = kernel_of(sites[0], kernels)
        if found is None and op_named(name) is None:
            raise ValueError(f"the op {name} of the report is not registered here: import the plugin that defines it")
        if found is None or not arguments:
            continue
        number = numbers.setdefault(name, 0)
        numbers[name] += 1
        path = root / f"{name}_{number}.py"
        write(path, script(found, arguments, sites))
        paths.append(path)
    return paths


def _chosen(op: FusedOp, used: str) -> Implementation | None:
    opaque = [candidate for candidate in op.implementations if candidate.opaque]
    return next((candidate for candidate in opaque if candidate.name == used), opaque[0] if opaque else None)


def script(kernel: Kernel, arguments: Sequence[str], sites: Sequence[Site]) -> str:
    """The file's text."""
    first = sites[0]
    served = text.count(len(sites), "site")
    lines = [f"fxopt::{kernel.op} by {kernel.implementation}, for the arguments of {served} of a model."]
    where = f"First in {first.module or 'the model'}: {text.short_source(first.source)}"
    told = [where]
    if first.implementation != kernel.implementation:
        why = dict(first.passed_over).get(kernel.implementation, "it was not chosen")
        told.append(f"There it was computed by {first.implementation}: {why}.")
    lines += ["", *told, "", "Run this file: it compares the kernel with float64, beside the reference."]
    doc = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    body = "".join(f"        {argument},\n" for argument in arguments)
    site = f"def site(tensor):\n    return (\n{body}    )"
    make = _DRAWN if kernel.drawn else _MADE
    return "\n\n".join([f'"""{doc}\n"""', _BEFORE, kernel.source, "", _TENSOR, site, "", make, _CHECK])


def _imported(op: FusedOp, chosen: Implementation, home: str, why: str) -> str:
    return "\n".join(
        [
            f"# The source is not written out: {why}.",
            f"import {home}",
            "from fxopt.ops import op_named",
            "",
            f'op = op_named("{op.name}")',
            "reference = op.reference",
            f'launch = next(found.run for found in op.implementations if found.name == "{chosen.name}")',
            *(["draw = op.drawn"] if op.drawn is not None else []),
        ]
    )
