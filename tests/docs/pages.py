"""The pages of the documentation, taken apart: blocks, links, headings, commands."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.code_blocks import FENCE, ROOT, pages, programs

__all__ = ["FENCE", "ROOT", "pages", "programs"]  # of the generator, for the tests
FOLDER = ROOT / "docs"

SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*(?:\([^()]*\))?[^()\s]*)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: its language, its text, and how far in it stands."""

    language: str
    text: str


class Link(NamedTuple):
    """A link or a picture in a page."""

    page: Path
    text: str
    target: str
    is_picture: bool


def name(page: Path) -> str:
    """A page by its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [block.text for block in all_blocks(page) if block.language in languages]


def all_blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    return [Block(match[2], match[3]) for match in FENCE.finditer(page.read_text())]


def links(page: Path) -> list[Link]:
    """Every link of a page, outside of code."""
    prose = SPAN.sub("`code`", FENCE.sub("", page.read_text()))
    return [Link(page, text, target, bool(mark)) for mark, text, target in LINK.findall(prose)]


def anchors(page: Path) -> set[str]:
    """What `page.md#…` may name: its headings, as code hosts and the site spell them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        anchor = slug(heading)
        found.add(anchor if not seen[anchor] else f"{anchor}-{seen[anchor]}")
        seen[anchor] += 1
    return found


def slug(heading: str) -> str:
    """A heading as an anchor.

    >>> slug("Widths that the `code` fixes, and [why](x.md)")
    'widths-that-the-code-fixes-and-why'
    """
    text = LINK.sub(r"\2", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def commands(page: Path) -> Iterator[list[str]]:
    """What a page tells its readers to run: blocks of bash, and `python -m …` in the text."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _words(line)
    for _, span in SPAN.findall(FENCE.sub("", page.read_text())):
        line = " ".join(span.split())
        if re.search(r"\bpython -m [a-z]|^compressor [a-z]|\btorchrun ", line):
            yield from _words(line)


def _words(line: str) -> Iterator[list[str]]:
    """The words of each program in a line, without what is set before it."""
    for part in re.split(r"&&|\|(?!\w)|;", line):
        words = shlex.split(part, comments=True)
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            yield words
