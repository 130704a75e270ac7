"""A headless Chromium for tests: the machine's own (`make setup` brings none), so they skip themselves without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[object]:
    """A started browser; skips the test, with what to install, where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (pip install -c constraints.txt playwright)"
    )
    with api.sync_playwright() as started:
        # In a container there are no user namespaces for Chromium's own sandbox; the pages are ours.
        running = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()
