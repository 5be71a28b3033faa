"""The result that a run left in its folder: read, its files where that is now, and its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.logs import get_logger
from compressor.report.html import write_report
from compressor.result import Result

logger = get_logger(__name__)

REPORT = "report"  # among the artifacts: the page, which lies in the folder itself


def read_finished(path: Path) -> tuple[Result, dict[str, Any]]:
    """The result without its model, and all that the file says.

    Args:
        path: of `result.json`, in the folder of the run.

    Raises:
        CheckpointError: if the file is damaged.
        StudyError: if a newer version of this package wrote it.
    """
    try:
        values = json.loads(path.read_text())
        values = {**values, "artifacts": found_in(path.parent, values["artifacts"])}
        return Result.from_json(values), values
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}. Start the run again with the "
            f"same run_dir, as `compressor resume {path.parent}` does: it is written anew."
        ) from error


def write_page(values: Mapping[str, Any], path: Path) -> None:
    """Write the report of a run; whatever is wrong with it does not cost the result.

    Args:
        values: what `result.json` says, which is written already.
        path: of the page, in the folder of the run.
    """
    try:
        write_report(values, path)
    except Exception as error:  # of plotly, jinja2, a full disk: none of it is about the model
        logger.warning(
            "%s was not written: %s: %s. The result is whole; write the page with "
            "`compressor report %s`",
            path,
            type(error).__name__,
            error,
            path.parent,
        )


def found_in(folder: Path, artifacts: Mapping[str, str]) -> dict[str, str]:
    """Paths by kind, those of files in the folder of the run where that folder is now.

    The folder may have been moved or copied, and the paths may begin in another working directory.

    Args:
        folder: of the run.
        artifacts: as they were written; the page says which folder that was.
    """
    if REPORT not in artifacts:
        return dict(artifacts)
    was = Path(artifacts[REPORT]).parent
    paths = {kind: Path(text) for kind, text in artifacts.items()}
    return {
        kind: str(folder.absolute() / path.relative_to(was) if path.is_relative_to(was) else path)
        for kind, path in paths.items()
    }
