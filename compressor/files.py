"""Files that are whole or not there: written beside the target, flushed, then renamed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in `path`'s folder, flush it to disk, rename it to `path`.

    A crash at any moment leaves the old file or the new one. The folder is made if it is missing.

    Raises:
        OSError: as it came, with the temporary file removed (a full disk, no permission).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by `parts`, one after another."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as handle:
            for part in parts:
                handle.write(part)

    replace_file(path, write)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, UTF-8."""
    write_bytes(path, text.encode())
