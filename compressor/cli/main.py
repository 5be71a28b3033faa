"""The console program: what works on a job. Torch is loaded when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import compressor
from compressor.cli import looking
from compressor.cli.endings import CODES, readable_ending
from compressor.cli.options import AsJson, JobName, NewRunDir, Overrides, Quiet, RunDir
from compressor.cli.options import again as again_with
from compressor.cli.options import overrides as read_overrides

EXIT_CODES = "\n\n".join(["Exit codes:", *(f"{code}: {said}." for code, said in CODES.items())])

app = typer.Typer(
    name="compressor",
    help="Compress a trained PyTorch model within a metric budget, and certify the exported file.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the program on the arguments of the process."""
    app(prog_name="compressor")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compressor {compressor.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def demo(
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where everything is written, and where a second run goes on. "
            "Default: a folder under runs/ named after the options below.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the training and the search.", min=0)] = 0,
    device: Annotated[
        Literal["cpu", "gpu"],
        typer.Option(help="Where to train and measure.", case_sensitive=False),
    ] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute: less training, a shorter search.")
    ] = False,
) -> None:
    """Train a small residual CNN on real digits, compress it, export and certify it.

    The accuracy may fall by one point at most. Takes under 4 minutes on two cores.
    """
    folder = run_dir or default_run_dir("demo", seed=seed, device=device, quick=quick)
    again = f"compressor demo --run-dir {folder} --seed {seed} --device {device}"
    with readable_ending(again + " --quick" * quick):
        from compressor.cli.demo import run_demo

        code = run_demo(folder, seed=seed, device=device, is_quick=quick)
    raise typer.Exit(code)


@app.command()
def run(
    job: JobName,
    run_dir: NewRunDir = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Every step on two batches: what would fail, fails now."),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress the model of a job, export it and certify the exported file.

    A job file names a factory, its arguments and the configuration; see docs/cli.md. A run that was
    interrupted goes on when the same command is given again, and so does `compressor resume`.
    Several processes: torchrun --nproc_per_node 2 -m compressor run JOB.
    """
    with readable_ending(again_with("run", job, run_dir, set_)) as ending:
        from compressor.cli.running import run_job

        code = run_job(
            job,
            read_overrides(set_),
            run_dir,
            ending,
            is_dryrun=dry_run,
            as_json=as_json,
            is_quiet=quiet,
        )
    raise typer.Exit(code)


@app.command()
def resume(run_dir: RunDir, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Go on with a run that `compressor run` or `demo` began; of a finished one, print the end."""
    with readable_ending(again_with("resume", str(run_dir), None, None)) as ending:
        from compressor.cli.running import resume_job

        code = resume_job(run_dir, ending, as_json=as_json, is_quiet=quiet)
    raise typer.Exit(code)


looking.add_to(app)


def default_run_dir(command: str, *, seed: int, device: str, quick: bool) -> Path:
    """A folder under runs/ of its own for each set of options, so that runs do not mix.

    >>> default_run_dir("demo", seed=3, device="cpu", quick=True).as_posix()
    'runs/demo-quick-seed3'
    """
    marks = [
        command,
        *(["quick"] if quick else []),
        *([f"seed{seed}"] if seed else []),
        *([device] if device != "cpu" else []),
    ]
    return Path("runs", "-".join(marks))
