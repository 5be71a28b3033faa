"""Before and after, model by model: what every benchmark that makes models small says of them.

A row of a record counts when it has a model, a name, a metric, and a size or a latency. Columns
have other names in other benchmarks; `NAMES` has all of them. The first row of a model in a record
is its reference, and ratios are the reference's value over the row's, above 1 is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report_results import Record, Row

NAMES: Mapping[str, Sequence[str]] = {
    "row": ("row", "method", "network", "variant"),
    "metric": ("accuracy %", "accuracy %, trained", "metric"),
    "size_mb": ("MB", "size MB"),
    "size_ratio": ("size ratio",),
    "macs": ("MACs",),
    "macs_ratio": ("MACs ratio",),
    "params": ("parameters", "params"),
    "params_ratio": ("parameters ratio",),
    "memory_mib": ("peak MiB",),
    "latency_ms": ("ms, batch 1", "ms", "latency ms"),
    "latency_ratio": ("latency ratio, batch 1", "ratio, 1 thread, batch 1", "latency ratio"),
    "minutes": ("minutes",),
    "seconds": ("seconds",),
}
# `peak MiB` of this benchmark is of the process that quantizes, not of the model that runs.
MEMORY_OF_THE_MAKER = ("quantization",)
MODEL = ("model", "case")
OURS = ("ours", "compressor", "this package")
KINDS = ("this package", "others", "reference")
REFERENCES = ("float32", "unpruned", "reference")
SECONDS = 60.0


@dataclass(frozen=True)
class Outcome:
    """One model after one way to make it small; None is what the benchmark did not measure.

    Attributes:
        model: its name in the benchmark.
        row: the way; the reference's has all ratios at 1.
        metric: in percent.
        values: `size_mb`, `macs`, `params`, `memory_mib`, `latency_ms` as far as measured.
        ratios: the same names without units: of the reference's value to this one.
        minutes: it took to make.
        record: where it is from.
    """

    model: str
    row: str
    metric: float | None
    values: Mapping[str, float]
    ratios: Mapping[str, float]
    minutes: float | None
    record: str

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ours, others, reference = KINDS
        if self.row in REFERENCES:
            return reference
        return ours if self.row.startswith(OURS) else others


def outcomes(records: Iterable[Record]) -> dict[str, list[Outcome]]:
    """What there is of each model, in the order of the records."""
    found: dict[str, list[Outcome]] = {}
    for record in records:
        references: dict[str, Row] = {}
        for row in record.rows:
            model = next((row[key] for key in MODEL if key in row), record.option("--model"))
            if model is None or not is_outcome(row):
                continue
            reference = references.setdefault(model, row)
            found.setdefault(model, []).append(outcome(model, row, reference, record))
    return found


def is_outcome(row: Row) -> bool:
    """Whether a row says of a compressed model what it is good for and what it costs."""
    costs = ("size_mb", "size_ratio", "latency_ms", "latency_ratio")
    named = isinstance(value(row, "row"), str) and has(row, "metric")
    return named and any(has(row, cost) for cost in costs)


def outcome(model: str, row: Row, reference: Row, record: Record) -> Outcome:
    """The row in the words of `Outcome`."""
    values, ratios = {}, {}
    for name in ("size_mb", "macs", "params", "memory_mib", "latency_ms"):
        short = name.partition("_")[0]
        if name == "memory_mib" and record.benchmark in MEMORY_OF_THE_MAKER:
            continue
        own, before = number(row, name), number(reference, name)
        given = number(row, f"{short}_ratio")
        if own is not None:
            values[name] = own
        if given is not None:
            ratios[short] = given
        elif own and before is not None:
            ratios[short] = before / own
    seconds = number(row, "seconds")
    minutes = number(row, "minutes")
    if minutes is None and seconds is not None:
        minutes = seconds / SECONDS
    name = ", ".join(str(part) for part in (value(row, "row"), row.get("criterion")) if part)
    metric = number(row, "metric")
    return Outcome(model, name, metric, values, ratios, minutes, record.name)


def has(row: Row, name: str) -> bool:
    return any(key in row for key in NAMES[name])


def value(row: Row, name: str) -> object:
    """What the row has under the first of the column's names that it knows."""
    return next((row[key] for key in NAMES.get(name, ()) if key in row), None)


def number(row: Row, name: str) -> float | None:
    found = value(row, name)
    return float(found) if isinstance(found, int | float) else None
