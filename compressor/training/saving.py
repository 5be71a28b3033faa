"""When a training writes its checkpoint, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.distributed import Context, run_on_main
from compressor.distributed.agreement import agree
from compressor.training import resume
from compressor.training.checkpoint import LATEST, decode, read_bytes, write_checkpoint
from compressor.training.clock import DurationLike, Every

if TYPE_CHECKING:
    from compressor.training.trainer import Trainer


class Saving:
    """The checkpoint of a training in its folder; of several processes, rank 0 writes and reads.

    Args:
        folder: None writes none.
        interval: between checkpoints.
    """

    def __init__(self, folder: str | Path | None, interval: DurationLike) -> None:
        self.path = None if folder is None else Path(folder) / LATEST
        self.every = Every(interval)

    def find(self, context: Context, path: str | Path | None = None) -> Path | None:
        """The file at `path`, or in the folder `path`, or of this training, if it is there."""
        if path is not None:
            path = Path(path)
            is_folder = run_on_main(context, path.is_dir)
            return path / LATEST if is_folder else path
        if self.path is None or not run_on_main(context, self.path.exists):
            return None
        return self.path

    def save(self, trainer: Trainer) -> None:
        """Write, if there is a folder.

        Raises:
            DivergedRanksError: if the processes do not hold the same model any more.
        """
        if self.path is None:
            return
        context = trainer.context
        agree(context, trainer.model)
        content = resume.state_dict(trainer)
        run_on_main(context, partial(write_checkpoint, self.path, content))


def read_together(context: Context, path: Path) -> Mapping[str, Any]:
    """What the checkpoint at `path` holds, of which only rank 0 needs to see the file.

    Raises:
        CheckpointError: if there is none, or it is truncated or altered.
    """
    return decode(run_on_main(context, partial(read_bytes, path)), path)
