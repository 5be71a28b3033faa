"""`compressor report`: the page of a finished run, written again from `result.json`."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import typer

from compressor.cli.endings import print_json
from compressor.cli.results import read_run
from compressor.errors import StudyError
from compressor.report.console import render
from compressor.report.html import write_report


def report_run(run_dir: Path, *, to: Path | None, opens: bool, as_json: bool) -> None:
    """Write the page, and print the same in short.

    Args:
        run_dir: of a finished run.
        to: the page; None: report.html in the folder of the run.
        opens: show it in the browser.
        as_json: print the result as JSON instead.

    Raises:
        StudyError: if no run has ended there, or the page cannot be written.
        CheckpointError: if its result is damaged.
    """
    result, values = read_run(run_dir)
    path = to or run_dir / "report.html"
    try:
        write_report(values, path)
    except OSError as error:
        raise StudyError(
            f"The page {path} cannot be written: {error.strerror or error}. Give another place "
            "with --to."
        ) from error
    if as_json:
        print_json({**result.to_json(), "run_dir": str(run_dir), "report": str(path)})
    else:
        render(result)
        typer.echo(f"Written: {path}")
    if opens:
        webbrowser.open(path.resolve().as_uri())
