"""The end of a run on the console: before, after, change; the frontier; where the files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.report.claims import certainty, headline_of, looked, measured, unchanged, within
from compressor.report.words import metric_text, runtime_name, words_of
from compressor.result import Certificate, Result, VariantRecord
from compressor.units import amount, change_of, name_of, times

if TYPE_CHECKING:
    from rich.console import Console

MOST_VARIANTS = 6  # of the frontier; the page has all


def render(result: Result, console: Console | None = None) -> None:
    """Print the certificate in a line and as a table, then frontier, files, and what was lost."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = console or Console()
    certificate = result.certificate
    is_good = certificate.within_delta and not result.reason
    out.print(Text(headline_of(result), style="bold green" if is_good else "bold yellow"))
    table = Table(title="Compressed" if not result.reason else "Not compressed")
    for column in ("", "reference", "compressed", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows(certificate):
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    out.print(verdict(certificate), markup=False)
    if len(result.plan):
        out.print(f"Done to it: {words_of(result.plan.describe())}.", markup=False)
    if certificate.agreement:
        out.print(str(certificate.agreement), markup=False)
    if result.reason:
        out.print(unchanged(result), markup=False)
    if result.latency_errors:
        out.print(str(result.latency_errors), markup=False)
    if len(result.frontier) > 1:
        others = Table(title="What else there is: no variant beats these")
        for column in ("variant", certificate.metric_name, "latency", "size", "MACs", "epochs"):
            others.add_column(column, justify="left" if column == "variant" else "right")
        for record in result.frontier[:MOST_VARIANTS]:
            others.add_row(*(Text(cell) for cell in variant_row(record, certificate)))
        out.print(others)
    for name, path in result.artifacts.items():
        size = f"{_size(path):>9}"
        out.print(f"  {name:17} {size}  {path}", markup=False, highlight=False, soft_wrap=True)
    for sentence in (*result.lost, *certificate.notes):
        out.print(f"  note: {sentence}", markup=False, soft_wrap=True)


def rows(certificate: Certificate) -> list[tuple[str, str, str, str]]:
    """The table's rows: name, reference, compressed, change."""
    c = certificate
    change = c.metric - c.reference_metric
    sign = "+" if change > 0 else "-" if change < 0 else ""
    costs = (
        ("size_bytes", "size on disk", c.size_ratio),
        ("macs", name_of("macs"), c.macs_ratio),
        ("params", name_of("params"), c.params_ratio),
    )
    return [
        (
            c.metric_name,
            metric_text(c.reference_metric, c.delta),
            metric_text(c.metric, c.delta),
            f"{sign}{metric_text(abs(change), c.delta)}",
        ),
        (
            f"latency in {runtime_name(c.target)}{_call(c)}",
            amount("latency_ms", c.reference_latency_ms),
            amount("latency_ms", c.latency_ms),
            change_of("latency_ms", c.latency_ratio),
        ),
        *(
            (
                name,
                amount(entry, getattr(c, f"reference_{entry}")),
                amount(entry, getattr(c, entry)),
                change_of(entry, ratio),
            )
            for entry, name, ratio in costs
        ),
    ]


def variant_row(record: VariantRecord, certificate: Certificate) -> tuple[str, ...]:
    """One variant of the frontier: name, metric, latency, size, MACs, epochs."""
    metric = record.metrics.get(certificate.metric_name)
    cost = record.cost
    costs = (
        [amount(name, getattr(cost, name)) for name in ("latency_ms", "size_bytes", "macs")]
        if cost is not None
        else ["", "", ""]
    )
    shown = "" if metric is None else metric_text(metric, certificate.delta)
    return record.id, shown, *costs, str(record.epochs)


def verdict(certificate: Certificate) -> str:
    """The certificate in sentences."""
    c = certificate
    before, after = (metric_text(value, c.delta) for value in (c.reference_metric, c.metric))
    first = f"{c.metric_name} {before} -> {after}, {within(c)} delta {c.delta:g}."
    return " ".join(filter(None, (first, measured(c), looked(c), certainty(c))))


def _call(c: Certificate) -> str:
    """How it is called there, as far as that is known."""
    parts = [
        times(c.target[name], word)
        for name, word in (("threads", "thread"), ("batch_size", "sample"))
        if name in c.target
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _size(path: Path) -> str:
    """Of a file or a folder; "" where it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return amount("size_bytes", sum(sizes)) if sizes else ""
