"""The console program: what looks at models, runs and this machine. Torch is loaded when needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from compressor.cli.endings import readable_ending
from compressor.cli.options import AsJson, JobName, NewRunDir, Overrides, RunDir, again, overrides

KINDS = ("techniques", "algorithms", "targets")
MOST_ROWS = 30


def add_to(app: typer.Typer) -> None:
    """Add these commands to the program."""
    commands: list[Callable[..., None]] = [profile, compare, sensitivity, export, report]
    for command in commands:
        app.command()(command)
    app.command("list")(list_)
    app.command()(doctor)


def profile(
    job: JobName,
    set_: Overrides = None,
    runtime: Annotated[
        Literal["onnxruntime", "eager", "inductor"] | None,
        typer.Option(help="Where it is timed. Default: the target of the job.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of one call. Default: that of the target.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one call.")] = 1,
    latency: Annotated[bool, typer.Option(help="Whether it is timed.")] = True,
    as_json: AsJson = False,
) -> None:
    """What a model costs: parameters, MACs, bytes, memory, latency; all of it and by layer.

    The factory may be that of a job, or return (model, inputs).
    """
    with readable_ending(again("profile", job, None, set_)):
        from compressor.cli.profiling import profile_job

        profile_job(
            job,
            overrides(set_),
            runtime=runtime,
            threads=threads,
            batch_size=batch_size,
            is_timed=latency,
            as_json=as_json,
        )


def compare(
    first: Annotated[
        str,
        typer.Argument(metavar="A", help='A run\'s folder, an ONNX file, or "reference".'),
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another of these.")],
    threads: Annotated[int, typer.Option(min=1, help="Of a call of an ONNX file.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples in one call of an ONNX file.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Two runs by their certificates, or two ONNX files timed in turn.

    With "reference" for one side it is that of the run on the other. Where one side is an ONNX
    file, the file to deploy of the run on the other side is timed beside it.
    """
    with readable_ending(f"compressor compare {first} {second}"):
        from compressor.cli.comparing import compare_sides

        compare_sides(first, second, threads=threads, batch_size=batch_size, as_json=as_json)


def sensitivity(
    job: JobName,
    run_dir: NewRunDir = None,
    set_: Overrides = None,
    all_: Annotated[
        bool, typer.Option("--all", help=f"All choices, and not the best {MOST_ROWS}.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What each choice of each technique would cost in quality and save; nothing is trained."""
    with readable_ending(again("sensitivity", job, run_dir, set_)):
        from compressor.cli.sensing import sense_job

        most = 0 if all_ else MOST_ROWS
        sense_job(job, overrides(set_), run_dir, most=most, as_json=as_json)


def export(
    run_dir: RunDir,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Kind of file: onnx (the one to deploy), onnx_float, exported_program, "
            "torchscript, model_dir. May be given often. Default: all that were written.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(help="Folder to copy them to. Default: only list them.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The files of a finished run: list them, or copy them out.

    What was not written, or is gone, is made again from the saved model where that suffices.
    """
    with readable_ending(again("export", str(run_dir), None, None)):
        from compressor.cli.exporting import export_run

        export_run(run_dir, format_ or (), to, as_json=as_json)


def report(
    run_dir: RunDir,
    to: Annotated[
        Path | None,
        typer.Option(help="The page. Default: report.html in RUN_DIR.", show_default=False),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of a finished run again, from its result.json."""
    with readable_ending(again("report", str(run_dir), None, None)):
        from compressor.cli.reporting import report_run

        report_run(run_dir, to=to, opens=open_, as_json=as_json)


def list_(
    kind: Annotated[
        Literal["techniques", "algorithms", "targets"] | None,
        typer.Argument(help="What to list. Default: all of it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The techniques, algorithms and targets that there are, from their classes."""
    with readable_ending("compressor list"):
        from compressor.cli.listing import list_kinds

        list_kinds(KINDS if kind is None else (kind,), as_json=as_json)


def doctor(as_json: AsJson = False) -> None:
    """What is installed, what can run on this machine, and what would be faster."""
    with readable_ending("compressor doctor"):
        cores = usable_cores()
        from compressor.cli.doctor import examine_machine

        examine_machine(cores=cores, as_json=as_json)


def usable_cores() -> int:
    """That this process may run on; once torch is loaded it may say all of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
