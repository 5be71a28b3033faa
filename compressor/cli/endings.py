"""How a command ends: its exit code, and the line that says what to do next."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import typer

from compressor.errors import CompressorError

DONE, FAILED, MISUSED, NOTHING_HELD = 0, 1, 2, 3
INTERRUPTED = 130  # 128 + SIGINT, as shells count
CODES = {
    DONE: "it did what was asked; a run ended with a smaller model within delta",
    FAILED: "it could not; one line says why, and what to do",
    MISUSED: "the command line itself is wrong",
    NOTHING_HELD: "the run ended, and no smaller model is within delta: the reference is the "
    "answer (not under torchrun, which would take it for a crash)",
    INTERRUPTED: "it was interrupted; what is done is kept, and the same command goes on",
}


class Ending:
    """What is said where a command is interrupted.

    Attributes:
        again: the command that goes on.
    """

    def __init__(self, again: str) -> None:
        self.again = again


@contextmanager
def readable_ending(again: str) -> Iterator[Ending]:
    """Turn an expected error into one line and exit code 1, Ctrl-C into advice and 130.

    Args:
        again: the command that goes on where this one stopped; may be changed later.
    """
    ending = Ending(again)
    try:
        yield ending
    except CompressorError as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", err=True, fg=typer.colors.RED)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        typer.secho(f"\nInterrupted. What is done is kept; go on with: {ending.again}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """Inside, whatever prints to stdout prints to stderr, so that stdout holds the answer alone."""
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(redirect_stdout(sys.stderr))
        yield


def print_json(value: Any) -> None:
    """`value` on stdout, for scripts."""
    typer.echo(json.dumps(value, indent=1))


def exit_code(reason: str, *, is_within: bool) -> int:
    """Of a run that ended.

    Args:
        reason: why the reference itself is the answer, or "".
        is_within: whether what is deployed is within delta.
    """
    is_launched = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return DONE if is_launched or (not reason and is_within) else NOTHING_HELD
