"""A headless Chromium for tests that look at pages, and for the pictures in the docs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH, REQUIRED = "COMPRESSOR_CHROMIUM", "COMPRESSOR_REQUIRE_CHROMIUM"  # of the environment
OPTIONS = (
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MISSING = (
    "No Chromium was found. Install one (apt install chromium), or name its program in the "
    f"environment variable {PATH}."
)


def find_chromium() -> str | None:
    """Path of the program, if there is one."""
    named = os.environ.get(PATH)
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window.

    Raises:
        FileNotFoundError: where there is none; says what to install.
    """
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise FileNotFoundError(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        try:
            yield browser
        finally:
            browser.close()
