"""The site is built without a warning, and fetches nothing when it is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import FOLDER, ROOT

pytestmark = pytest.mark.slow

FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?https?:""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a release would build it."""
    folder = tmp_path_factory.mktemp("site")
    config = FOLDER / "site" / "mkdocs.yml"
    command = ["build", "--strict", "--quiet", "--config-file", config, "--site-dir", folder]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # a notice of the theme about itself
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_of_the_documentation_is_on_the_site(site: Path) -> None:
    pages = {page.relative_to(FOLDER).with_suffix(".html") for page in FOLDER.rglob("*.md")}
    missing = sorted(page.as_posix() for page in pages if not (site / page).exists())
    assert not missing


def test_the_reference_is_filled_from_the_docstrings(site: Path) -> None:
    text = (site / "api" / "engine.html").read_text()
    assert "Compresses one model for one target within one budget." in text
    assert ":::" not in text


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetching = {
        page.relative_to(site).as_posix(): found[0]
        for page in site.rglob("*.html")
        if (found := FETCHED.findall(page.read_text()))
    }
    assert not fetching
