"""Fusions come from entry points, bundled ones too; what can't be loaded is skipped and named."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

from fxopt.rewrite import plugins
from fxopt.rewrite.fusion import Fusion


@dataclass(frozen=True)
class Nothing(Fusion):
    """nothing -> nothing"""

    anchors = (torch.ops.aten.sin.default,)

    def find(self, node, scope):
        return None

    def rewrite(self, match):
        raise AssertionError("never matched")


class FakeDistribution:
    def __init__(self, name):
        self.name = name


class FakeEntryPoint(EntryPoint):
    """An entry point of a distribution that isn't installed."""

    def __init__(self, name, value, distribution, loads):
        super().__init__(name, value, plugins.GROUP)
        vars(self).update(dist=FakeDistribution(distribution), loads=loads)

    def load(self):
        if isinstance(self.loads, Exception):
            raise self.loads
        return self.loads


@pytest.fixture
def installed(monkeypatch):
    def install(*points):
        monkeypatch.setattr(plugins, "entry_points", lambda group: list(points))
        plugins.reload()

    yield install
    monkeypatch.undo()
    plugins.reload()


def test_the_bundled_fusions_are_entry_points():
    plugins.reload()
    found = {r.fusion.name: r.distribution for r in plugins.registered()}
    for name in ("attention", "rms_norm", "layer_norm", "dequant_matmul"):
        assert found[name] == "fxopt"


def test_classes_instances_and_lists_load(installed):
    installed(
        FakeEntryPoint("a", "m:A", "one", Nothing),
        FakeEntryPoint("b", "m:B", "two", []),
    )
    assert {r.fusion.name: r.distribution for r in plugins.registered()} == {"nothing": "one"}


@pytest.mark.parametrize("loads, words", [(ImportError("no such thing"), "no such thing"), (3, "not a Fusion")])
def test_what_cant_be_loaded_is_skipped_with_its_distribution(installed, loads, words):
    installed(FakeEntryPoint("bad", "m:Bad", "broken-dist", loads), FakeEntryPoint("good", "m:G", "z", Nothing))
    with pytest.warns(plugins.PluginWarning, match="'bad' of distribution 'broken-dist'.*" + words):
        assert [r.fusion.name for r in plugins.registered()] == ["nothing"]


def test_two_of_one_name_the_first_stays(installed):
    installed(FakeEntryPoint("x", "m:X", "aaa", Nothing), FakeEntryPoint("y", "m:Y", "bbb", Nothing))
    with pytest.warns(plugins.PluginWarning, match="'bbb'.*there already, from aaa"):
        assert [r.distribution for r in plugins.registered()] == ["aaa"]


def test_register_and_unregister():
    fusion = plugins.register(Nothing())
    assert plugins.fusions()["nothing"] is fusion
    plugins.unregister("nothing")
    assert "nothing" not in plugins.fusions()
    with pytest.raises(TypeError, match="takes a Fusion"):
        plugins.register(Nothing)
