"""How much Python the documentation runs, said in CONTRIBUTING.md by `python -m docs.generate`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRIBUTING = "../CONTRIBUTING.md"  # as the pages of `docs.generate` are named
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
REST = "do more than import names and set options."
SENTENCE = re.compile(rf"^\d+ blocks on \d+ pages {re.escape(REST)}$", re.MULTILINE)


def pages() -> list[Path]:
    """All pages of the documentation, and those of the top level."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def programs(page: Path) -> list[str]:
    """The blocks of Python in a page that do something."""
    return [
        text
        for _, language, text in FENCE.findall(page.read_text())
        if language == "python" and does_something(text)
    ]


def does_something(text: str) -> bool:
    """Whether a block of Python holds more than imports and literals with a name."""
    return not all(map(is_idle, ast.parse(text).body))


def is_idle(line: ast.stmt) -> bool:
    """Whether a statement imports, or gives a literal a name."""
    if isinstance(line, ast.Assign):
        try:
            ast.literal_eval(line.value)
        except ValueError:
            return False
        return True
    return isinstance(line, ast.Import | ast.ImportFrom)


def contributing_page() -> str:
    """CONTRIBUTING.md with the numbers of today.

    Raises:
        ValueError: if the sentence that they stand in is gone.
    """
    counts = [len(programs(page)) for page in pages()]
    sentence = f"{sum(counts)} blocks on {len(counts) - counts.count(0)} pages {REST}"
    text, found = SENTENCE.subn(sentence, (ROOT / "CONTRIBUTING.md").read_text())
    if found != 1:
        raise ValueError(
            f"CONTRIBUTING.md has {found} lines of the form {SENTENCE.pattern!r}. "
            "Write one; its numbers are filled in."
        )
    return text
