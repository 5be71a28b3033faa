"""What the site does to the pages while it is built: folders in the navigation, links outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#]*?)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """Put the pages of a folder where the navigation says `folder/*.md`, sorted.

    A page that is not there is left out. If its name is misspelt, the page that was meant is in no
    navigation, which is a warning.
    """
    config.nav = _expand(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Show a link to a file of the repository that is no page, such as an example, as its name."""
    folder = Path(page.file.abs_src_path).parent
    root = Path(config.docs_dir).resolve()

    def show(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        is_page = target.is_relative_to(root) and files.get_file_from_path(
            target.relative_to(root).as_posix()
        )
        return match[0] if is_page else f"{match[1]} (in the repository)"

    return OUTSIDE.sub(show, markdown)


def _expand(entries: Any, root: Path) -> Any:
    if isinstance(entries, dict):
        return {title: _expand(value, root) for title, value in entries.items()}
    if not isinstance(entries, list):
        return entries
    named = {entry for entry in entries if isinstance(entry, str)}
    expanded: list[Any] = []
    for entry in entries:
        page = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(entry, str) and "*" in entry:
            pages = sorted(path.relative_to(root).as_posix() for path in root.glob(entry))
            expanded += [each for each in pages if each not in named]
        elif not isinstance(page, str) or (root / page).exists():
            expanded.append(_expand(entry, root))
    return expanded
