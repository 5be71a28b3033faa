"""The console program: commands, options and exit codes. Torch is loaded when a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

import compressor
from compressor.errors import CompressorError

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="compressor",
    help="Compress a trained PyTorch model within a metric budget, and certify the exported file.",
    no_args_is_help=True,
    add_completion=False,
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
    """Options before the command."""  # having them makes `demo` a command, not the whole program


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

        run_demo(folder, seed=seed, device=device, is_quick=quick)


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


@contextmanager
def readable_ending(again: str) -> Iterator[None]:
    """Turn an expected error into one line and exit code 1, Ctrl-C into advice and 130.

    Args:
        again: the command that goes on where this one stopped.
    """
    try:
        yield
    except CompressorError as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.secho(f"\nInterrupted. What is done is kept; go on with: {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
