"""Every Triton kernel compiles for every supported architecture, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# In a process of its own: under the interpreter, which the other tests use, there is nothing to compile.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from importlib import import_module
from pathlib import Path
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fxopt.kernels._triton import compile_examples

def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin), file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"{key}:(\\d+)", text)[1]) for name, key in (("registers", "REG"), ("stack", "STACK"))}

covered = set()
for module, example in compile_examples():
    kernel = example.kernel
    covered.add(kernel)
    if example.capability > int(sys.argv[1]):
        continue
    signature = {name: example.signature.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in example.constexprs.items()}
    divisible = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind.endswith(":16")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in divisible}
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", int(sys.argv[1]), 32), options
    )
    print(json.dumps({
        "example": f"{module}: {example.name}", "kernel": kernel.__name__, "cubin": len(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared, "max_spills": example.max_spills, **resources(compiled.asm["cubin"]),
    }))

# A kernel that no other one calls is launched from Python, and must have an example.
folder = Path(import_module("fxopt.kernels._triton").__file__).parent
modules = [import_module(f"fxopt.kernels.{path.stem}") for path in sorted(folder.glob("*.py"))]
declared = {value for m in modules for value in vars(m).values() if isinstance(value, triton.JITFunction)}
for kernel in declared - covered:
    if not any(re.search(rf"\\b{kernel.__name__}\\(", other.src) for other in declared - {kernel}):
        print(json.dumps({"uncovered": kernel.__name__}))
"""

# Bytes of shared memory that one block may use.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [f["uncovered"] for f in found if "uncovered" in f]
    assert found
    for f in sorted(found, key=lambda f: f["stack"]):
        used = f"{f['registers']} registers, {f['shared']} B shared, {f['stack']} B stack"
        print(f"sm_{capability} {f['example']}: {used}")
        assert f["cubin"] > 0
        assert f["shared"] <= SHARED[capability], f
        assert f["stack"] <= 4 * f["max_spills"], f
