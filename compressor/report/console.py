"""The end of a run on the console: before, after, change; the frontier; where the files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.report.words import amount, headline, metric_text, ratio_text, runtime_name
from compressor.result import Certificate, Result, VariantRecord

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
    is_larger_better = result.info.get("config", {}).get("metric_mode", "max") == "max"
    is_good = certificate.within_delta and not result.reason
    line = headline(certificate, is_larger_better=is_larger_better)
    out.print(Text(line, style="bold green" if is_good else "bold yellow"))
    table = Table(title="Compressed" if not result.reason else "Not compressed")
    for column in ("", "reference", "compressed", "change"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows(certificate):
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
    out.print(verdict(certificate), markup=False)
    if len(result.plan):
        out.print(f"Done to it: {result.plan.describe().replace('_', ' ')}.", markup=False)
    if certificate.agreement:
        out.print(str(certificate.agreement), markup=False)
    if result.reason:
        out.print(f"The reference itself is the answer: {result.reason}.", markup=False)
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
        ("size on disk", "size_bytes", c.size_ratio, ("smaller", "larger")),
        ("MACs", "macs", c.macs_ratio, ("fewer", "more")),
        ("parameters", "params", c.params_ratio, ("fewer", "more")),
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
            f"{c.reference_latency_ms:.3f} ms",
            f"{c.latency_ms:.3f} ms",
            ratio_text(c.latency_ratio, "faster", "slower"),
        ),
        *(
            (
                name,
                amount(entry, getattr(c, f"reference_{entry}")),
                amount(entry, getattr(c, entry)),
                ratio_text(ratio, *words),
            )
            for name, entry, ratio, words in costs
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
    """The certificate in a sentence."""
    c = certificate
    within = "within" if c.within_delta else "NOT within"
    runtime = c.target.get("runtime")
    where = "on the exported file" if runtime == "onnxruntime" else f"in {runtime}"
    return (
        f"{c.metric_name} {c.reference_metric:.4g} -> {c.metric:.4g}, {within} delta {c.delta:g}, "
        f"measured {where} (split {c.split!r}, evaluated {c.looks} times in all)."
        f"{_certainty(c)}"
    )


def _certainty(c: Certificate) -> str:
    """What the interval adds to the measured drop; nothing if there is none."""
    if c.interval is None:
        return ""
    low, high = (f"{end + 0.0:.3g}" for end in (c.interval.low, c.interval.high))  # no "-0"
    sure = "all of it is" if c.is_certain else "not all of it is"
    return (
        f" The true drop lies between {low} and {high} ({100 * c.interval.confidence:g} % sure, "
        f"whichever of the {c.interval.looks} variants judged there was chosen): {sure} within "
        "delta."
    )


def _call(c: Certificate) -> str:
    """How it is called there, as far as that is known."""
    parts = [
        f"{c.target[name]} {word}{'' if c.target[name] == 1 else 's'}"
        for name, word in (("threads", "thread"), ("batch_size", "sample"))
        if name in c.target
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _size(path: Path) -> str:
    """Of a file or a folder; "" where it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return amount("size_bytes", sum(sizes)) if sizes else ""
