"""`compressor report`: the page of a finished run, written again from `result.json`."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import typer

from compressor.cli.endings import print_json
from compressor.cli.results import read_result, read_values
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
        StudyError: if no run has ended there.
    """
    values = read_values(run_dir)
    result = read_result(values, run_dir)
    path = write_report(values, to or run_dir / "report.html")
    if as_json:
        print_json({**result.to_json(), "run_dir": str(run_dir), "report": str(path)})
    else:
        render(result)
        typer.echo(f"Written: {path}")
    if opens:
        webbrowser.open(path.resolve().as_uri())
