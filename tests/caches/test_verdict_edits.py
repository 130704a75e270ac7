"""A verdict is about the code that was verified: after an edit of any part of it the rewrite is verified again."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import Graph, symbolic_trace

from fxopt.ops import ANYWHERE, FusedOp, Implementation, fused_op
from fxopt.rewrite import verdicts
from fxopt.rewrite.fusion import Fusion
from fxopt.rewrite.region import Pair
from fxopt.sources import defining_file, digest

# Each op computes `x * 1`; after the edit it, or what it replaces, computes `x * 7`.
OP = """
import fxopt, torch
from dataclasses import dataclass
from fxopt import Fusion, Match, fused_op
{imports}

@fused_op("{name}(Tensor x) -> Tensor"{sources})
def {name}(x):
    return torch.{aten}(x)

@{name}.fake
def _(x):
    return torch.empty_like(x)

{implementation}

@dataclass(frozen=True)
class Fuse{name}(Fusion):
    anchors = ({anchor},)
    name = "{name}"

    def find(self, node, scope):
        return Match((node,), frozenset({{node}}), {{"x": node.args[0]}})

    def rewrite(self, match):
        return match.call({name}, match["x"])

fxopt.register(Fuse{name}())
"""

KERNEL = """
@{name}.implementation("kernel", opaque={opaque})
def _(x):
    return torch.{aten}(x) * {factor}
"""

PLACES = {"kernel": "erf", "inlined": "erfc", "source": "lgamma", "elsewhere": "sinh", "replaced": "cosh"}

CHILD = """
import importlib, json, sys
import torch
from torch._dynamo.backends.debugging import aot_eager
import fxopt, fxopt.backend

fxopt.backend.compile_graph = lambda module, inputs, *_: aot_eager(module, inputs)
found = {}
for place, aten in json.loads(sys.argv[1]).items():
    importlib.import_module(f"checked_{place}")
    if place == "elsewhere":
        importlib.import_module("checked_extension")
    fn = torch.ops.checked.twice if place == "replaced" else getattr(torch, aten)
    x = torch.linspace(0.5, 1.5, 12).reshape(3, 4)
    with fxopt.record() as rec:
        y = torch.compile(lambda x: fn(x), backend="fxopt")(x)
    found[place] = {"verdicts": [s.verdict.status for s in rec.steps], "sites": rec.counts()}
    found[place]["right"] = torch.allclose(y, fn(x))
print(json.dumps(found))
"""


def write(folder, edited):
    factor = "7.0" if edited else "1.0"
    for place, aten in PLACES.items():
        name = f"checked_{place}"
        fields = {"name": name, "aten": aten, "imports": "", "sources": "", "anchor": f"torch.ops.aten.{aten}.default"}
        kernel = factor
        if place == "source":
            (folder / "checked_helper.py").write_text(f"FACTOR = {factor}\n")
            fields |= {"imports": "import checked_helper", "sources": ", sources=[checked_helper.__file__]"}
            kernel = "checked_helper.FACTOR"
        if place == "replaced":  # an op of the user's own, which torch's version says nothing about
            (folder / "checked_library.py").write_text(
                'import torch\n@torch.library.custom_op("checked::twice", mutates_args=())\n'
                f"def twice(x: torch.Tensor) -> torch.Tensor:\n    return torch.cosh(x) * {factor}\n"
                "twice.register_fake(torch.empty_like)\n"
            )
            fields |= {"imports": "import checked_library", "anchor": "torch.ops.checked.twice.default"}
            kernel = "1.0"
        text = KERNEL.format(name=name, aten=aten, factor=kernel, opaque=place != "inlined")
        if place == "elsewhere":
            (folder / "checked_extension.py").write_text(f"import torch\nfrom {name} import {name}\n{text}")
            text = ""
        (folder / f"{name}.py").write_text(OP.format(**fields, implementation=text))


def test_what_was_equal_before_an_edit_is_verified_after_it(tmp_path):
    (tmp_path / "plugin").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "plugin"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FXOPT_CACHE_DIR": str(tmp_path / "cache"),
    }
    for edited in (False, True):
        write(tmp_path / "plugin", edited)
        command = [sys.executable, "-c", CHILD, json.dumps(PLACES)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for place, found in json.loads(done.stdout.splitlines()[-1]).items():
            assert found["right"], place
            assert found["verdicts"] == ["failed" if edited else "equal"], place
            assert found["sites"] == ({} if edited else {f"checked_{place}": 1}), place
        if not edited:
            # All but the one about an op of which nobody knows the version.
            assert len(list((tmp_path / "cache" / "verdicts").iterdir())) == len(PLACES) - 1


class Toy(Fusion):
    def find(self, node, scope):
        return None

    def rewrite(self, match):
        raise NotImplementedError


def pair(*targets):
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2)
    nodes = []
    for target in targets:
        nodes.append(graph.call_function(target, (x,)))
        nodes[-1].meta["val"] = torch.empty(2)
    return Pair(inputs=(x,), old=(nodes[0],), new=(nodes[-1],), outputs=(nodes[0],), replacements=(nodes[-1],))


def signature(fusion, *targets, chosen=(), setting=()):
    return verdicts.signature(pair(*targets), fusion, chosen, ANYWHERE, setting)


ATEN = torch.ops.aten


def test_a_signature_covers_the_implementation_and_the_setting():
    one = signature(Toy(), ATEN.sin.default, ATEN.cos.default)
    assert one == signature(Toy(), ATEN.sin.default, ATEN.cos.default)
    assert one[1]
    kernels = [[Implementation("triton", torch.sin, version=v)] for v in "ab"]
    others = [signature(Toy(), ATEN.sin.default, ATEN.cos.default, chosen=k)[0] for k in kernels]
    others += [signature(Toy(), ATEN.sin.default, ATEN.cos.default, setting=("strict", 0))[0]]
    others += [signature(Toy(), ATEN.sin.default, ATEN.tan.default)[0], one[0]]
    assert len(set(others)) == 5


def test_a_signature_covers_the_files_of_base_classes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    base = "from fxopt import Fusion\nclass Base(Fusion):\n    def rewrite(self, match): ...\n"
    (tmp_path / "toy_base.py").write_text(base)
    (tmp_path / "toy_fusion.py").write_text(
        "import toy_base\nclass Mine(toy_base.Base):\n    def find(self, node, scope): ...\n"
    )
    versions = []
    for text in (base, base + "# edited\n"):
        (tmp_path / "toy_base.py").write_text(text)
        for name in ("toy_base", "toy_fusion"):
            sys.modules.pop(name, None)
        versions.append(__import__("toy_fusion").Mine.source_version)
    assert versions[0] != versions[1]


def test_a_class_is_known_by_its_file_as_it_was_when_loaded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "toy_loaded.py"
    path.write_text("from fxopt import Fusion\nclass Mine(Fusion):\n    pass\n")
    loaded = __import__("toy_loaded").Mine
    before = loaded.source_version
    path.write_text("nothing of this runs")
    assert loaded.source_version == before


def test_what_only_this_process_can_tell_apart_stays_in_memory():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class WithObject(Toy):
        hook: object = None

    library = torch.library.Library("toy_user_library", "DEF")
    library.define("op(Tensor x) -> Tensor")
    assert signature(WithObject(), ATEN.sin.default)[1]
    assert not signature(WithObject(hook=lambda: 1), ATEN.sin.default)[1]
    assert not signature(Toy(), torch.ops.toy_user_library.op.default)[1]
    assert signature(Toy(), symbolic_trace)[1]
    assert not signature(Toy(), digest)[1]


def typed(text, **names):
    """What a notebook makes of `text`: code without a file."""
    scope = {"__name__": "__main__", "torch": torch, "fused_op": fused_op, "Fusion": Fusion, **names}
    exec(compile(text, "<cell 1>", "exec"), scope)
    return scope


OP_CELL = '@fused_op("typed_op(Tensor x) -> Tensor")\ndef typed_op(x):\n    return x\n'


def test_an_op_typed_into_a_notebook_is_new_each_time():
    first, second = (typed(OP_CELL)["typed_op"] for _ in range(2))
    assert first.overload is not second.overload
    assert not signature(Toy(), first.overload)[1]


def test_a_fusion_typed_into_a_notebook_has_no_version(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert typed("class Mine(Fusion): pass")["Mine"].source_version is None


def test_code_is_found_through_decorators_and_partials():
    from functools import partial

    assert (
        defining_file(torch.no_grad()(digest)) == defining_file(digest) == Path(digest.__code__.co_filename).resolve()
    )
    assert defining_file(partial(digest, [])) == defining_file(digest)
    assert defining_file(Toy) == Path(__file__).resolve()
    assert defining_file(typed("def f(): pass")["f"]) is None


def test_sources_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match=r"'template\.py', which is not a file"):
        fused_op("cached_missing(Tensor x) -> Tensor", sources=["template.py"])(lambda x: x)


def test_a_fake_in_a_file_that_nobody_named_is_an_error():
    op = fused_op("cached_stray(Tensor x) -> Tensor")(lambda x: x)
    with pytest.raises(ValueError, match=r"sources\.py: name it in the op's sources="):
        op.fake(digest)


def test_the_bundled_ops_name_all_files_of_ours_that_they_are_written_in():
    folder = Path(importlib.import_module("fxopt.kernels._triton").__file__).resolve().parent
    ops = {}
    for path in sorted(folder.glob("*.py")):
        module = importlib.import_module(f"fxopt.kernels.{path.stem}")
        ops |= {
            op.name: (op, path) for op in vars(module).values() if isinstance(op, FusedOp) and path in op.sources[:1]
        }
    assert len(ops) >= 6
    for name, (op, path) in ops.items():
        assert written_in(path) <= set(op.sources), name


def written_in(path):
    """The file and those of its folder that it imports, directly or not."""
    needed, pending = set(), [path]
    while pending:
        path = pending.pop()
        if path in needed:
            continue
        needed.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fxopt.kernels"):
                stems = [node.module.removeprefix("fxopt.kernels").strip("."), *(a.name for a in node.names)]
                pending += [p for stem in stems if (p := path.parent / f"{stem}.py").is_file()]
    return needed
