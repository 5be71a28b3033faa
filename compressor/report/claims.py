"""The certificate in sentences: the same on the page, on the console and on the card."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.report.words import headline, runtime_name
from compressor.result import Certificate, Result
from compressor.units import times


def claims(result: Result) -> Iterator[str]:
    """What is claimed of the result, and what qualifies it."""
    c = result.certificate
    yield f"{measured(c)} {looked(c)}"
    if c.interval is not None:
        yield certainty(c)
    if c.agreement is not None:
        yield str(c.agreement)
    if c.parity is not None:
        yield parity(c)
    if result.reason:
        yield unchanged(result)
    if result.latency_errors is not None:
        yield str(result.latency_errors)
    yield from c.notes


def is_larger_better(result: Result) -> bool:
    """Of the certificate's metric."""
    mode: object = result.info.get("config", {}).get("metric_mode", "max")
    return mode == "max"


def headline_of(result: Result) -> str:
    """The certificate in a line."""
    return headline(result.certificate, is_larger_better=is_larger_better(result))


def within(c: Certificate) -> str:
    """Whether the measured drop is within delta, a failure as loud as it is."""
    return "within" if c.within_delta else "NOT within"


def measured(c: Certificate) -> str:
    """What the figures are of."""
    where = "on the exported file" if c.target.get("runtime") == "onnxruntime" else "as deployed"
    return f"Metric, latency and size were measured {where}, in {runtime_name(c.target)}."


def looked(c: Certificate) -> str:
    """On which split, and how many evaluations it has seen."""
    return f"The split {c.split!r} was evaluated {times(c.looks)} in all."


def certainty(c: Certificate) -> str:
    """What the interval adds to the measured drop; "" if there is none."""
    if c.interval is None:
        return ""
    low, high = (f"{end + 0.0:.3g}" for end in (c.interval.low, c.interval.high))  # no "-0"
    sure = "all of it" if c.is_certain else "not all of it"
    return (
        f"With {100 * c.interval.confidence:g} % confidence the true drop lies between {low} and "
        f"{high}, {sure} within delta ({c.interval.chunks} parts of the split, both models on "
        f"each; widened for {times(c.interval.looks, 'evaluation')} of compressed models there)."
    )


def parity(c: Certificate) -> str:
    """How far the float file is from the torch model; "" if that is not known."""
    if c.parity is None:
        return ""
    return (
        "The float file's outputs differ from the torch model's by at most "
        f"{c.parity.max_abs_error:.2g} ({c.parity.max_rel_error:.2g} of the largest output), on "
        f"{times(c.parity.samples, 'sample')}."
    )


def unchanged(result: Result) -> str:
    """Why the reference itself is the answer."""
    return f"The reference itself is the answer: {result.reason}."
