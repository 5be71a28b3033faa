"""What is finally claimed of the exported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from compressor.result import Agreement, Certificate, Cost, Interval, Parity
from compressor.search.goal import Goal
from compressor.search.interval import Paired, drop_interval

SLOWER_RATIO = 0.97  # of latencies; what is nearer to 1 is the noise of timing


class Judged(Protocol):
    """Metrics and cost of a deployed model."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The user's evaluation of it."""

    @property
    def cost(self) -> Cost:
        """Measured on the target."""


def make_certificate(
    goal: Goal,
    reference: Cost,
    reference_metric: float,
    judged: Judged,
    *,
    parity: Parity | None,
    paired: Paired | str,
    agreement: Agreement | None = None,
    target: Mapping[str, Any],
    looks: int,
    split: str,
    notes: Sequence[str],
) -> Certificate:
    """The claim about a deployed file.

    Args:
        goal: what counts.
        reference: cost of the reference, exported to the same target in float32.
        reference_metric: of the reference in torch, on `split`.
        judged: the file to deploy.
        parity: of the float file with the torch model.
        agreement: of the quantized file with its simulation; None if nothing is quantized.
        paired: metrics of the reference and the file on parts of `split`, or why there are none.
        target: where costs were measured.
        looks: how many evaluations on `split` led here, that of the reference among them.
        split: that the metric is of.
        notes: what a reader must know besides.
    """
    metric, before, after = judged.metrics[goal.key], reference, judged.cost
    change = reference_metric - metric
    drop = change if goal.is_larger_better else -change
    interval, why_not = _interval(goal, paired, looks)
    return Certificate(
        metric_name=goal.key,
        metric=metric,
        reference_metric=reference_metric,
        delta=goal.delta,
        within_delta=drop <= goal.delta,
        latency_ratio=before.latency_ms / after.latency_ms,
        size_ratio=before.size_bytes / after.size_bytes,
        macs_ratio=before.macs / max(after.macs, 1),
        params_ratio=before.params / max(after.params, 1),
        latency_ms=after.latency_ms,
        reference_latency_ms=before.latency_ms,
        size_bytes=after.size_bytes,
        reference_size_bytes=before.size_bytes,
        macs=after.macs,
        reference_macs=before.macs,
        params=after.params,
        reference_params=before.params,
        parity=parity,
        agreement=agreement,
        interval=interval,
        target=dict(target),
        looks=looks,
        split=split,
        notes=(*notes, *filter(None, [why_not, _slower(goal, before, after)])),
    )


def _slower(goal: Goal, before: Cost, after: Cost) -> str:
    """That the file costs time, and the way out; "" if it does not."""
    ratio = before.latency_ms / after.latency_ms
    if ratio >= SLOWER_RATIO:
        return ""
    is_timed = "latency_ms" in goal.resources
    other = "" if is_timed else "Write optimization='latency', which takes what saves time; or l"
    return (
        f"The file is slower than the reference: {after.latency_ms:.3g} ms where that takes "
        f"{before.latency_ms:.3g} ms, latency_ratio={ratio:.2f}. {other or 'L'}eave layers in "
        "float that have no faster kernel of integers, with precision 32 in `custom_compression`."
    )


def _interval(goal: Goal, paired: Paired | str, looks: int) -> tuple[Interval | None, str]:
    """Of the drop; None, and why there is none."""
    if isinstance(paired, str):
        return None, paired
    others = max(looks - 1, 1)  # without the reference's
    found = drop_interval(paired, goal.delta, is_larger_better=goal.is_larger_better, looks=others)
    return (None, found) if isinstance(found, str) else (found, "")


def broken_limits(goal: Goal, cost: Cost) -> list[str]:
    """A sentence for each bound of the budget that `cost` exceeds."""
    return [
        f"budget.{name}={bound:g} is not met: {getattr(cost, name):g}. No variant that meets it "
        "kept the metric within delta."
        for name, bound in goal.limits
        if getattr(cost, name) > bound
    ]
