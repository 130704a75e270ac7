"""What compiled code is kept under where the rewrite runs below AOTAutograd: all that the rewrite depends on."""

from __future__ import annotations

import sys
import time

import pytest

from fxopt import sources
from fxopt.lower import identity
from fxopt.lower.identity import pass_identity
from fxopt.ops import fused_op, versions

FUSION = """
from dataclasses import dataclass
from fxopt import Fusion

@dataclass(frozen=True)
class Mine(Fusion):
    option: object = None

    def find(self, node, scope): ...
    def rewrite(self, match): ...
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A fusion's class out of a file that, as far as the process knows, was there before it started."""
    identity._own_sources.cache_clear()
    monkeypatch.setattr(sources, "_STARTED", time.time() + 1000)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "identity_plugin.py").write_text(FUSION)
    sys.modules.pop("identity_plugin", None)
    yield __import__("identity_plugin").Mine
    identity._own_sources.cache_clear()


def by_process(monkeypatch, *fusions):
    """Whether another process would know it by another name."""
    here = pass_identity(fusions, ())
    monkeypatch.setattr(identity, "_PROCESS", "another")
    identity._own_sources.cache_clear()
    return pass_identity(fusions, ()) != here


def test_it_is_the_same_in_every_process(plugin, monkeypatch):
    assert not by_process(monkeypatch, plugin(1))


def test_options_and_settings_are_part_of_it(plugin):
    assert len({pass_identity([plugin(1)], ()), pass_identity([plugin(2)], ()), pass_identity([plugin(1)], "x")}) == 3


def test_ops_in_any_file_are_part_of_it(plugin):
    before = pass_identity([plugin()], ())
    op = fused_op("identity_toy(Tensor x) -> Tensor")(lambda x: x)
    with_op = pass_identity([plugin()], ())
    op.implementation("aten")(sys.modules[__name__].by_process)
    op.implementation("elsewhere")(pass_identity)  # any function of another file
    assert len({before, with_op, pass_identity([plugin()], ())}) == 3
    assert str(op.overload) in versions()


def test_an_option_that_only_its_address_tells_from_others(plugin, monkeypatch):
    assert by_process(monkeypatch, plugin(option=lambda: 1))


def test_a_file_edited_since_it_was_loaded(plugin, monkeypatch):
    monkeypatch.setattr(sources, "_STARTED", 0.0)
    assert by_process(monkeypatch, plugin())


def test_a_fusion_without_a_file(plugin, monkeypatch):
    monkeypatch.setattr(plugin, "source_version", None)
    assert by_process(monkeypatch, plugin())
