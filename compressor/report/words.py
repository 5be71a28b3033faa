"""Figures of a run as people read them: numbers with units, ratios, the certificate in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compressor.result import Certificate

RUNTIMES = {"onnxruntime": "ONNX Runtime", "eager": "PyTorch", "inductor": "torch.compile"}
RESOURCES = {
    "latency_ms": "latency",
    "size_bytes": "size",
    "macs": "MACs",
    "params": "parameters",
    "peak_memory_bytes": "peak memory",
}
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PREFIXED = {"size_bytes": "B", "macs": "MACs", "params": "", "peak_memory_bytes": "B"}
UNCHANGED = 0.005  # ratios so near to 1 are
FEWEST_DECIMALS, MOST_DECIMALS = 1, 8


def headline(certificate: Certificate, *, is_larger_better: bool = True) -> str:
    """The certificate in a line: before and after, drop and what it may be, ratios.

    Args:
        certificate: of the exported file.
        is_larger_better: of the metric.
    """
    c = certificate
    before, after = (metric_text(value, c.delta) for value in (c.reference_metric, c.metric))
    parts = (
        f"{before} → {after}",
        change_text(c, is_larger_better=is_larger_better),
        f"{'within' if c.within_delta else 'NOT within'} {_plain(c.delta)}",
        f"{ratio_text(c.latency_ratio, 'faster', 'slower')} in {runtime_name(c.target)}",
        ratio_text(c.size_ratio, "smaller", "larger"),
    )
    return ", ".join(parts)


def change_text(certificate: Certificate, *, is_larger_better: bool = True) -> str:
    """How much the metric changed for the worse, or for the better, and how sure that is.

    What comes after ± is the larger of the distances to the ends of the interval.
    """
    c = certificate
    drop = drop_of(c, is_larger_better=is_larger_better)
    worse, better = ("drop", "gain") if is_larger_better else ("rise", "fall")
    text = f"{worse if drop >= 0 else better} {metric_text(abs(drop), c.delta)}"
    if c.interval is None:
        return text
    reach = max(c.interval.high - drop, drop - c.interval.low)
    return f"{text} ± {significant(reach, 2)}"


def drop_of(certificate: Certificate, *, is_larger_better: bool = True) -> float:
    """How much worse the metric is than the reference's; negative is better."""
    change = certificate.reference_metric - certificate.metric
    return change if is_larger_better else -change


def runtime_name(target: Mapping[str, object]) -> str:
    """What people call the runtime of a target."""
    name = str(target.get("runtime", "the target"))
    return RUNTIMES.get(name, name)


def metric_text(value: float, delta: float) -> str:
    """A value of the metric, with so many decimals that a hundredth of `delta` shows.

    >>> metric_text(0.91637, delta=0.01), metric_text(91.637, delta=1.0)
    ('0.9164', '91.64')
    """
    if not math.isfinite(value):
        return "unknown"
    wanted = 2 - math.ceil(math.log10(delta)) if delta > 0 else 4
    return f"{value:.{min(max(wanted, FEWEST_DECIMALS), MOST_DECIMALS)}f}"


def ratio_text(ratio: float, better: str, worse: str) -> str:
    """A ratio of reference / compressed in words.

    >>> ratio_text(3.142, "faster", "slower"), ratio_text(0.5, "smaller", "larger")
    ('3.1x faster', '2.0x larger')
    >>> ratio_text(1.001, "faster", "slower")
    'not faster'
    """
    if not math.isfinite(ratio) or ratio <= 0:
        return f"unknown times {better}"
    if abs(ratio - 1) < UNCHANGED:
        return f"not {better}"
    is_better = ratio >= 1
    shown = ratio if is_better else 1 / ratio
    digits = 0 if shown >= 99.5 else 1
    return f"{shown:.{digits}f}x {better if is_better else worse}"


def amount(resource: str, value: float | None) -> str:
    """A cost with its unit.

    >>> amount("size_bytes", 66_019), amount("latency_ms", 0.017629), amount("params", None)
    ('66.0 kB', '0.0176 ms', '')
    """
    if value is None or not math.isfinite(value):
        return ""
    if resource == "latency_ms":
        return f"{significant(value, 3)} ms"
    unit = PREFIXED.get(resource, "")
    factor, prefix = next(((f, p) for f, p in UNITS if abs(value) >= f), (1.0, ""))
    number = significant(value / factor, 3) if factor > 1 else f"{value:g}"
    return f"{number} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(8.24), duration(124.1), duration(7_300)
    ('8.2 s', '2 min 4 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def significant(value: float, digits: int) -> str:
    """`value` to so many significant digits, without an exponent where that is readable.

    >>> significant(0.0017629, 2), significant(66.019, 3), significant(1234.5, 2)
    ('0.0018', '66.0', '1234')
    """
    if value == 0 or not math.isfinite(value):
        return f"{abs(value):g}"  # no -0
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return (
        f"{value:.{places}f}"
        if 0 <= places <= 8
        else f"{value:.0f}"
        if places < 0
        else f"{value:.{digits}g}"
    )


def words_of(name: str) -> str:
    """A name of the code as words: "channel_pruning" is "channel pruning"."""
    return name.replace("_", " ")


def _plain(value: float) -> str:
    """A number with a decimal at least, so that 1 is seen to be on the metric's scale."""
    return f"{value:g}" if value != int(value) else f"{value:.1f}"
