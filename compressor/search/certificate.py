"""What is finally claimed of the exported file, and when a claim means nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from compressor.result import Agreement, Certificate, Cost, Interval, Parity, VariantRecord
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
        looks: how many models' evaluations on `split` led here, the reference among them.
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
    variants = max(looks - 1, 1)  # without the reference
    found = drop_interval(
        paired, goal.delta, is_larger_better=goal.is_larger_better, looks=variants
    )
    return (None, found) if isinstance(found, str) else (found, "")


def broken_limits(goal: Goal, cost: Cost) -> list[str]:
    """A sentence for each bound of the budget that `cost` exceeds."""
    return [
        f"budget.{name}={bound:g} is not met: {getattr(cost, name):g}. No variant that meets it "
        "kept the metric within delta."
        for name, bound in goal.limits
        if getattr(cost, name) > bound
    ]


def explain(
    goal: Goal,
    best: VariantRecord | None,
    reference: Cost,
    records: Sequence[VariantRecord],
    *,
    choices: int,
) -> str:
    """Why the reference itself is the answer; "" where `best` is better.

    Args:
        goal: what counts.
        best: variant within delta, if there is one.
        reference: cost of the reference.
        records: all variants.
        choices: how many were proposed.
    """
    wanted = " and ".join(goal.resources)
    if best is not None and best.cost is not None and len(best.plan):
        if goal.value(best.cost) < goal.value(reference):
            return ""
        return f"no variant within delta has less {wanted} than the reference"
    done = [record for record in records if record.status == "done" and len(record.plan)]
    if not choices:
        return "no technique offers anything on this model and target"
    if not records and goal.limits:
        bounds = ", ".join(f"budget.{name}={bound:g}" for name, bound in goal.limits)
        return (
            f"no plan is predicted to meet {bounds}, or the budget ended before the first variant"
        )
    if not records:
        return (
            f"no plan is predicted to need less {wanted} than the reference, or the budget "
            "ended before the first variant"
        )
    if not done:
        return f"all {len(records)} variants failed; the last: {records[-1].reason}"
    nearest = min(done, key=goal.drop)
    return (
        f"none of {len(done)} variants kept {goal.key!r} within {goal.delta:g} of "
        f"{goal.reference:.4g}; the nearest, {nearest.id}, lost {goal.drop(nearest):.4g}. More "
        "epochs, more data or a larger delta may help"
    )


def conclude(
    goal: Goal, best: VariantRecord | None, records: Sequence[VariantRecord], reason: str
) -> str:
    """What the search came to."""
    if best is None or best.cost is None:
        return f"The reference itself is the answer: {reason}."
    within = sum(goal.holds(record) for record in records)
    return (
        f"Variant {best.id} is taken: of {within} variants within delta, {len(records)} in all, it "
        f"has the least {' and '.join(goal.resources)}."
    )
