"""Whatever state the cache directory is in, a compiled model gives the same sites and the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import fxopt
from fxopt import cachedir
from fxopt.rewrite import verdicts


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cachedir, "_warned", set())
    verdicts.clear()
    yield tmp_path / "cache"
    verdicts.clear()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))
        self.last = torch.nn.RMSNorm(16)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v
        return self.last(x + a.transpose(1, 2).flatten(2))


SITES = {"layer_norm": 1, "attention": 1, "rms_norm": 1}


def compiled():
    """The block's result and sites, compiled anew by a process that knows no verdict yet."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 16)
    torch._dynamo.reset()
    verdicts.clear()
    with fxopt.record() as rec, torch.no_grad():
        return torch.compile(block, backend="fxopt")(x), block(x), rec


def nothing(cache):
    """No state: the directory is made."""


def filled(change):
    def prepare(cache):
        compiled()
        assert len(list(cache.rglob("*.json"))) == 3
        for path in cache.rglob("*.json"):
            change(path)

    return prepare


def swap(path):
    """Every file holds the verdict of another rewrite."""
    other = sorted(path.parent.glob("*.json"))[0 if path != sorted(path.parent.glob("*.json"))[0] else 1]
    path.write_bytes(other.read_bytes())


def other_format(path):
    path.write_text(json.dumps({"format": 2, "verdict": json.loads(path.read_text())}))


def folder_in_place(path):
    path.unlink()
    (path / "below").mkdir(parents=True)


def file_in_place(cache):
    cache.write_text("")


def open_to_others(cache):
    cache.mkdir()
    cache.chmod(0o777)


def read_only(cache):
    (cache / "verdicts").mkdir(parents=True)
    (cache / "verdicts").chmod(0o500)
    cache.chmod(0o700)


STATES = {
    "new": nothing,
    "as left": filled(lambda path: None),
    "empty files": filled(lambda path: path.write_bytes(b"")),
    "truncated": filled(lambda path: path.write_bytes(path.read_bytes()[:20])),
    "noise": filled(lambda path: path.write_bytes(os.urandom(64))),
    "deeply nested": filled(lambda path: path.write_text("[" * 200_000)),
    "huge number": filled(lambda path: path.write_text(path.read_text().replace('"error": ', f'"error": {"9" * 400}'))),
    "other format": filled(other_format),
    "swapped": filled(swap),
    "folders for files": filled(folder_in_place),
    "a file": file_in_place,
    "open to others": open_to_others,
    "read-only": read_only,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.usefixtures("without_inductor")
def test_the_result_does_not_depend_on_the_cache(cache, state):
    STATES[state](cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual, expected, rec = compiled()
    assert rec.counts() == SITES
    assert [site.verdict.status for site in rec.sites] == ["equal"] * 3
    torch.testing.assert_close(actual, expected)
    if (cache / "verdicts").exists():
        (cache / "verdicts").chmod(0o700)


@pytest.mark.usefixtures("without_inductor")
def test_a_full_disk_costs_one_warning(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        actual, expected, rec = compiled()
    assert sum("fxopt" in str(w.message) for w in caught) == 1
    assert rec.counts() == SITES
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("without_inductor")
def test_known_verdicts_are_not_reached_again(cache, monkeypatch):
    compiled()
    verdicts.clear()
    monkeypatch.setattr("fxopt.rewrite.verify.Verifier._check", None)  # calling it would be an error
    assert compiled()[2].counts() == SITES


def test_threads_share_a_directory(cache):
    def work(number):
        for i in range(50):
            verdicts.store(f"{(number + i) % 7:02x}", fxopt.Verdict("equal", str(i), 0.5))
            verdicts.clear()
            found = verdicts.lookup(f"{(number + i) % 7:02x}")
            if found is not None and found.status != "equal":
                wrong.append(found)

    wrong: list = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(p.name for p in (cache / "verdicts").iterdir()) == [f"{n:02x}.json" for n in range(7)]


def test_the_inductor_configuration_and_directory_are_left_alone(cache, monkeypatch, without_inductor):
    import torch._inductor.config as inductor
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    before = inductor.save_config_portable(), os.stat(cache_dir()).st_mode, dict(os.environ)
    compiled()
    assert (inductor.save_config_portable(), os.stat(cache_dir()).st_mode, dict(os.environ)) == before


CHILD = """
import json, sys, time
import torch, fxopt
from torch._dynamo.utils import counters
import torch._inductor.config as inductor
sys.path.insert(0, sys.argv[1])
from test_survival import Block
before = inductor.save_config_portable()
torch.manual_seed(0)
block, x = Block(), torch.randn(2, 5, 16, requires_grad=True)
with fxopt.record() as rec:
    y = torch.compile(block, backend="fxopt")(x)
y.square().sum().backward()
assert inductor.save_config_portable() == before
expected = block(x)
torch.testing.assert_close(y, expected)
print(json.dumps({
    "result": y.tolist(), "gradient": x.grad.tolist(), "sites": rec.counts(),
    "verdicts": [s.verdict.status for s in rec.sites],
    "hits": counters["aot_autograd"]["autograd_cache_hit"], "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "bypassed": counters["aot_autograd"]["autograd_cache_bypass"],
    "graph hits": counters["inductor"]["fxgraph_cache_hit"],
}))
"""


def start(folder, seed):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FXOPT_CACHE_DIR": str(folder / "fxopt"),
    }
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def outcome(run):
    return {key: run[key] for key in ("result", "gradient", "sites")}


@pytest.mark.slow
def test_processes_that_start_at_once_and_one_that_follows(tmp_path):
    """Three fill one cache at the same time; a fourth finds all of it; a fifth finds it damaged."""
    first, *others = [finish(p) for p in [start(tmp_path, seed) for seed in range(3)]]
    assert first["sites"] == SITES
    assert first["verdicts"] == ["equal"] * 3
    assert [outcome(o) for o in others] == [outcome(first)] * 2
    warm = finish(start(tmp_path, 3))
    assert (warm["hits"], warm["misses"], warm["bypassed"], warm["graph hits"]) == (1, 0, 0, 2)
    assert outcome(warm) == outcome(first)
    for path in [*tmp_path.glob("fxopt/**/*.json"), *tmp_path.glob("inductor/aotautograd/**/*"),
                 *tmp_path.glob("inductor/fxgraph/**/*")]:  # fmt: skip
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    damaged = finish(start(tmp_path, 4))
    assert damaged["hits"] == 0
    assert outcome(damaged) == outcome(first)
