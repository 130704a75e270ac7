"""After an edit of anything that a compiled graph depends on, no cache of torch's or ours gives the old result."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("_plugins", HERE / "_plugins.py")
plugins = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plugins)


def run(folder, **environment):
    """What `_program.py` prints, run with the plugin in `folder` and caches beside it."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "plugin"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # two edits in one second would share a .pyc
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FXOPT_CACHE_DIR": str(folder / "fxopt"),
        **environment,
    }
    command = [sys.executable, str(HERE / "_program.py"), json.dumps(plugins.PLACES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same programs in three processes: with no caches, with those of the first, and after the edits."""
    folder = tmp_path_factory.mktemp("edits")
    (folder / "plugin").mkdir()
    plugins.write(folder / "plugin", edited=False)
    cold = run(folder, PYTHONHASHSEED="1")
    warm = run(folder, PYTHONHASHSEED="2")
    plugins.write(folder / "plugin", edited=True)
    return cold, warm, run(folder, PYTHONHASHSEED="3")


def expected(place, edited):
    number = 7.0 if edited else 3.0
    if place == "decomposition":
        return (torch.eye(3) * number).tolist()
    factor = {"fusion": 3 * number, "option": 3 * number, "backward": 3.0}.get(place, number)
    return (torch.arange(6.0).reshape(2, 3) * factor).tolist()


@pytest.mark.parametrize("entry", ["first entry", "second entry"])
@pytest.mark.parametrize("place", plugins.PLACES)
def test_a_warm_process_hits_the_cache_and_gives_the_same(runs, place, entry):
    cold, warm, _ = (run[f"{place}, {entry}"] for run in runs)
    assert (cold["hits"], cold["misses"]) == (0, 1)
    assert (warm["hits"], warm["misses"], warm["bypassed"]) == (1, 0, 0)
    for key in ("result", "gradient", "sites", "version", "entry"):
        assert warm[key] == cold[key]
    assert cold["result"] == expected(place, edited=False)
    assert cold["sites"] == {f"cached_{place}": 1}
    assert ("after AOTAutograd" in cold["entry"]) == (entry == "second entry")


@pytest.mark.parametrize("entry", ["first entry", "second entry"])
@pytest.mark.parametrize("place", plugins.PLACES)
def test_an_edit_is_seen(runs, place, entry):
    edited = runs[2][f"{place}, {entry}"]
    assert edited["hits"] == 0
    assert edited["result"] == expected(place, edited=True)


def test_an_edit_of_the_backward_is_seen(runs):
    cold, warm, edited = (run["backward, first entry"]["gradient"] for run in runs)
    assert cold == warm == torch.full((2, 3), 3.0).tolist()
    assert edited == torch.full((2, 3), 7.0).tolist()


@pytest.mark.parametrize("place", [p for p in plugins.PLACES if p != "elsewhere"])
def test_the_op_is_named_after_what_it_is_written_in(runs, place):
    cold, _, edited = (run[f"{place}, first entry"] for run in runs)
    assert cold["version"] != edited["version"]
