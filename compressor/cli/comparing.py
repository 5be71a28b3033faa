"""`compressor compare`: two runs, a run and its reference, or two ONNX files timed in turn.

A side is the folder of a finished run, "reference" (of the run on the other side) or an ONNX file.
Runs are compared by their certificates; as soon as one side is a file, both are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from compressor.cli.endings import print_json
from compressor.cli.onnx_files import OnnxFile, time_files
from compressor.cli.results import read_run
from compressor.errors import ConfigError, StudyError
from compressor.profiling.tables import align
from compressor.result import Certificate
from compressor.units import amount, name_of, times

REFERENCE = "reference"
# Of a certificate; ratios are first / second: above 1 the second is better.
COSTS = ("latency_ms", "size_bytes", "macs", "params")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as it was given.
        certificate: of the run; None for a file.
        is_reference: what is meant is the reference of the certificate.
        onnx: the file to deploy, or the reference's; None if there is none.
    """

    name: str
    certificate: Certificate | None
    is_reference: bool
    onnx: Path | None

    def value(self, entry: str) -> float:
        """An entry of the certificate."""
        assert self.certificate is not None
        return float(getattr(self.certificate, f"{'reference_' * self.is_reference}{entry}"))


def compare_sides(first: str, second: str, *, threads: int, batch_size: int, as_json: bool) -> None:
    """Print both sides and how the second differs.

    Args:
        first: a run's folder, "reference", or an ONNX file.
        second: another.
        threads: of a call of an ONNX file.
        batch_size: samples in one call of an ONNX file.
        as_json: print JSON.

    Raises:
        ConfigError: for a side that is none of these.
        StudyError: if no run has ended in a folder.
        CheckpointError: if its result is damaged.
        ExportError: if ONNX Runtime cannot run a file.
    """
    sides = open_side(first, beside=second), open_side(second, beside=first)
    if all(side.certificate is not None for side in sides):
        _print_certificates(*sides, as_json=as_json)
        return
    files = {}
    for label, side in zip("ab", sides, strict=True):
        if side.onnx is None:
            raise StudyError(f"{side.name} has no ONNX file to compare. Give the file itself.")
        files[label] = side.onnx
    timed = time_files(files, threads=threads, batch_size=batch_size)
    _print_files(timed, threads=threads, batch_size=batch_size, as_json=as_json)


def open_side(name: str, *, beside: str) -> Side:
    """What `name` means beside the other side.

    Raises:
        ConfigError: if it means nothing.
        StudyError: if no run has ended in the folder.
        CheckpointError: if its result is damaged.
    """
    is_reference = name == REFERENCE and not Path(name).exists()
    path = Path(beside if is_reference else name)
    if path.suffix == ".onnx" and not is_reference:
        if not path.is_file():
            raise ConfigError(f"There is no file {path}. Give a run's folder or an ONNX file.")
        return Side(name, None, False, path)
    if not path.is_dir():
        if is_reference:
            raise ConfigError(
                f"'reference' is that of a run, and {beside!r} is no folder of one. Give a run_dir."
            )
        raise ConfigError(f"{name!r} is neither a run's folder nor an ONNX file. Give one of them.")
    result, _ = read_run(path)
    file = path / REFERENCE / "model_float.onnx" if is_reference else result.artifacts.get("onnx")
    return Side(
        name, result.certificate, is_reference, file if file is not None and file.exists() else None
    )


def _print_certificates(first: Side, second: Side, *, as_json: bool) -> None:
    a, b = first.certificate, second.certificate
    assert a is not None
    assert b is not None
    notes = _notes(a, b)
    ratios = {
        entry: first.value(entry) / second.value(entry) if second.value(entry) else None
        for entry in COSTS
    }
    if as_json:
        sides = {label: _values(side) for label, side in (("a", first), ("b", second))}
        print_json({**sides, "ratios": ratios, "notes": notes})
        return
    change = second.value("metric") - first.value("metric")
    rows = [["", first.name, second.name, ""]]
    metrics = [f"{side.value('metric'):.4g}" for side in (first, second)]
    rows.append([a.metric_name, *metrics, f"{change:+.3g}"])
    for entry in COSTS:
        values = [amount(entry, side.value(entry)) for side in (first, second)]
        ratio = ratios[entry]
        rows.append([name_of(entry), *values, "" if ratio is None else f"{ratio:.2f}x"])
    rows.append(["within delta", _within(first), _within(second), ""])
    typer.echo(align(rows))
    for note in notes:
        typer.echo(f"note: {note}")


def _print_files(
    files: Mapping[str, OnnxFile], *, threads: int, batch_size: int, as_json: bool
) -> None:
    a, b = files["a"], files["b"]
    ratios = {
        "latency_ms": a.timing.best_ms / b.timing.best_ms,
        "size_bytes": a.size_bytes / b.size_bytes,
        "params": a.params / b.params if b.params else None,
    }
    if as_json:
        target = {"runtime": "onnxruntime", "threads": threads, "batch_size": batch_size}
        print_json({"a": a.to_json(), "b": b.to_json(), "ratios": ratios, "target": target})
        return
    rows = [
        ["", a.path.name, b.path.name, "ratio"],
        ["latency", *(f"{file.timing.best_ms:.3f} ms" for file in (a, b))],
        ["  quartiles", *(_quartiles(file) for file in (a, b)), ""],
        ["size", *(amount("size_bytes", file.size_bytes) for file in (a, b))],
        ["values stored", *(amount("params", file.params) for file in (a, b))],
        ["nodes", str(a.nodes), str(b.nodes), ""],
    ]
    for row, ratio in zip((rows[1], rows[3], rows[4]), ratios.values(), strict=True):
        row.append("" if ratio is None else f"{ratio:.2f}x")
    typer.echo(align(rows))
    call = f"{times(threads, 'thread')}, {times(batch_size, 'sample')} a call"
    typer.echo(f"\nTimed in turn: {call}, random inputs.")


def _notes(a: Certificate, b: Certificate) -> list[str]:
    """What makes the two hard to compare."""
    notes = []
    if a.metric_name != b.metric_name or a.split != b.split:
        notes.append(
            f"The metrics differ: {a.metric_name} on {a.split!r}, {b.metric_name} on {b.split!r}."
        )
    if a.reference_params != b.reference_params or a.reference_macs != b.reference_macs:
        notes.append("The references differ: these runs compress different models.")
    if dict(a.target) != dict(b.target):
        notes.append("The targets differ, so the latencies say little about each other.")
    elif a.reference_latency_ms != b.reference_latency_ms:
        notes.append(
            "The latencies were measured in different runs, each beside its own reference; give "
            "the two ONNX files to have them timed in turn."
        )
    return notes


def _values(side: Side) -> dict[str, Any]:
    certificate = side.certificate
    assert certificate is not None
    return {
        "name": side.name,
        "is_reference": side.is_reference,
        **{entry: side.value(entry) for entry in ("metric", *COSTS)},
        "certificate": certificate.to_json(),
    }


def _within(side: Side) -> str:
    assert side.certificate is not None
    if side.is_reference:
        return "is the reference"
    return f"{'yes' if side.certificate.within_delta else 'NO'} ({side.certificate.delta:g})"


def _quartiles(file: OnnxFile) -> str:
    return f"{file.timing.low_ms:.3f} to {file.timing.high_ms:.3f}"
