"""What a run came to as people read it: the metric, its change, the certificate in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compressor.result import Certificate
from compressor.units import change_of, significant

RUNTIMES = {"onnxruntime": "ONNX Runtime", "eager": "PyTorch", "inductor": "torch.compile"}
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
        f"{change_of('latency_ms', c.latency_ratio)} in {runtime_name(c.target)}",
        change_of("size_bytes", c.size_ratio),
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
    >>> metric_text(0.91637, delta=0.05), metric_text(0.91637, delta=0.2)
    ('0.9164', '0.916')
    """
    if not math.isfinite(value):
        return "unknown"
    is_known = math.isfinite(delta) and delta > 0
    wanted = 2 - math.floor(math.log10(delta)) if is_known else 4
    return f"{value:.{min(max(wanted, FEWEST_DECIMALS), MOST_DECIMALS)}f}"


def duration(seconds: float) -> str:
    """A time as people say it; "" where it is not known.

    >>> duration(8.24), duration(124.1), duration(7_300)
    ('8.2 s', '2 min 4 s', '2 h 1 min')
    """
    if not math.isfinite(seconds):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def words_of(name: str) -> str:
    """A name of the code as words: "channel_pruning" is "channel pruning"."""
    return name.replace("_", " ")


def _plain(number: float) -> str:
    """A number with a decimal at least, so that 1 is seen to be on the metric's scale."""
    value = float(number)
    return f"{value:.1f}" if value.is_integer() else f"{value:g}"
