"""Times of single layers, each measured once on a machine; on disk they outlive the run.

A file has a first line that says what it was measured with, and a line for each layer. Processes
append to it one at a time, so several can share it; a line that a crash cut off is not read.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from compressor.hardware import describe_machine
from compressor.logs import get_logger
from compressor.result import digest

logger = get_logger(__name__)

CACHE_VARIABLE = "COMPRESSOR_CACHE"


def machine_path() -> Path:
    """The table of this machine and these library versions, in the user's cache folder.

    That folder is `$COMPRESSOR_CACHE`, or `compressor` in `$XDG_CACHE_HOME`, or
    `~/.cache/compressor`.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "compressor")
    return Path(folder) / f"layer_latencies-{digest(describe_machine())}.jsonl"


class LayerLatencies:
    """A table from a layer's description to milliseconds, kept in a file or in memory.

    A file that cannot be read, or that another machine or other library versions wrote, is started
    anew; one that cannot be written is done without, with a warning.
    """

    def __init__(self, path: Path | None) -> None:
        """Read nothing yet.

        Args:
            path: such as `machine_path()`; None keeps the table in memory.
        """
        self._path = path
        self._latencies: dict[str, float] = {}
        self._header = b""
        self._read_bytes = 0

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The latency under `key`, measured now if it is not known."""
        if key not in self._latencies:
            self._exchange()
        if key not in self._latencies:
            self._latencies[key] = measure()
            self._exchange(key)
        return self._latencies[key]

    def _exchange(self, key: str | None = None) -> None:
        """Take what the file has and the table has not; give it the entry of `key`."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
                self._read(file)
                if key is not None:
                    file.write(_line([key, self._latencies[key]]))
                    file.flush()
                self._read_bytes = file.tell()
        except OSError as error:
            logger.warning(
                "Layer latencies cannot be kept in %s (%s): the next run measures them again. Set "
                "%s to a folder that can be written.",
                self._path,
                error.strerror or error,
                CACHE_VARIABLE,
            )
            self._path = None

    def _read(self, file: BinaryIO) -> None:
        """What was added since the last time; of a file that is not ours, nothing stays."""
        self._header = self._header or _line({"measured_on": describe_machine()})
        file.seek(0)
        if file.read(len(self._header)) != self._header:
            file.truncate(0)
            file.write(self._header)
            return
        file.seek(max(self._read_bytes, len(self._header)))
        added = file.read()
        if added and not added.endswith(b"\n"):
            file.write(b"\n")
        for line in added.splitlines():
            try:
                key, latency_ms = json.loads(line)
                self._latencies.setdefault(str(key), float(latency_ms))
            except (ValueError, TypeError):
                continue  # measured again


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
