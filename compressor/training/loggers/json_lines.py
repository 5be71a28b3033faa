"""Values in a text file: one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.training.loggers.base import Logger, is_first_process
from compressor.training.loggers.memory import InMemoryLogger


class JsonLinesLogger(Logger):
    """Appends lines to a file: `{"step": 8, "metrics": {"accuracy": 0.5}}`.

    Each line is written whole and at once, and the file is closed in between: a killed training
    leaves whole lines. What has no number in JSON is one of the strings "NaN", "Infinity" and
    "-Infinity", as in JSON of protocol buffers. Hyperparameters are a line
    `{"hyperparameters": {...}}`. `read_json_lines` reads it all.

    The file is of one training. A resumed one goes on where the checkpoint was written, and cuts
    what comes after. A new one moves the file of an earlier one aside: `metrics.jsonl` becomes
    `metrics.1.jsonl`.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._size_bytes = 0  # of the lines of this training
        self._is_begun = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write a line."""
        values = {name: _to_json(float(value)) for name, value in metrics.items()}
        self._append({"step": step, "metrics": values})

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write a line."""
        self._append({"hyperparameters": {name: _to_json(value) for name, value in values.items()}})

    def state_dict(self) -> dict[str, Any]:
        """How far the file is."""
        return {"size_bytes": self._size_bytes}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there; the file is cut when there is something to write."""
        self._size_bytes = saved["size_bytes"]
        self._is_begun = False

    def _append(self, document: Mapping[str, Any]) -> None:
        if not is_first_process():
            return
        line = json.dumps(document, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if not self._is_begun:
            self._begin()
        with self.path.open("ab") as file:
            if file.tell() > self._size_bytes:  # lines after a checkpoint, or cut by a full disk
                file.truncate(self._size_bytes)
            file.write(line)
            file.flush()
            self._size_bytes = os.fstat(file.fileno()).st_size

    def _begin(self) -> None:
        self._is_begun = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._size_bytes = 0  # a resumed training may write to another folder
        elif self._size_bytes:
            written = self.path.read_bytes()[: self._size_bytes]
            self._size_bytes = written.rfind(b"\n") + 1
        else:
            _set_aside(self.path)


def read_json_lines(path: str | os.PathLike[str]) -> InMemoryLogger:
    """What a `JsonLinesLogger` has written to `path` so far. A line without its end is left out.

    Raises:
        CheckpointError: if there is no such file, or it has a line that is not of this kind.
    """
    logger = InMemoryLogger()
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no log at {path}. Check the path.") from error
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            document = json.loads(line)
            if "hyperparameters" in document:
                logger.log_hyperparameters(document["hyperparameters"])
            else:
                logger.log(document["metrics"], document["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"Line {number} of {path} is no line of a log. Take it out, or name another file."
            ) from error
    return logger


def _to_json(value: Any) -> Any:
    """JSON has no NaN and no infinity, and readers other than Python's refuse them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _set_aside(path: Path) -> None:
    number = 1
    while (old := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(old)
