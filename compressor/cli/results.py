"""The finished run in a folder: its result, and the files that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.errors import StudyError
from compressor.result import Result
from compressor.search.finished import read_finished

FILE = "result.json"


def read_run(run_dir: Path) -> tuple[Result, dict[str, Any]]:
    """The result without its model, and all that `result.json` says.

    Files are looked for where the folder is now.

    Raises:
        StudyError: if no run has ended in the folder, or a newer version of this package wrote it.
        CheckpointError: if the file is damaged.
    """
    if not run_dir.is_dir():
        raise StudyError(f"There is no folder {run_dir}. Give the run_dir of a run.")
    if not (run_dir / FILE).exists():
        raise StudyError(
            f"{run_dir} has no {FILE}: no run has ended there. `compressor resume {run_dir}` "
            "goes on with one that was interrupted."
        )
    return read_finished(run_dir / FILE)
