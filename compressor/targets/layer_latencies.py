"""Times of single layers, each measured once on a machine; on disk they outlive the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from compressor.files import write_text
from compressor.hardware import describe_machine


class LayerLatencies:
    """A table from a layer's description to milliseconds, kept in a JSON file or in memory.

    A file of another machine or other library versions is started anew.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._machine: dict[str, object] = {}
        self._latencies: dict[str, float] | None = None

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The latency under `key`, measured now if it is not known."""
        if self._latencies is None:
            self._machine = describe_machine()
            self._latencies = self._read()
        if key not in self._latencies:
            self._latencies[key] = measure()
            self._write()
        return self._latencies[key]

    def _read(self) -> dict[str, float]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            is_ours = stored["measured_on"] == self._machine
            return {key: float(ms) for key, ms in stored["latency_ms"].items()} if is_ours else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # a cache that cannot be read is measured again

    def _write(self) -> None:
        if self._path is not None:
            stored = {"measured_on": self._machine, "latency_ms": self._latencies}
            write_text(self._path, json.dumps(stored, indent=1))
