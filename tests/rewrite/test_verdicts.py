"""Verdicts survive a process, and a bad cache directory costs nothing but the cache."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings

import pytest

from fxopt import cachedir
from fxopt.rewrite import verdicts
from fxopt.rewrite.fusion import Verdict

EQUAL = Verdict("equal", "3 trials", 0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    at = os.path.realpath(tmp_path)
    if (objection := cachedir._objection(at, at)) is not None:
        pytest.skip(f"set TMPDIR to a directory of your own: {objection}")
    folder = tmp_path / "cache"
    monkeypatch.setenv(cachedir.VARIABLE, str(folder))
    monkeypatch.setattr(cachedir, "_warned", set())
    verdicts.clear()
    yield folder
    verdicts.clear()


def test_a_verdict_outlives_the_process(cache):
    verdicts.store("aa", EQUAL)
    verdicts.clear()
    assert verdicts.lookup("aa") == EQUAL
    assert verdicts.lookup("bb") is None


@pytest.mark.parametrize("status", ["failed", "unchecked", "meta"])
def test_only_equal_goes_to_disk(cache, status):
    verdicts.store("aa", Verdict(status, "why"))
    assert verdicts.lookup("aa") == Verdict(status, "why")
    verdicts.clear()
    assert verdicts.lookup("aa") is None


def test_memory_only_on_request(cache):
    verdicts.store("aa", EQUAL, disk=False)
    verdicts.clear()
    assert verdicts.lookup("aa") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"signature": "aa"}',
        b'{"signature": "bb", "status": "equal", "detail": "", "error": null}',
        b'{"signature": "aa", "status": "failed", "detail": "", "error": null}',
        b'{"signature": "aa", "status": "equal", "detail": "", "error": "x"}',
        b'{"signature": "aa", "status": "equal", "detail": "", "error": NaN}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(cache, data):
    verdicts.store("aa", EQUAL)
    (cache / "verdicts" / "aa.json").write_bytes(data)
    verdicts.clear()
    assert verdicts.lookup("aa") is None
    verdicts.store("aa", EQUAL)  # and is replaced
    verdicts.clear()
    assert verdicts.lookup("aa") == EQUAL


def test_every_truncation_is_as_good_as_none(cache):
    verdicts.store("aa", EQUAL)
    path = cache / "verdicts" / "aa.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        verdicts.clear()
        assert verdicts.lookup("aa") is None


def test_the_directory_is_private(cache):
    verdicts.store("aa", EQUAL)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused_with_one_warning(cache, mode):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.warns(RuntimeWarning, match="others can write to it"):
        verdicts.store("aa", EQUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.store("bb", EQUAL)
        verdicts.lookup("cc")
    assert verdicts.lookup("aa") == EQUAL
    assert list(cache.iterdir()) == []


def test_a_directory_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert cachedir.cachedir() is None


def test_a_file_where_the_directory_should_be(cache):
    cache.write_text("")
    with pytest.warns(RuntimeWarning, match="memory only"):
        verdicts.store("aa", EQUAL)
    assert verdicts.lookup("aa") == EQUAL


def test_a_failing_write_warns_once_and_leaves_nothing_behind(cache, monkeypatch):
    folder = cachedir.cachedir("verdicts")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        verdicts.store("aa", EQUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.store("bb", EQUAL)
    assert list(folder.iterdir()) == []
    assert verdicts.lookup("aa") == EQUAL


def test_a_read_only_directory(cache, monkeypatch):
    folder = cachedir.cachedir("verdicts")
    folder.chmod(0o500)
    if not hasattr(os, "geteuid") or os.geteuid() == 0:  # root writes to read-only directories

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.warns(RuntimeWarning, match="can't write"):
        verdicts.store("aa", EQUAL)
    folder.chmod(0o700)
    assert verdicts.lookup("aa") == EQUAL  # this process still knows


def test_an_empty_variable_turns_the_disk_off(cache, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.store("aa", EQUAL)
    assert cachedir.cachedir() is None
    assert not cache.exists()


WRITER = """
import sys
import tempfile
from pathlib import Path
from fxopt import cachedir
folder = cachedir.cachedir("verdicts")
for i in range(300):
    data = (str(i % 10) * 5000).encode()
    assert cachedir.write(folder / "aa.json", data)
    found = cachedir.read(folder / "aa.json")
    assert found is not None and len(found) == 5000 and len(set(found)) == 1, found[:20]
"""


def test_concurrent_writers_never_show_a_part(cache):
    command = [sys.executable, "-c", WRITER]
    running = [subprocess.Popen(command, env=os.environ.copy(), stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert [p.name for p in (cache / "verdicts").iterdir()] == ["aa.json"]


def test_the_file_says_what_it_is_about(cache):
    verdicts.store("aa", EQUAL)
    assert json.loads((cache / "verdicts" / "aa.json").read_text())["status"] == "equal"


def test_a_cache_cleared_under_a_running_process_comes_back(cache):
    verdicts.store("aa", EQUAL)
    shutil.rmtree(cache)
    verdicts.store("bb", EQUAL)
    verdicts.clear()
    assert verdicts.lookup("aa") is None
    assert verdicts.lookup("bb") == EQUAL
