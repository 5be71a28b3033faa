"""Every link of the documentation leads somewhere, as far as one can say offline."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.docs.pages import FENCE, ROOT, anchors, links, name, pages, slug

DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
LIST_ITEM = re.compile(r"^([-*]|\d+\.) ")


@pytest.mark.parametrize("page", pages(), ids=name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for link in links(page):
        target, _, anchor = link.target.partition("#")
        if urlparse(link.target).scheme or not link.target:
            continue
        path = (page.parent / target).resolve() if target else page
        is_there = path.exists() and path.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors(path)):
            broken.append(link.target)
    assert not broken


def test_links_to_elsewhere_are_well_formed() -> None:
    wrong = []
    for page in pages():
        for link in links(page):
            url = urlparse(link.target)
            if url.scheme and (url.scheme != "https" or "." not in url.netloc):
                wrong.append(f"{name(page)}: {link.target}")
            if not link.target:
                wrong.append(f"{name(page)}: [{link.text}]()")
    assert not wrong


def test_pictures_say_what_they_show() -> None:
    pictures = [link for page in pages() for link in links(page) if link.is_picture]
    assert pictures
    assert not [link.target for link in pictures if len(link.text) < 10]


@pytest.mark.parametrize("page", pages(), ids=name)
def test_lists_begin_after_an_empty_line(page: Path) -> None:
    """The site's Markdown reads them as text otherwise; code hosts do not mind."""
    lines = FENCE.sub("", page.read_text()).splitlines()
    wrong = [
        line
        for before, line in pairwise(lines)
        if LIST_ITEM.match(line)
        and before.strip()
        and not LIST_ITEM.match(before)
        and not before.startswith((" ", "#"))
    ]
    in_items = [line for line in wrong if not _continues_an_item(lines, line)]
    assert not in_items


def _continues_an_item(lines: list[str], line: str) -> bool:
    """Whether the text right above `line` is itself of a list's item, unindented."""
    for before in reversed(lines[: lines.index(line)]):
        if not before.strip():
            return False
        if LIST_ITEM.match(before):
            return True
    return False


def test_an_anchor_is_spelt_as_code_hosts_do() -> None:
    assert slug("What is `measured`, and when?") == "what-is-measured-and-when"
    assert slug("resnet56, 30 minutes: every file") == "resnet56-30-minutes-every-file"
    assert slug("a & b") == "a--b"
