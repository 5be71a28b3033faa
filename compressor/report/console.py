"""The end of a run on the console: before, after, ratio, and where the files are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.result import Certificate, Result

if TYPE_CHECKING:
    from rich.console import Console

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(result: Result, console: Console | None = None) -> None:
    """Print the certificate as a table, then the files, then what could not be done."""
    from rich.console import Console
    from rich.table import Table

    out = console or Console()
    table = Table(title="Compressed" if not result.reason else "Not compressed")
    for column in ("", "reference", "compressed", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows(result.certificate):
        table.add_row(*row)
    out.print(table)
    out.print(verdict(result.certificate), markup=False)
    if result.certificate.agreement:
        out.print(str(result.certificate.agreement), markup=False)
    if result.reason:
        out.print(f"The reference itself is the answer: {result.reason}.", markup=False)
    if result.latency_errors:
        out.print(str(result.latency_errors), markup=False)
    for name, path in result.artifacts.items():
        out.print(f"  {name:17} {path}", markup=False, soft_wrap=True)
    for sentence in (*result.lost, *result.certificate.notes):
        out.print(f"  note: {sentence}", markup=False, soft_wrap=True)


def rows(certificate: Certificate) -> list[tuple[str, str, str, str]]:
    """The table's rows: name, reference, compressed, ratio."""
    c = certificate
    runtime = c.target.get("runtime", "target")
    change = c.metric - c.reference_metric
    return [
        (c.metric_name, f"{c.reference_metric:.4g}", f"{c.metric:.4g}", f"{change:+.3g}"),
        (
            f"latency ({runtime})",
            f"{c.reference_latency_ms:.3f} ms",
            f"{c.latency_ms:.3f} ms",
            f"{c.latency_ratio:.2f}x faster",
        ),
        (
            "size on disk",
            f"{dress(c.reference_size_bytes)}B",
            f"{dress(c.size_bytes)}B",
            f"{c.size_ratio:.2f}x smaller",
        ),
        ("MACs", dress(c.reference_macs), dress(c.macs), f"{c.macs_ratio:.2f}x fewer"),
        ("parameters", dress(c.reference_params), dress(c.params), f"{c.params_ratio:.2f}x fewer"),
    ]


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
    low, high = (f"{end:.3g}" for end in (c.interval.low, c.interval.high))
    sure = "all of it is" if c.is_certain else "not all of it is"
    return (
        f" The true drop lies between {low} and {high} ({100 * c.interval.confidence:g} % sure, "
        f"whichever of the {c.interval.looks} variants judged there was chosen): {sure} within "
        "delta."
    )


def dress(value: float) -> str:
    """A number as people read it.

    >>> dress(1_234_567)
    '1.23 M'
    """
    for factor, unit in UNITS:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "
