"""What the cache directory is worth: used if it is the user's alone, otherwise left with one warning that helps."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import warnings

import pytest

from fxopt import cachedir
from fxopt.rewrite import verdicts
from fxopt.rewrite.fusion import Verdict

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has access lists")

EQUAL = Verdict("equal", "3 trials", 0.5)


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch):
    """A folder in which the cache directory, `parent / "cache"`, isn't yet."""
    folder = tmp_path / "parent"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv(cachedir.VARIABLE, str(folder / "cache"))
    monkeypatch.setattr(cachedir, "_checked", {})
    monkeypatch.setattr(cachedir, "_warned", set())
    verdicts.clear()
    yield folder
    verdicts.clear()


@pytest.fixture
def give_away(monkeypatch):
    """give_away(path): from now on the path, but nothing that it leads to, belongs to another user."""
    strangers: set[str] = set()
    lstat = os.lstat

    def changed(path, **more):
        found = lstat(path, **more)
        if os.fspath(path) in strangers:
            return os.stat_result([*found[:4], os.geteuid() + 1, *found[5:]])
        return found

    monkeypatch.setattr(os, "lstat", changed)
    return lambda path: strangers.add(str(path))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def refused(match):
    """The directory is refused, once with a warning that says why and what to do, then in silence."""
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert cachedir.cachedir("verdicts") is None
    assert cachedir.VARIABLE in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cachedir.cachedir("verdicts") is None
    return True


def test_one_warning_for_all_folders_in_it(parent):
    parent.chmod(0o777)
    with pytest.warns(RuntimeWarning) as caught:
        found = [cachedir.cachedir(name) for name in ("verdicts", "repro")]
    assert found == [None, None]
    assert len(caught) == 1


def test_it_is_made_closed_to_others_with_all_that_is_missing_above(parent, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, str(parent / "a" / "b"))
    umask = os.umask(0)
    try:
        assert cachedir.cachedir("verdicts") == parent / "a" / "b" / "verdicts"
    finally:
        os.umask(umask)
    assert {mode(p) for p in (parent / "a", parent / "a" / "b", parent / "a" / "b" / "verdicts")} == {0o700}


def test_a_parent_with_the_sticky_bit_is_safe(parent):
    parent.chmod(0o1777)  # as /tmp is
    assert cachedir.cachedir() == parent / "cache"


@pytest.mark.parametrize("bits", [0o777, 0o757])
def test_a_parent_in_which_others_can_rename_is_not(parent, bits):
    parent.chmod(bits)
    assert refused(f"others can write to {parent} .*another directory in its place.*chmod go-w {parent}")


@pytest.mark.parametrize("members, known", [([], True), (["eve"], False)])
def test_a_parent_of_the_users_private_group(parent, monkeypatch, members, known):
    grp, pwd = pytest.importorskip("grp"), pytest.importorskip("pwd")
    group = parent.stat().st_gid
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(("me", "x", 1, group, "", "", "")))
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("me", "x", group, members)))
    parent.chmod(0o775)
    assert cachedir.cachedir() == parent / "cache" if known else refused("others can write to")


def test_a_parent_of_another_user(parent, give_away):
    give_away(parent)
    assert refused(f"{parent} belongs to user {os.geteuid() + 1}, who could put another")


def test_a_folder_inside_that_is_another_users(parent, give_away):
    (parent / "cache" / "verdicts").mkdir(parents=True, mode=0o700)
    (parent / "cache").chmod(0o700)
    give_away(parent / "cache" / "verdicts")
    assert refused("verdicts: it belongs to user")


def test_a_link_of_the_user(parent):
    (parent / "real").mkdir(mode=0o700)
    (parent / "cache").symlink_to(parent / "real")
    assert cachedir.cachedir("verdicts") == parent / "real" / "verdicts"


def test_a_link_of_the_user_to_a_place_that_is_open(parent):
    (parent / "real").mkdir()
    (parent / "real").chmod(0o777)
    (parent / "cache").symlink_to(parent / "real")
    assert refused("others can write to it")


def test_a_link_that_another_user_set(parent, give_away):
    (parent / "real").mkdir(mode=0o700)
    (parent / "cache").symlink_to(parent / "real")
    give_away(parent / "cache")
    assert refused(f"the link {parent / 'cache'} belongs to user")


def test_a_link_in_place_of_a_folder_inside(parent):
    (parent / "cache").mkdir(mode=0o700)
    (parent / "elsewhere").mkdir(mode=0o700)
    (parent / "cache" / "verdicts").symlink_to(parent / "elsewhere")
    assert refused("not a directory")


@pytest.mark.parametrize("target", ["cache", "nowhere/at all"])
def test_links_that_lead_nowhere(parent, target):
    (parent / "cache").symlink_to(parent / target)
    with pytest.warns(RuntimeWarning, match="memory only"):
        assert cachedir.cachedir() is None


def test_a_link_that_is_set_anew_is_checked_anew(parent):
    for name, bits in (("good", 0o700), ("open", 0o777)):
        (parent / name).mkdir()
        (parent / name).chmod(bits)
    (parent / "cache").symlink_to(parent / "good")
    assert cachedir.cachedir() == parent / "good"
    (parent / "cache").unlink()
    (parent / "cache").symlink_to(parent / "open")
    assert cachedir.cachedir() == parent / "good"  # where it led when it was trusted


def test_a_directory_opened_to_others_while_the_process_runs(parent):
    verdicts.store("aa", EQUAL)
    verdicts.clear()
    (parent / "cache" / "verdicts").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write to it"):
        assert verdicts.lookup("aa") is None


def test_a_directory_replaced_while_the_process_runs(parent):
    verdicts.store("aa", EQUAL)
    verdicts.clear()
    (parent / "cache").rename(parent / "old")
    (parent / "cache" / "verdicts").mkdir(parents=True)
    (parent / "cache").chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others can write to it"):
        assert verdicts.lookup("aa") is None


def test_once_put_right_it_is_used_again(parent):
    parent.chmod(0o777)
    assert refused("others can write")
    parent.chmod(0o755)
    assert cachedir.cachedir() == parent / "cache"


@pytest.mark.parametrize("bits", [0o620, 0o602, 0o666])
def test_a_file_planted_while_the_directory_was_open_is_not_read(parent, bits):
    verdicts.store("aa", EQUAL)
    verdicts.clear()
    (parent / "cache" / "verdicts" / "aa.json").chmod(bits)
    assert verdicts.lookup("aa") is None


def test_a_file_of_another_user_is_not_read(parent, monkeypatch):
    verdicts.store("aa", EQUAL)
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result([*fstat(fd)[:4], os.geteuid() + 1, *fstat(fd)[5:]]))
    assert cachedir.read(parent / "cache" / "verdicts" / "aa.json") is None


def test_what_is_no_plain_file_is_not_read(parent):
    folder = cachedir.cachedir()
    (folder / "file").write_bytes(b"data")
    (folder / "link").symlink_to(folder / "file")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe", 0o600)  # opened for reading it would wait for a writer
    (folder / "large").write_bytes(bytes(cachedir.LIMIT + 1))
    for path in folder.iterdir():
        path.chmod(0o600, follow_symlinks=True)
    assert cachedir.read(folder / "file") == b"data"
    assert [cachedir.read(folder / name) for name in ("link", "folder", "pipe", "large", "missing")] == [None] * 5


def test_without_a_home_directory(monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, "~nobody-of-that-name/cache")
    assert refused("no home directory")


def test_the_home_directory_is_filled_in(parent, monkeypatch):
    monkeypatch.setenv("HOME", str(parent))
    monkeypatch.setenv(cachedir.VARIABLE, "~/cache")
    assert cachedir.cachedir() == parent / "cache"


def test_a_relative_path_follows_the_working_directory(parent, monkeypatch):
    monkeypatch.setenv(cachedir.VARIABLE, "cache")
    for name in ("one", "two"):
        (parent / name).mkdir()
        monkeypatch.chdir(parent / name)
        assert cachedir.cachedir() == parent / name / "cache"


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_a_path_that_can_be_no_directory(parent, monkeypatch, place):
    (parent / "file").write_text("")
    monkeypatch.setenv(cachedir.VARIABLE, str(parent / place))
    with pytest.warns(RuntimeWarning, match="memory only"):
        verdicts.store("aa", EQUAL)
    assert verdicts.lookup("aa") == EQUAL


class Full:
    """A file on a disk that is full."""

    def __init__(self, descriptor, *_):
        os.close(descriptor)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", [(os, "fdopen"), (os, "replace"), (tempfile, "mkstemp"), (os, "mkdir")])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk(parent, monkeypatch, call, code):
    if call != (os, "mkdir"):
        cachedir.cachedir("verdicts")

    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*call, Full if call == (os, "fdopen") else fails)
    with pytest.warns(RuntimeWarning):
        verdicts.store("aa", EQUAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.store("bb", EQUAL)
    monkeypatch.undo()
    assert verdicts.lookup("aa") == EQUAL
    assert [p.name for p in (parent / "cache").rglob("*")] in ([], ["verdicts"])


def test_warnings_that_are_errors_cost_the_cache_only(parent):
    parent.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts.store("aa", EQUAL)
    assert verdicts.lookup("aa") == EQUAL
