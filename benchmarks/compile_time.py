"""Compile time by depth: fxopt with repeated layers compiled once, fxopt without, and Inductor; cold and warm.

    python benchmarks/compile_time.py --layers 8 80                      # small widths, on the GPU where there is one
    python benchmarks/compile_time.py --layers 8 32 --shape 8B           # an 8B model's widths: 8 layers are 3.5 GiB
    python benchmarks/compile_time.py --layers 8 80 --decode             # one token with a static cache
    python benchmarks/compile_time.py --layers 8 --decode --graphs       # the same in CUDA graphs

Each figure is from a process of its own. "cold": all cache directories are new; "warm": a second process, with what
the first left there. "first call" is the whole first call of the compiled model, capture included; "backend" is what
the compiler behind Dynamo takes of it, so the rest is Dynamo's own time and the first run; "retrace" and "lower" (that
is Inductor, AOTAutograd included) are parts of it; "after capture" is all of it but the retrace. "run" is the median of
50 later calls. "CPU" is processor time of the first call, "after CPU" and "lower CPU" of those parts, that of compilers
that were started and have ended included: on a busy machine it is the steadier figure (--one-thread makes it whole).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
OUTLINE = {"fxopt": "auto", "fxopt-off": "off", "fxopt-always": "always"}
COMPILERS = (*OUTLINE, "inductor")
COLUMNS = ("first call", "backend", "retrace", "after capture", "lower", "CPU", "after CPU", "lower CPU", "run ms")


def measure(compiler: str, layers: int, shape: str, decode: bool, graphs: bool) -> dict[str, float | str]:
    import torch
    import torch._dynamo
    from torch._inductor.compile_fx import compile_fx  # 1 s, once a process, whoever is first
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    import fxopt
    import fxopt.backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=4096)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 1024, (1, 1 if decode else 64))
    torch.set_default_dtype(torch.float32)
    inputs = {"use_cache": False}
    if decode:
        cache = StaticCache(config, max_cache_len=256)
        inputs = {"past_key_values": cache}
        with torch.no_grad():
            model(torch.randint(0, 1024, (1, 16), device=device), **inputs)
    fxopt.fusions()  # loading the plugins is paid once a process
    calls: dict[str, int] = {}  # of each body; not from the report: keeping one is not part of compiling
    spent: Counter[str] = Counter()
    processor: Counter[str] = Counter()

    def timed(stage, function):
        def clocked(*given, **named):
            start, before = time.perf_counter(), _processor_seconds()
            try:
                return function(*given, **named)
            finally:
                spent[stage] += time.perf_counter() - start
                processor[stage] += _processor_seconds() - before

        return clocked

    if compiler == "inductor":
        patches = {"triton.cudagraphs": graphs}
        lower = timed("lower", lambda *given: compile_fx(*given, config_patches=patches))
        run = torch.compile(model, backend=timed("backend", lower))
    else:
        fxopt.backend.compile_graph = timed("lower", fxopt.backend.compile_graph)
        fxopt.backend.normal_forms = timed("retrace", fxopt.backend.normal_forms)
        describe = fxopt.backend.describe
        fxopt.backend.describe = lambda found: calls.update(described := describe(found)) or described
        options = {"outline": OUTLINE[compiler], "mode": "reduce-overhead" if graphs else "default"}
        run = torch.compile(model, backend=timed("backend", fxopt.backend.fxopt), options=options)

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        timed("first call", lambda: (run(ids, **inputs), synchronise()))()
        times = []
        for _ in range(50):
            start = time.perf_counter()
            run(ids, **inputs)
            synchronise()
            times.append(time.perf_counter() - start)
    parts = {stage: spent[stage] for stage in ("first call", "backend", "retrace", "lower")}
    return parts | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "calls": "+".join(map(str, calls.values())) or "-",
        "after capture": spent["backend"] - spent["retrace"],
        "CPU": processor["first call"],
        "after CPU": processor["backend"] - processor["retrace"],
        "lower CPU": processor["lower"],
        "run ms": statistics.median(times) * 1e3,
    }


def _processor_seconds() -> float:
    """Seconds of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def in_new_process(arguments: argparse.Namespace, compiler: str, layers: int, cache: str) -> dict[str, float | str]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", compiler, "--layers", str(layers)]
    command += ["--shape", arguments.shape] + ["--decode"] * arguments.decode + ["--graphs"] * arguments.graphs
    fxopt_cache = os.path.join(cache, "fxopt")
    os.makedirs(fxopt_cache, mode=0o700, exist_ok=True)
    caches = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "inductor"), "FXOPT_CACHE_DIR": fxopt_cache}
    caches |= {"TRITON_CACHE_DIR": os.path.join(cache, "triton"), "CUDA_CACHE_PATH": os.path.join(cache, "cuda")}
    if arguments.one_thread:
        caches["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 80])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="in CUDA graphs, as mode='reduce-overhead'")
    parser.add_argument("--compilers", nargs="*", choices=COMPILERS, default=["fxopt", "inductor"])
    parser.add_argument("--cold", action="store_true", help="no warm start")
    parser.add_argument("--one-thread", action="store_true", help="no compiler processes beside the main one")
    parser.add_argument("--one", choices=COMPILERS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        given = arguments.shape, arguments.decode, arguments.graphs
        print(json.dumps(measure(arguments.one, arguments.layers[0], *given)))
        return
    print("| layers | compiler | cache | bodies' calls | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 4))
    for layers in arguments.layers:
        for compiler in arguments.compilers:
            with tempfile.TemporaryDirectory() as cache:
                os.chmod(cache, 0o700)
                for state in ("cold",) if arguments.cold else ("cold", "warm"):
                    found = in_new_process(arguments, compiler, layers, cache)
                    cells = " | ".join(f"{found[column]:.2f}" for column in COLUMNS)
                    print(f"| {layers} | {compiler} | {state} | {found['calls']} | {cells} |", flush=True)
    kind = ("decode" if arguments.decode else "64 tokens") + ", CUDA graphs" * arguments.graphs
    print(f"\ntorch {found['torch']}, {found['device']}, shape {arguments.shape}, {kind}")


if __name__ == "__main__":
    main()
