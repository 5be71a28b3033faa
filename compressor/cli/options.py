"""Options that several commands have, and what they mean."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from compressor.cli.overrides import nest, parse


def _check_overrides(texts: list[str] | None) -> list[str]:
    for text in texts or []:
        try:
            parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return texts or []


JobName: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="job.yaml, package.module:function or path/to/file.py:function.",
        show_default=False,
    ),
]
RunDir: TypeAlias = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.", show_default=False)
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=_check_overrides,
        help="An entry of the configuration, such as budget.minutes=30; arguments.NAME=VALUE is a "
        "keyword of the factory. May be given often.",
        show_default=False,
    ),
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and all else on stderr.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing while it runs, but for warnings.")
]
NewRunDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Where everything is written, and where a second run goes on. Default: the run_dir of "
        "the configuration, or runs/ and the name of the job.",
        show_default=False,
    ),
]


def overrides(texts: Sequence[str] | None) -> dict[str, Any]:
    """What `--set` says, as one mapping."""
    return nest(parse(text) for text in texts or ())


def again(command: str, named: str, run_dir: Path | None, texts: Sequence[str] | None) -> str:
    """The command line that goes on with this one."""
    words = ["compressor", command, named]
    words += ["--run-dir", str(run_dir)] if run_dir is not None else []
    for text in texts or ():
        words += ["--set", text]
    return shlex.join(words)
