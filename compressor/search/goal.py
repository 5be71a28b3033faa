"""What counts as good: the metric's budget, and the cost that is to be small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.config import Config
from compressor.errors import CompressorError
from compressor.interfaces.metrics import check_delta
from compressor.result import Cost, VariantRecord
from compressor.units import gain_text

RESOURCES = {
    "compression": "size_bytes",
    "quantization": "size_bytes",
    "latency": "latency_ms",
    "macs": "macs",
}


@dataclass(frozen=True)
class Goal:
    """What counts as good.

    Attributes:
        key: name of the metric.
        reference: its value for the reference.
        delta: drop that is tolerated, on the metric's scale.
        is_larger_better: False for errors and losses.
        resource: entry of `Cost` that is to be small.
        limits: further entries of `Cost` with upper bounds.
        also: further entries of `Cost` that are to be small.
        weights: of `resource` and of those in `also` in the objective, their sum; of one resource
            alone it is 1, of several each is the reciprocal of the reference's cost.
        reference_cost: what savings are told against; None tells of none.
    """

    key: str
    reference: float
    delta: float
    is_larger_better: bool
    resource: str
    limits: tuple[tuple[str, float], ...] = ()
    also: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    reference_cost: Cost | None = None

    @property
    def resources(self) -> tuple[str, ...]:
        """All that are to be small."""
        return (self.resource, *self.also)

    @property
    def bound(self) -> float:
        """The worst value of the metric that is within delta."""
        return self.reference + (-self.delta if self.is_larger_better else self.delta)

    @property
    def delta_fraction(self) -> float:
        """Delta as a fraction of the reference's metric."""
        return self.delta / max(abs(self.reference), self.delta)

    def drop(self, record: VariantRecord) -> float:
        """How much worse than the reference; negative is better; infinite for a failed variant."""
        if record.status != "done":
            return math.inf
        change = self.reference - record.metrics[self.key]
        return change if self.is_larger_better else -change

    def holds(self, record: VariantRecord) -> bool:
        """Within delta."""
        return self.drop(record) <= self.delta

    def meets_limits(self, record: VariantRecord) -> bool:
        """Within every bound of the budget."""
        return record.cost is not None and all(
            getattr(record.cost, name) <= bound for name, bound in self.limits
        )

    def value(self, cost: Cost) -> float:
        """The objective."""
        pairs = zip(self.resources, self.weights, strict=True)
        return float(sum(weight * getattr(cost, resource) for resource, weight in pairs))

    def objective(self, record: VariantRecord) -> float:
        """Of a variant; infinite for a failed one."""
        return math.inf if record.cost is None else self.value(record.cost)

    def gain(self, cost: Cost) -> str:
        """How much cheaper than the reference a model is, in words: "2.7x faster"."""
        if self.reference_cost is None:
            return ""
        before = self.reference_cost
        return " and ".join(
            gain_text(name, getattr(before, name) / max(getattr(cost, name), 1e-9))
            for name in self.resources
        )

    def describe(self, cost: Cost) -> str:
        """What is to be small, of a model: "latency_ms 1.23, size_bytes 45,678"."""
        values = [(resource, getattr(cost, resource)) for resource in self.resources]
        return ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
            for name, value in values
        )


def make_goal(config: Config, metrics: Mapping[str, float], cost: Cost) -> Goal:
    """What `config` asks for.

    Args:
        config: has delta, objectives and budget.
        metrics: of the reference.
        cost: of the reference.

    Raises:
        CompressorError: if delta would accept every model.
    """
    key = config.eval_key or next(iter(metrics))
    is_larger_better = config.metric_mode == "max"
    check_delta(config.delta, key, metrics[key], is_larger_better=is_larger_better)
    budget = config.budget
    limits = {"latency_ms": budget.latency_ms, "size_bytes": budget.size_bytes, "macs": budget.macs}
    resource = RESOURCES[config.optimization]
    also = [RESOURCES[word] for word in config.also_optimize]
    others = tuple(name for name in dict.fromkeys(also) if name != resource)
    shares = tuple(1 / max(getattr(cost, name), 1e-9) for name in (resource, *others))
    return Goal(
        key=key,
        reference=metrics[key],
        delta=config.delta,
        is_larger_better=is_larger_better,
        resource=resource,
        limits=tuple((name, bound) for name, bound in limits.items() if bound is not None),
        also=others,
        weights=shares if others else (1.0,),
        reference_cost=cost,
    )


def best_record(goal: Goal, records: Sequence[VariantRecord]) -> VariantRecord | None:
    """The cheapest within delta; of those that also meet the limits, if any does."""
    within = [r for r in records if r.cost is not None and goal.holds(r)]
    fitting = [r for r in within if goal.meets_limits(r)] or within
    return min(fitting, key=lambda r: goal.value(_cost(r)), default=None)


def best_fitting(goal: Goal, records: Sequence[VariantRecord]) -> VariantRecord | None:
    """The cheapest within delta and within every limit; None if there is none."""
    best = best_record(goal, records)
    return best if best is not None and goal.meets_limits(best) else None


def frontier(goal: Goal, records: Sequence[VariantRecord]) -> list[VariantRecord]:
    """The records that no other beats in every cost that counts and in the metric, cheapest first.

    Another beats one if it is nowhere worse and somewhere better.
    """
    done = [r for r in records if r.cost is not None]

    def measures(record: VariantRecord) -> tuple[float, ...]:
        cost = _cost(record)
        return (*(float(getattr(cost, name)) for name in goal.resources), goal.drop(record))

    kept: list[VariantRecord] = []
    for record in sorted(done, key=lambda r: (goal.value(_cost(r)), goal.drop(r))):
        mine = measures(record)
        others = [measures(other) for other in kept]
        if not any(all(a <= b for a, b in zip(other, mine, strict=True)) for other in others):
            kept.append(record)
    return kept


def _cost(record: VariantRecord) -> Cost:
    if record.cost is None:
        raise CompressorError(f"Variant {record.id} has no cost: {record.reason}.")
    return record.cost
