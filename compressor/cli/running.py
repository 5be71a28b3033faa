"""`compressor run` and `resume`: a job from its name to its result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from compressor.cli.endings import DONE, Ending, exit_code, only_json, print_json
from compressor.cli.jobs import JobSpec, kept_job, read_job
from compressor.distributed.launch import is_main_process
from compressor.logs import set_verbosity
from compressor.report.console import render
from compressor.report.words import duration
from compressor.result import Result


def run_job(
    named: str,
    overrides: Mapping[str, Any],
    run_dir: Path | None,
    ending: Ending,
    *,
    is_dryrun: bool,
    as_json: bool,
    is_quiet: bool,
) -> int:
    """Do the job that `named` means; the exit code.

    Args:
        named: a YAML file or a factory; see `read_job`.
        overrides: entries of its configuration.
        run_dir: folder of the run; None: the one it names, or one under runs/.
        ending: is told what goes on from here.
        is_dryrun: every step on two batches; nothing is kept.
        as_json: print the result as JSON, and nothing else on stdout.
        is_quiet: warnings alone, and no view of how far it is.
    """
    return _run(
        read_job(named, overrides),
        run_dir,
        ending,
        is_dryrun=is_dryrun,
        as_json=as_json,
        is_quiet=is_quiet,
    )


def resume_job(run_dir: Path, ending: Ending, *, as_json: bool, is_quiet: bool) -> int:
    """Go on with the run in `run_dir`; the exit code."""
    job = kept_job(run_dir)
    return _run(job, run_dir, ending, is_dryrun=False, as_json=as_json, is_quiet=is_quiet)


def present(result: Result, folder: Path, seconds: float, *, as_json: bool) -> int:
    """Print what came of a run; the exit code."""
    if as_json:
        print_json({**result.to_json(), "run_dir": str(folder)})
    else:
        render(result)
        page = folder / "report.html"
        if page.exists():
            typer.echo(f"Open {page} in a browser to see all of it.")
        typer.echo(f"Took {duration(seconds)}. Everything is in {folder}.")
    return exit_code(result.reason, is_within=result.certificate.within_delta)


def _run(
    job: JobSpec,
    run_dir: Path | None,
    ending: Ending,
    *,
    is_dryrun: bool,
    as_json: bool,
    is_quiet: bool,
) -> int:
    started = time.monotonic()
    is_main = is_main_process()  # the others train with it, and say nothing
    if is_main:
        set_verbosity("warning" if is_quiet else "info")
    with only_json(as_json):
        engine, folder = job.open(run_dir)
        if is_quiet:
            engine.config = replace(engine.config, progress=False)
        if not is_dryrun and is_main:
            job.keep(folder)
            ending.again = f"compressor resume {folder}"
        engine.run(dryrun=is_dryrun)
    result, seconds = engine.result, time.monotonic() - started
    assert result is not None
    if not is_main:
        return exit_code(result.reason, is_within=result.certificate.within_delta)
    if not is_dryrun:
        return present(result, folder, seconds, as_json=as_json)
    if as_json:
        print_json({"dry_run": True, "seconds": seconds, "lost": list(result.lost)})
        return DONE
    typer.echo(f"Every step works on two batches ({duration(seconds)}). Nothing was kept.")
    for sentence in result.lost:
        typer.echo(f"  note: {sentence}")
    return DONE
