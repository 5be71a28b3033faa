"""The finished run in a folder: its result, and the files that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import StudyError
from compressor.result import Result


def read_values(run_dir: Path) -> dict[str, Any]:
    """What `result.json` says.

    Raises:
        StudyError: if no run has ended in the folder, or the file is damaged.
    """
    path = run_dir / "result.json"
    if not run_dir.is_dir():
        raise StudyError(f"There is no folder {run_dir}. Give the run_dir of a run.")
    if not path.exists():
        raise StudyError(
            f"{run_dir} has no result.json: no run has ended there. `compressor resume {run_dir}` "
            "goes on with one that was interrupted."
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise StudyError(
            f"{path} is damaged: {error}. `compressor resume {run_dir}` writes it anew."
        ) from error
    return values


def read_result(values: Mapping[str, Any], run_dir: Path) -> Result:
    """The result without its model; files are looked for where the folder is now.

    Raises:
        StudyError: if a newer version of this package wrote it.
    """
    return Result.from_json({**values, "artifacts": _found(values["artifacts"], run_dir)})


def _found(artifacts: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """Paths by kind; of files that were moved with their folder, where they lie now."""
    found = {}
    for kind, text in artifacts.items():
        path = Path(text)
        for moved in (run_dir / "exports" / path.name, run_dir / path.name):
            if not path.exists() and moved.exists():
                path = moved
        found[kind] = str(path)
    return found
