"""What was measured survives in the store; what is broken in it is as good as nothing."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from fxopt.tune import key, store
from fxopt.tune.store import Entry

ENTRY = Entry({"op": "norm", "device": "H1"}, "triton", {"BLOCK": 8}, {"triton BLOCK=8": 1.5}, {"x": "wrong"}, "won")


def test_it_survives_the_process(cache):
    store.save("a", ENTRY)
    store.clear()
    assert store.load("a") == ENTRY
    assert store.load("b") is None


def test_without_a_directory_it_lives_in_memory(monkeypatch):
    monkeypatch.setenv("FXOPT_CACHE_DIR", "")
    store.save("a", ENTRY)
    assert store.load("a") == ENTRY
    store.clear()
    assert store.load("a") is None


def good():
    return json.loads(store._text("a", ENTRY))


@pytest.mark.parametrize("text", [
    b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'"a"', b"[" * 100_000,
    lambda: json.dumps(good())[:-20],
    lambda: json.dumps(good() | {"format": 99}),
    lambda: json.dumps(good() | {"signature": "b"}),
    lambda: json.dumps(good() | {"config": {"BLOCK": 1.5}}),
    lambda: json.dumps(good() | {"config": {"BLOCK": True}}),
    lambda: json.dumps(good() | {"config": None}),
    lambda: json.dumps(good() | {"microseconds": {"a": "NaN"}}),
    lambda: json.dumps({k: v for k, v in good().items() if k != "implementation"}),
])  # fmt: skip
def test_a_broken_file_is_no_file(cache, text):
    store.save("a", ENTRY)
    store.clear()
    data = text().encode() if callable(text) else text
    (cache / "tune" / "a.json").write_bytes(data)
    assert store.load("a") is None
    store.save("a", ENTRY)  # and it is written anew
    store.clear()
    assert store.load("a") == ENTRY


def test_writers_at_once_leave_one_whole_entry(cache):
    entries = [Entry({"op": "x" * 5000}, f"i{i}") for i in range(8)]
    threads = [threading.Thread(target=lambda e=e: [store.save("a", e) for _ in range(20)]) for e in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.clear()
    assert store.load("a") in entries
    assert [f.name for f in (cache / "tune").iterdir()] == ["a.json"]


def test_the_users_measurements_come_before_the_table(tmp_path):
    store.TABLES.mkdir()
    store.save("a", ENTRY)
    store.write_table(store.TABLES / "h1.json", [ENTRY])
    (store.TABLES / "broken.json").write_text('{"entries": [{"format": 1}, 3]}')
    (store.TABLES / "torn.json").write_text('{"entries": [')
    for file in (tmp_path / "cache" / "tune").iterdir():
        file.unlink()
    store.clear()
    shipped = key.portable(ENTRY.key | {"code": "of another version", "software": "of another version"})
    known = store.fingerprint()
    assert store.load("a", shipped) == ENTRY
    assert store.fingerprint() == known
    assert store.load("b", key.portable({"op": "norm", "device": "H2"})) is None
    mine = Entry({"op": "norm"}, "aten")
    store.save("a", mine)
    store.clear()
    assert store.load("a", shipped) == mine


def test_the_fingerprint_changes_with_what_a_table_says():
    """Its keys outlive versions of the package: what they stand for may change under them."""
    store.TABLES.mkdir()
    prints = set()
    for block in (8, 16):
        store.write_table(store.TABLES / "h1.json", [replace(ENTRY, config={"BLOCK": block})])
        store.clear()
        prints.add(store.fingerprint())
    assert len(prints) == 2


def test_the_fingerprint_changes_with_what_is_known_only():
    empty = store.fingerprint()
    store.load("a")
    assert store.fingerprint() == empty
    store.save("a", ENTRY)
    one = store.fingerprint()
    assert one != empty
    store.clear()
    assert store.fingerprint() == one
    store.load("a")
    assert store.fingerprint() == one


def test_the_shipped_tables_can_be_read(monkeypatch):
    from pathlib import Path

    tables = Path(store.__file__).parent / "tables"
    monkeypatch.setattr(store, "TABLES", tables)
    store.clear()
    held = sum(len(json.loads(file.read_text())["entries"]) for file in tables.glob("*.json"))
    assert len(store._tables()) == held > 0
    assert all(entry.microseconds for entry in store._tables().values())
