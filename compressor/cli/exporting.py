"""`compressor export`: the files of a finished run; copied, or made again from the saved model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compressor.cli.endings import only_json, print_json
from compressor.cli.jobs import kept_job
from compressor.cli.profiling import example_inputs
from compressor.cli.results import read_run
from compressor.errors import ConfigError, ExportError, StudyError, suggest
from compressor.export.exported_program import save_exported_program
from compressor.export.onnx import export_onnx
from compressor.export.torchscript import save_torchscript
from compressor.files import write_text
from compressor.interfaces.inputs import ModelInputs
from compressor.search.finished import REPORT
from compressor.search.run_dir import open_run_dir
from compressor.structure.archive import load
from compressor.structure.trace import in_eval
from compressor.units import amount

MODEL = "model_dir"  # structure and weights, without pickle
WRITERS: dict[str, tuple[str, Callable[..., Path]]] = {  # of what can be made again
    "onnx_float": ("model_float.onnx", export_onnx),
    "exported_program": ("model.pt2", save_exported_program),
    "torchscript": ("model_torchscript.pt", save_torchscript),
}
TRACED_SAMPLES = 2  # at least, so that an exporter can tell the batch from what is fixed
MOST_SAMPLES = 32


def export_run(run_dir: Path, formats: Sequence[str], to: Path | None, *, as_json: bool) -> None:
    """List the files of a run, or copy those of `formats` to `to`.

    Args:
        run_dir: of a finished run.
        formats: kinds of files; none: all that there are.
        to: folder that they are copied to, and what is missing is made in; None only lists them,
            and what is missing is made in the run, and named in its result.
        as_json: print kinds and paths as JSON.

    Raises:
        ConfigError: for a kind that there is not, and that cannot be made.
        StudyError: if no run has ended there, or what a file is made of is missing.
        CheckpointError: if its result is damaged.
        ExportError: if a folder cannot be written.
    """
    artifacts = dict(read_run(run_dir)[0].artifacts)
    artifacts.pop(REPORT, None)  # a page, not a file to deploy
    known = {*artifacts, *WRITERS}
    for kind in formats:
        if kind not in known:
            raise ConfigError(f"This run has no file {kind!r}. {suggest(kind, known)}")
    there = {kind: path for kind, path in artifacts.items() if path.exists()}
    wanted = list(dict.fromkeys(formats)) or list(there)
    missing = [kind for kind in wanted if kind not in there]
    with only_json(as_json):
        if missing:
            write = _write_in if to is None else partial(_write, folder=to)
            there |= write(run_dir, there, missing)
        files = {kind: there[kind] for kind in wanted}
        if to is not None:
            files = {kind: _copy(path, to) for kind, path in files.items()}
    if as_json:
        print_json({kind: str(path) for kind, path in files.items()})
    else:
        Console().print(_table(files))


def _write_in(run_dir: Path, there: Mapping[str, Path], missing: Sequence[str]) -> dict[str, Path]:
    """Files of the kinds that are missing, as part of the run."""
    with open_run_dir(run_dir) as run:
        made = _write(run_dir, there, missing, run.exports.absolute())
        _, values = read_run(run_dir)
        values["artifacts"] |= {kind: str(path) for kind, path in made.items()}
        write_text(run.result, json.dumps(values, indent=1))
    return made


def _write(
    run_dir: Path, there: Mapping[str, Path], missing: Sequence[str], folder: Path
) -> dict[str, Path]:
    """Files of the kinds that are missing, made from the saved model.

    Raises:
        StudyError: if the job of the run, or its model, is not known.
        ConfigError: if a kind cannot be made.
        ExportError: if it cannot be written there.
    """
    for kind in missing:
        if kind not in WRITERS:
            raise ConfigError(
                f"{kind} is gone from {run_dir}, and is not made from the saved model alone. "
                f"Remove result.json and write `compressor resume {run_dir}`."
            )
    if MODEL not in there:
        raise StudyError(f"The saved model of {run_dir} is gone. Run the job again.")
    engine, _ = kept_job(run_dir).open(run_dir)
    inputs = example_inputs(engine.job)
    size = min(max(inputs.batch_size, TRACED_SAMPLES), MOST_SAMPLES)
    model = in_eval(load(there[MODEL], engine.job.model).cpu())
    inputs = inputs.with_batch(size)
    with _readable(f"Writing to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        return {kind: _written(kind, model, inputs, folder) for kind in missing}


def _written(kind: str, model: object, inputs: ModelInputs, folder: Path) -> Path:
    name, write = WRITERS[kind]
    return write(model, inputs, folder / name)


def _copy(path: Path, to: Path) -> Path:
    copy = to / path.name
    if copy.resolve() == path.resolve():
        return path
    with _readable(f"Copying {path} to {to}"):
        to.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            shutil.copy2(path, copy)
    return copy


@contextmanager
def _readable(doing: str) -> Iterator[None]:
    """What the file system refuses, as an error of ours."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{doing} failed: {error.strerror or error}. Choose another folder with --to."
        ) from error


def _table(files: Mapping[str, Path]) -> Table:
    table = Table("kind", "size", "path", title="Files")
    for kind, path in files.items():
        table.add_row(kind, amount("size_bytes", _size(path)), str(path).replace("[", r"\["))
    return table


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
