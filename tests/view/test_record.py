"""Recorders: what they receive, when they listen, and that neither threads nor errors break them."""

from __future__ import annotations

import logging
import threading

import pytest

from fxopt.view.record import forget, publish, record, recording
from fxopt.view.report import GraphReport


def names(report):
    return [graph.name for graph in report.graphs]


def test_receives_while_open():
    publish(GraphReport("before"))
    with record() as rec:
        publish(GraphReport("in"))
    publish(GraphReport("after"))
    assert names(rec) == ["in"]


def test_nested_recorders_all_receive():
    with record() as outer:
        publish(GraphReport("a"))
        with record() as inner, record() as twin:
            publish(GraphReport("b"))
        publish(GraphReport("c"))
    assert (names(outer), names(inner), names(twin)) == (["a", "b", "c"], ["b"], ["b"])


def test_equal_recorders_are_told_apart():
    with record() as outer:
        with record():  # equal to the outer one when it closes: both empty
            pass
        publish(GraphReport("a"))
    assert names(outer) == ["a"]


def test_recording_says_whether_anybody_listens():
    assert not recording()
    with record():
        with record():
            assert recording()
        assert recording()
    assert not recording()


def test_closes_after_an_error():
    with pytest.raises(KeyError), record() as rec:
        raise KeyError
    publish(GraphReport("after"))
    assert names(rec) == []


def test_other_threads_are_heard():
    with record() as rec:
        threads = [
            threading.Thread(target=lambda i=i: [publish(GraphReport(f"{i}.{j}")) for j in range(50)]) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(names(rec)) == sorted(f"{i}.{j}" for i in range(8) for j in range(50))


def test_forget_closes_and_keeps():
    with record() as rec:
        publish(GraphReport("a"))
        forget()
        publish(GraphReport("b"))
    assert names(rec) == ["a"]


def test_counts_and_sites(report):
    assert report.counts() == {"attention": 2}
    assert [s.module for s in report.sites] == ["layers.0.attention", "layers.1.attention"]
    assert len(report.steps) == 4
    assert len(report.misses) == 3


def test_publishing_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="fxopt.view.record"):
        publish(GraphReport("graph 7", reason="vmap"))
    assert "graph 7 passed through: vmap" in caplog.text
