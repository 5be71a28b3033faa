"""One page of what every benchmark measured: before and after of each model, charts, every record.

python -m benchmarks.report [--results DIR] [--output DIR] [--add FILE [NAME]]

Reads the records of --results, and writes `benchmarks.md` with its charts as SVG, and
`benchmarks.html`, one file with charts to point at, to --output. --add first copies what a
benchmark wrote with --json to --results, without folders of this machine; NAME tells apart what
one benchmark measured in several ways.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.report_models import KINDS, Outcome, outcomes
from benchmarks.report_page import (
    Block,
    Chart,
    Heading,
    Link,
    Listing,
    Table,
    Words,
    to_html,
    to_markdown,
    write_images,
)
from benchmarks.report_results import Record, Row, keep, read_records

PAGE, HTML = "benchmarks.md", "benchmarks.html"
MOST_ROWS = 40  # of a record's table; the file has them all
DIGEST_LETTERS = 12
UNMEASURED = "–"
INTRODUCTION = (
    "Made by `python -m benchmarks.report` from the records in `docs/results`, which benchmarks "
    "wrote with `--json`. Every figure leads to its record, with command, machine, versions and "
    "seed. PATH is a folder or file of your own. A dash is what the benchmark does not measure."
)
BEFORE_AFTER = (
    "The first row of each record is the model as it was. `×` is the value before over the value "
    "after, within one record; above 1 is better. Latency is of one sample at one thread in ONNX "
    "Runtime. Compare ratios across records, not milliseconds."
)


@dataclass(frozen=True)
class Plot:
    """Which columns of a benchmark's rows are drawn; `by` gives the series."""

    x: str
    y: str
    by: str
    is_logarithmic: bool = False


PLOTS: Mapping[str, Plot] = {
    "group_time": Plot("operations", "s of processor time", "family", is_logarithmic=True),
    "sense_time": Plot("choices", "passes", "family", is_logarithmic=True),
    "search_worlds": Plot("minutes", "part of the ideal saving", "width"),
    "prediction": Plot("allocated, repaired divergence", "accuracy %", ""),
    "certificate": Plot("true drop", "covered %", "samples"),
    "methods": Plot("step time ratio", "recovery gain", "network"),
    "latency_table": Plot("predicted ratio", "measured ratio", "model"),
}


def page(records: Sequence[Record]) -> list[Block]:
    """The whole report."""
    blocks: list[Block] = [Heading(1, "Benchmarks", "benchmarks"), Words(INTRODUCTION)]
    by_model = outcomes(records)
    if by_model:
        blocks += [Heading(2, "Before and after", "before-and-after"), Words(BEFORE_AFTER)]
    for model, found in by_model.items():
        blocks += [Heading(3, model, slug(model)), *model_chart(model, found), model_table(found)]
    for benchmark in dict.fromkeys(record.benchmark for record in records):
        own = [record for record in records if record.benchmark == benchmark]
        blocks += [Heading(2, f"benchmarks.{benchmark}", slug(f"benchmarks.{benchmark}"))]
        blocks += [Words(own[0].about)] if own[0].about else []
        blocks += benchmark_chart(benchmark, own)
        for record in own:
            blocks += section(record)
    return blocks


def model_table(found: Sequence[Outcome]) -> Table:
    """A row for each way to make the model small."""
    titles = (
        "",
        "accuracy %",
        "size",
        "MACs",
        "parameters",
        "memory",
        "latency",
        "minutes",
        "from",
    )
    rows = [
        (
            outcome.row,
            dress(outcome.metric),
            measured(outcome, "size_mb", " MB"),
            measured(outcome, "macs"),
            measured(outcome, "params"),
            measured(outcome, "memory_mib", " MiB"),
            measured(outcome, "latency_ms", " ms"),
            dress(outcome.minutes),
            Link(outcome.record, slug(outcome.record)),
        )
        for outcome in found
    ]
    return Table(titles, rows)


def measured(outcome: Outcome, name: str, unit: str = "") -> str:
    """The value with its unit, and the ratio to the reference in brackets, as far as known."""
    value, ratio = outcome.values.get(name), outcome.ratios.get(name.partition("_")[0])
    times = f"{dress(ratio)}×" if ratio is not None else UNMEASURED
    if value is None:
        return times
    return f"{dress(value)}{unit}" + (f" ({times})" if ratio is not None else "")


def model_chart(model: str, found: Sequence[Outcome]) -> list[Chart]:
    """Accuracy against the latency ratio, where at least two rows have both."""
    kinds = [kind for kind in KINDS if any(outcome.kind == kind for outcome in found)]
    places: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    labels: dict[str, list[str]] = {kind: [] for kind in kinds}
    for outcome in found:
        ratio = outcome.ratios.get("latency")
        if ratio is not None and outcome.metric is not None:
            places[outcome.kind].append((ratio, outcome.metric))
            labels[outcome.kind].append(f"{outcome.row} ({outcome.record})")
    if sum(map(len, places.values())) < 2:
        return []
    caption = f"{model}: accuracy against how many times faster it runs"
    name = f"bench_{slug(model)}"
    return [Chart(name, caption, "times faster", "accuracy %", places, labels)]


def benchmark_chart(benchmark: str, records: Sequence[Record]) -> list[Chart]:
    """What `PLOTS` says of the benchmark, over the rows of all its records."""
    plot = PLOTS.get(benchmark)
    rows = [row for record in records for row in record.rows]
    if plot is None or not rows:
        return []
    places: dict[str, list[tuple[float, float]]] = {}
    labels: dict[str, list[str]] = {}
    for row in rows:
        x, y = row.get(plot.x), row.get(plot.y)
        if isinstance(x, int | float) and isinstance(y, int | float):
            name = f"{plot.by} {row[plot.by]}" if is_number(row.get(plot.by)) else row.get(plot.by)
            places.setdefault(str(name or benchmark), []).append((x, y))
            labels.setdefault(str(name or benchmark), []).append(first_words(row))
    if not places:
        return []
    caption = f"{plot.y} against {plot.x}"
    name = f"bench_{slug(benchmark)}"
    return [Chart(name, caption, plot.x, plot.y, places, labels, plot.is_logarithmic)]


def section(record: Record) -> list[Block]:
    """One record: its rows, its summary, and how it came about."""
    blocks: list[Block] = [Heading(3, record.name, slug(record.name))]
    blocks += [Words(record.note)] if record.note else []
    rows = record.rows
    titles = [title for title in (rows[0] if rows else ()) if is_shown(title, rows)]
    if titles:
        cells = [tuple(cell(title, row.get(title)) for title in titles) for row in rows]
        blocks += [Table(titles, cells[:MOST_ROWS])]
    if len(rows) > MOST_ROWS:
        file = f"results/{record.name}.json"
        blocks += [Words(f"The first {MOST_ROWS} of {len(rows)} rows; `{file}` has all.")]
    return [*blocks, Listing(provenance(record.document))]


def is_shown(title: str, rows: Iterable[Row]) -> bool:
    """Whether a column says anything a table can hold."""
    values = [row.get(title) for row in rows]
    nested = any(isinstance(value, dict | list) for value in values)
    return not nested and any(value not in (None, "") for value in values)


def cell(title: str, value: Any) -> str:
    return str(value)[:DIGEST_LETTERS] if title == "sha256" and value else dress(value)


def provenance(document: Mapping[str, Any]) -> list[str]:
    """Summary, machine, versions, seed, command and minutes, a line each."""
    machine = document["machine"]
    kinds = [machine["cpu"], f"{machine['cores']} cores", *machine["int8_instructions"]]
    kinds += [machine["gpu"]] if machine.get("gpu") else []
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    return [
        *(f"{name}: {dress(value)}" for name, value in document["summary"].items()),
        f"machine: {', '.join(map(str, kinds))}, {machine['system']}",
        f"versions: {', '.join(versions)}",
        f"seed: {document['seed']}",
        f"command: {document['command']}",
        f"minutes: {dress(document['minutes'])}",
    ]


def dress(value: Any) -> str:
    """A value as people read it: three digits, thousands apart, a dash for nothing.

    >>> dress(91.642), dress(0.15311), dress(853018), dress(853018.0), dress(None), dress(True)
    ('91.64', '0.153', '853,018', '853,018', '–', 'yes')
    """
    if value is None or value == "" or value != value:
        return UNMEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not (value.is_integer() and abs(value) >= 1000):
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,.0f}" if is_number(value) else str(value)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def first_words(row: Row) -> str:
    """What a row calls itself: its columns of words."""
    return ", ".join(value for value in row.values() if isinstance(value, str) and value)


def slug(words: str) -> str:
    """The anchor that Markdown gives to a heading.

    >>> slug("benchmarks.versus"), slug("Before and after"), slug("versus_resnet20")
    ('benchmarksversus', 'before-and-after', 'versus_resnet20')
    """
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    docs = ROOT / "docs"
    parser.add_argument("--results", type=Path, default=docs / "results", help="folder of records")
    parser.add_argument("--output", type=Path, default=docs, help="folder of the pages")
    parser.add_argument(
        "--add", nargs="+", metavar=("FILE", "NAME"), help="a record to keep, and what to call it"
    )
    options = parser.parse_args(arguments)
    if options.add:
        print(keep(Path(options.add[0]), options.results, *options.add[1:2]))
    records = read_records(options.results)
    blocks = page(records)
    write_images(blocks, options.output)
    (options.output / PAGE).write_text(to_markdown(blocks))
    (options.output / HTML).write_text(to_html(blocks))
    print(f"{len(records)} records in {options.output / PAGE} and {HTML}")


if __name__ == "__main__":
    main()
