"""Random programs under fxopt and under eager: the command behind `make fuzz`.

    python tests/fuzz/fuzz.py --cases 10000 --seed 0            rewritten graphs run op by op
    python tests/fuzz/fuzz.py --cases 200 --inductor            ... are compiled by Inductor

Cases come in batches, each in a process of its own with its own seed; a batch ends at its first failure, shrunk to the
smallest case that shows it and printed as a script (with --no-shrink it goes on). The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from fuzz_check import Difference, check, running
from fuzz_program import FLOATS, Case, InputSpec

_number = st.integers(0, 63)
_dims = st.lists(st.integers(0, 3), min_size=0, max_size=4).map(tuple)
_input = st.builds(
    InputSpec,
    dims=_dims,
    dtype=st.sampled_from(("f32", "f32", "f32", *FLOATS, "i64", "boolean")),
    memory=st.integers(0, 5),
    grad=st.booleans(),
    alias=st.one_of(st.none(), st.none(), st.none(), st.none(), st.integers(0, 2)),
)
_size = st.sampled_from((2, 3, 4, 6, 8, 5, 2, 3, 4, 8, 1, 0))

cases = st.builds(
    Case,
    sizes=st.tuples(_size, _size, _size, _size),
    others=st.tuples(_size, _size, _size, _size),
    inputs=st.lists(_input, min_size=1, max_size=3).map(tuple),
    steps=st.lists(st.lists(_number, min_size=20, max_size=20).map(tuple), min_size=1, max_size=8).map(tuple),
    returns=st.lists(_number, min_size=1, max_size=4).map(tuple),
    mode=st.sampled_from(("no_grad", "train", "inference")),
    dynamic=st.sampled_from(("static", "static", "dynamic", "automatic", "marked")),
    container=st.sampled_from(("tuple", "one", "list", "dict")),
)


def run_batch(
    number: int, count: int, *, inductor: bool = False, shrink: bool = True, found: list[str] | None = None
) -> Counter[str]:
    """`count` cases from the seed `number`; raises Difference, with the smallest case found, at the first failure.

    With a list `found`, failures are put there as they are, and the batch goes on.
    """
    tally: Counter[str] = Counter()
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(cases)
    def batch(case: Case) -> None:
        try:
            check(case, tally)
        except Difference as error:
            if found is None:
                raise
            found.append(str(error))

    with running.rewritten_always():
        if inductor:
            batch()
        else:
            with running.lowered_by(aot_eager):
                batch()
    return tally


def _batch(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One batch in a process of its own: a crash or a memory leak of one is not the others'."""

    def work() -> dict[str, Any]:
        warnings.simplefilter("ignore")
        found: list[str] | None = None if options.shrink else []
        try:
            tally = run_batch(number, options.batch, inductor=options.inductor, shrink=options.shrink, found=found)
        except Difference as error:
            return {"failed": [str(error)]}
        return {"tally": tally, "failed": found or []}

    result = running.in_a_fork(work, options.limit)
    if "died" in result:
        result = {"failed": [f"the process died ({result['died']}); to see the case: --seed {number} --batch 1, 2 ..."]}
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250, help="cases a process")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; the next one has the next")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--inductor", action="store_true", help="compile with Inductor: some 20 times slower")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a batch")
    parser.add_argument("--no-shrink", dest="shrink", action="store_false", help="tell all failures as they are")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed - (-options.cases // options.batch))
    total: Counter[str] = Counter()
    failures = 0
    began = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        for number, result in zip(seeds, pool.map(lambda n: _batch(n, options), seeds), strict=True):
            for failure in result["failed"]:
                failures += 1
                print(f"--- seed {number}\n{failure}\n", flush=True)
            total.update(result.get("tally", {}))
            seconds = time.perf_counter() - began
            print(f"seed {number}: {total['cases']} cases so far, {seconds:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"seeds": [seeds[0], seeds[-1]], "failures": failures, **dict(total.most_common())}, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
