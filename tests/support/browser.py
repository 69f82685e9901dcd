"""A real headless browser for the tests of pages: Chromium, driven by Playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from skips import skip_missing

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_SECONDS = 300


def executable() -> str | None:
    """Return the browser: of VIDEOX_BROWSER, else one on PATH. It must play H.264, which Playwright's own does not."""
    return os.environ.get("VIDEOX_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a headless browser; skips the test where there is none."""
    path = executable()
    if path is None or importlib.util.find_spec("playwright") is None:
        skip_missing("Chromium and `pip install playwright`", "report.html in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=1000 * START_SECONDS
        )
        yield found
        found.close()
