"""Values as curves in TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.optional import require
from compressor.training.loggers.base import Logger, is_first_process

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """Writes scalars into event files of a folder, and the hyperparameters as text.

    The folder is of one training: TensorBoard hides what an earlier one wrote there, and of a
    resumed one what came after the checkpoint. Look with `tensorboard --logdir folder`.

    Args:
        folder: is made when there is something to write.

    Raises:
        MissingDependencyError: without the extra "tensorboard".
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require("tensorboard", extra="tensorboard")
        self.folder = Path(folder)
        self._writer: SummaryWriter | None = None
        self._last_step = -1
        self._is_begun = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        if not is_first_process():
            return
        writer = self._open()
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), step)
        writer.flush()  # a killed training leaves all of it; next to the rest it costs nothing
        self._last_step = max(self._last_step, step)

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write a table."""
        if not is_first_process():
            return
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        text = "\n".join(["| name | value |", "|---|---|", *rows])
        writer = self._open()
        writer.add_text("hyperparameters", text, 0)
        writer.flush()

    def close(self) -> None:
        """End the event file; what follows begins another."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """The last step that was logged."""
        return {"last_step": self._last_step}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from there; what was written after it is hidden."""
        self.close()
        self._last_step, self._is_begun = saved["last_step"], False

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            _wait_for_a_name(self.folder)
            purge_step = None if self._is_begun else self._last_step + 1
            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)
            self._is_begun = True
        return self._writer


def _wait_for_a_name(folder: Path) -> None:
    """Return in a second in which no event file was begun yet.

    TensorBoard reads files in the order of their names, which count seconds, and within one of them
    put the tenth of a process before its ninth: it would hide the newer values, not the older ones.
    """
    while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.02)
