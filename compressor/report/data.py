"""What the page says, taken from a result: plain values and finished texts, no HTML, no charts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.evidence import Frozen
from compressor.report.claims import headline_of, is_larger_better
from compressor.report.words import change_text, duration, metric_text, runtime_name, words_of
from compressor.result import Plan, Result, VariantRecord
from compressor.units import amount, change_of, damage_text, name_of, times

WITHIN, OUTSIDE, FAILED = "within", "outside", "failed"
COSTS = ("latency_ms", "size_bytes", "macs", "params")


@dataclass(frozen=True)
class Figure:
    """One thing that was measured before and after.

    Attributes:
        name: of it.
        before: of the reference.
        after: of the exported file.
        change: the ratio or the difference, in words.
        is_better: whether the change is what was wanted.
    """

    name: str
    before: str
    after: str
    change: str
    is_better: bool


@dataclass(frozen=True)
class Point:
    """One moment of a variant's training."""

    epoch: float
    metric: float | None
    loss: float | None


@dataclass(frozen=True)
class Variant:
    """One variant as the page shows it.

    Attributes:
        record: what is known of it.
        number: counts from 1, in the order in which they were made.
        verdict: one of `WITHIN`, `OUTSIDE`, `FAILED`.
        drop: of the metric; None of a failed one.
        is_chosen: it is the result.
        curve: of its training and of the variant's that it went on from.
    """

    record: VariantRecord
    number: int
    verdict: str
    drop: float | None
    is_chosen: bool
    curve: tuple[Point, ...]

    @property
    def name(self) -> str:
        """What it is called on the page."""
        return f"Variant {self.number}"


class View:
    """A result, read for the page."""

    def __init__(self, result: Result) -> None:
        """Nothing is written yet."""
        self.result = result
        self.certificate = result.certificate
        config: Mapping[str, Any] = result.info.get("config", {})
        self.config = config
        self.is_larger_better = is_larger_better(result)
        self.variants = tuple(self._variants())

    @property
    def title(self) -> str:
        """In a few words: what came out."""
        if self.result.reason:
            return "Not compressed: the reference itself is the answer"
        c = self.certificate
        faster, smaller = c.latency_ratio, c.size_ratio
        return f"{change_of('latency_ms', faster)}, {change_of('size_bytes', smaller)}"

    @property
    def headline(self) -> str:
        """The certificate in a line."""
        return headline_of(self.result)

    @property
    def verdict(self) -> str:
        """What may be claimed."""
        c = self.certificate
        if not c.within_delta:
            return "Not within delta"
        if self.result.reason:
            return "Nothing better held"
        return "Within delta, for certain" if c.is_certain else "Within delta as measured"

    @property
    def tone(self) -> str:
        """How good that is: "good", "warn" or "bad"."""
        c = self.certificate
        if not c.within_delta:
            return "bad"
        return "good" if c.is_certain and not self.result.reason else "warn"

    def figures(self) -> Iterator[Figure]:
        """Before and after."""
        c = self.certificate
        yield Figure(
            c.metric_name,
            metric_text(c.reference_metric, c.delta),
            metric_text(c.metric, c.delta),
            change_text(c, is_larger_better=self.is_larger_better),
            c.within_delta,
        )
        for resource in COSTS:
            before, after = getattr(c, f"reference_{resource}"), getattr(c, resource)
            ratio = getattr(c, f"{resource.partition('_')[0]}_ratio")
            yield Figure(
                name_of(resource),
                amount(resource, before),
                amount(resource, after),
                change_of(resource, ratio),
                ratio >= 1,
            )

    def sentences(self) -> list[str]:
        """What could not be done, besides what `frozen` has."""
        frozen = {str(each) for each in self.result.frozen}
        return [sentence for sentence in self.result.lost if sentence not in frozen]

    def frozen(self) -> list[tuple[str, str, list[str]]]:
        """What was left alone: technique, reason, sites."""
        groups: dict[tuple[str, str], list[str]] = {}
        for each in self.result.frozen:
            groups.setdefault(_group(each), []).append(each.site or "the whole model")
        return [(technique, reason, sites) for (technique, reason), sites in groups.items()]

    def finalists(self) -> list[Variant]:
        """Those trained in full, and the result; where there are none, all that were trained."""
        trained = [variant for variant in self.variants if len(variant.curve) > 1]
        return [each for each in trained if each.record.is_final or each.is_chosen] or trained

    @property
    def reading_aid(self) -> str:
        """How the chart of the variants is read."""
        side = "Above the lower" if self.is_larger_better else "Below the upper"
        return f"{side} dashed line a variant is within delta. Left is cheaper."

    def decisions(self) -> list[str]:
        """Why the search did what it did; variants by their names on the page."""
        numbers = {variant.record.id: str(variant.number) for variant in self.variants}
        if not numbers:
            return list(self.result.decisions)
        ids = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in numbers))
        return [ids.sub(lambda m: numbers[m.group()], text) for text in self.result.decisions]

    def facts(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Tables of names and values: the run, its time, machine, versions, files."""
        info, c = self.result.info, self.certificate
        phases: Mapping[str, float] = info.get("phases", {})
        machine: Mapping[str, Any] = info.get("machine", {})
        run = [
            ("seed", str(info.get("seed", self.config.get("seed", "unknown")))),
            ("delta", f"{c.delta:g} of {c.metric_name}"),
            ("judged on", f"split {c.split!r}"),
            ("evaluations on it", str(c.looks)),
            ("target", _target(c.target)),
            ("optimization", str(self.config.get("optimization", "unknown"))),
            ("variants", _count(self.variants)),
        ]
        times = [(name, duration(seconds)) for name, seconds in phases.items()]
        if "seconds" in info:
            times.append(("in all", duration(info["seconds"])))
        if info.get("eta_seconds") is not None:
            times.append(("foretold after the first variant", duration(info["eta_seconds"])))
        tables = [
            ("Run", run),
            ("Time", times),
            ("Machine", [(words_of(name), _flat(value)) for name, value in machine.items()]),
            ("Versions", [(name, str(value)) for name, value in info.get("versions", {}).items()]),
            ("Files", [(name, str(path)) for name, path in self.result.artifacts.items()]),
        ]
        return [(name, rows) for name, rows in tables if rows]

    def config_text(self) -> str:
        """The configuration, as it was read."""
        return json.dumps(self.config, indent=2, default=str)

    def detail(self, variant: Variant) -> dict[str, Any]:
        """What the page shows of a variant that is selected."""
        record = variant.record
        return {
            "title": f"{variant.name} ({record.id})",
            "verdict": self.verdict_of(variant),
            "facts": [list(fact) for fact in self._facts_of(variant) if fact[1]],
            "plan": plan_rows(record.plan),
        }

    def verdict_of(self, variant: Variant) -> str:
        """In words."""
        words = {WITHIN: "within delta", OUTSIDE: "outside delta", FAILED: "failed"}
        return words[variant.verdict] + (", taken" if variant.is_chosen else "")

    def metric_of(self, variant: Variant) -> float | None:
        """Of the certificate's metric; None where it is not known."""
        return variant.record.metrics.get(self.certificate.metric_name)

    def text_of(self, metric: float | None) -> str:
        """A value of the metric; "" where it is not known."""
        return "" if metric is None else metric_text(metric, self.certificate.delta)

    def _facts_of(self, variant: Variant) -> Iterator[tuple[str, str]]:
        record, c = variant.record, self.certificate
        for name, value in record.metrics.items():
            is_judged = name == c.metric_name
            yield name, metric_text(value, c.delta) if is_judged else f"{value:.4g}"
        if variant.drop is not None:
            yield "worse by", self.text_of(variant.drop)
        if record.cost is not None:
            for resource in COSTS:
                value = getattr(record.cost, resource)
                yield name_of(resource), self.cost_text(resource, value)
            yield "peak memory", amount("peak_memory_bytes", record.cost.peak_memory_bytes)
        yield "latency, predicted", amount("latency_ms", record.predicted.get("latency_ms"))
        damage = record.predicted.get("damage")
        yield "damage, predicted", "" if damage is None else damage_text(damage)
        yield "trained", f"{record.epochs} epochs{' in full' if record.is_final else ''}"
        yield "went on from", self._name_of(record.start)
        yield "cut from", self._name_of(record.base)
        yield "trained with", ", ".join(f"{words_of(k)} {v}" for k, v in record.tuning.items())
        yield (
            "took",
            f"{duration(record.seconds)}, {times(record.looks, 'evaluation')} on the split",
        )
        yield "why", record.reason

    def cost_text(self, resource: str, value: float) -> str:
        """A cost and its ratio to the reference's."""
        before = getattr(self.certificate, f"reference_{resource}")
        ratio = before / value if value else float("inf")
        return f"{amount(resource, value)} ({change_of(resource, ratio)})"

    def _name_of(self, variant_id: str) -> str:
        names = {variant.record.id: variant.name for variant in self.variants}
        return names.get(variant_id, variant_id)

    def _variants(self) -> Iterator[Variant]:
        result, c = self.result, self.certificate
        chosen = chosen_id(result)
        by_id = {record.id: record for record in result.variants}
        for number, record in enumerate(result.variants, start=1):
            drop = None
            metric = record.metrics.get(c.metric_name)
            if record.status == "done" and metric is not None and math.isfinite(metric):
                drop = c.reference_metric - metric
                drop = drop if self.is_larger_better else -drop
            verdict = FAILED if drop is None else WITHIN if drop <= c.delta else OUTSIDE
            yield Variant(
                record,
                number,
                verdict,
                drop,
                record.id == chosen,
                tuple(joined_curve(record, by_id)),
            )


def chosen_id(result: Result) -> str:
    """The variant that was taken; where it is not said, the last one with the result's plan."""
    if result.chosen or result.reason:
        return result.chosen
    same = [r for r in result.variants if r.status == "done" and r.plan == result.plan]
    return same[-1].id if same else ""


def joined_curve(record: VariantRecord, by_id: Mapping[str, VariantRecord]) -> Iterator[Point]:
    """A variant's curve behind that of the variant whose training it went on with."""
    offset = 0.0
    parent = by_id.get(record.start)
    if parent is not None:
        before = list(joined_curve(parent, by_id))
        yield from before
        offset = before[-1].epoch if before else 0.0
    for item in record.curve:
        yield Point(item["epoch"] + offset, item.get("metric"), item.get("loss"))


def plan_rows(plan: Plan) -> list[list[str]]:
    """Technique, site and setting of each choice, in the order of the names."""
    return [
        [words_of(choice.technique), choice.site or "the whole model", choice.label or "as set"]
        for choice in sorted(plan, key=lambda choice: (choice.technique, choice.site))
    ]


def _group(frozen: Frozen) -> tuple[str, str]:
    return words_of(frozen.technique), frozen.reason


def _target(target: Mapping[str, Any]) -> str:
    threads, batch = target.get("threads"), target.get("batch_size")
    parts = [runtime_name(target), str(target.get("device", ""))]
    parts += [times(threads, "thread")] if threads else []
    parts += [f"batch {batch}"] if batch else []
    return ", ".join(filter(None, parts))


def _count(variants: Sequence[Variant]) -> str:
    within = sum(variant.verdict == WITHIN for variant in variants)
    failed = sum(variant.verdict == FAILED for variant in variants)
    return f"{len(variants)}, {within} within delta, {failed} failed"


def _flat(value: Any) -> str:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return "none" if value is None else str(value)
    return ", ".join(map(str, value)) or "none"
