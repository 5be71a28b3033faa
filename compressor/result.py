"""The words of a run as values: choice, plan, variant, certificate, result. JSON both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from compressor.errors import StudyError
from compressor.evidence import Frozen, LayerRow, Sensed

SCHEMA_VERSION = 2  # 1 had no damages, layers, frozen, curve; docs/result.md says what is in it
T = TypeVar("T")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from a mapping; keys that it does not have (of a newer version) are left out."""
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class Choice:
    """One technique at one site with one setting.

    Attributes:
        technique: registered name, such as "channel_pruning".
        site: where, by the reference's module names: "layer1.0", "layer1.0.conv1".
        setting: JSON that says how far; it holds all that applying needs, such as the channels
            kept.
        label: what a person calls the setting: "24 of 32 channels".
        modules: names of the modules that the choice changes.
    """

    technique: str
    site: str
    setting: Mapping[str, Any]
    label: str = ""
    modules: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Unique among the choices of a run, and the same in the next run."""
        return f"{self.technique}:{self.site}:{digest(dict(self.setting))}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "technique": self.technique,
            "site": self.site,
            "setting": dict(self.setting),
            "label": self.label,
            "modules": list(self.modules),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Choice:
        """The inverse of `to_json`."""
        return cls(
            values["technique"],
            values["site"],
            dict(values["setting"]),
            values.get("label", ""),
            tuple(values.get("modules", ())),
        )


@dataclass(frozen=True)
class Plan:
    """The choices taken together. The order does not matter; equal plans have equal digests."""

    choices: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        """Sort, so that plans compare by what they say."""
        object.__setattr__(self, "choices", tuple(sorted(self.choices, key=lambda c: c.key)))

    def __iter__(self) -> Iterator[Choice]:
        """The choices, sorted by key."""
        return iter(self.choices)

    def __len__(self) -> int:
        """How many choices."""
        return len(self.choices)

    @property
    def digest(self) -> str:
        """Names the plan on disk."""
        return digest([[c.technique, c.site, dict(c.setting)] for c in self.choices])

    def of(self, *techniques: str) -> Plan:
        """The part of the plan that belongs to `techniques`."""
        return Plan(tuple(c for c in self.choices if c.technique in techniques))

    def without(self, *techniques: str) -> Plan:
        """The part of the plan that belongs to other techniques."""
        return Plan(tuple(c for c in self.choices if c.technique not in techniques))

    def describe(self) -> str:
        """One line for a log: how many choices of each technique."""
        names = [c.technique for c in self.choices]
        counts = [f"{names.count(name)} {name}" for name in sorted(set(names))]
        return ", ".join(counts) or "nothing changed"

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON values."""
        return [c.to_json() for c in self.choices]

    @classmethod
    def from_json(cls, values: list[Mapping[str, Any]]) -> Plan:
        """The inverse of `to_json`."""
        return cls(tuple(Choice.from_json(value) for value in values))


@dataclass(frozen=True)
class Cost:
    """What a model costs where it runs. Units are in the names; latency is one call's best."""

    params: int
    macs: int
    size_bytes: int
    latency_ms: float
    peak_memory_bytes: int | None = None

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{self.latency_ms:.4g} ms, {self.size_bytes:,} bytes, {self.macs:,} MACs, "
            f"{self.params:,} parameters"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class VariantRecord:
    """What is known of one variant, as the study keeps it.

    Attributes:
        id: name of its folder under `variants/`.
        plan: what was done.
        status: "done", or "failed" with the reason.
        metrics: the user's evaluation of the deployed variant.
        cost: measured on the target; None for a failed variant.
        predicted: what the allocation promised: "cost" on the objective's scale, "damage", and
            "latency_ms" where latency is the objective.
        epochs: fine-tuned so long.
        seconds: spent on building, recovering and judging.
        looks: evaluations of the judged split that it took.
        is_final: fine-tuned in full.
        reason: why it failed, or why its training was stopped early.
        start: id of the variant of the same structure that its training went on from.
        base: id of the recovered variant that it was cut from; "" is the reference.
        tuning: how its training differed from what is configured; see `search.tuning`.
        wanted: value of the metric below which its training was not worth going on.
        recipe: digest of what decides the outcome besides the plan.
        curve: of its own training: an item for each evaluation and epoch, with "epoch", and with
            "metric" and "loss" where they are known.
    """

    id: str
    plan: Plan
    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    predicted: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    looks: int = 0
    is_final: bool = False
    reason: str = ""
    start: str = ""
    base: str = ""
    tuning: Mapping[str, Any] = field(default_factory=dict)
    wanted: float | None = None
    recipe: str = ""
    curve: tuple[Mapping[str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "plan": self.plan.to_json(),
            "metrics": dict(self.metrics),
            "tuning": dict(self.tuning),
            "predicted": dict(self.predicted),
            "cost": self.cost.to_json() if self.cost else None,
            "curve": [dict(point) for point in self.curve],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VariantRecord:
        """The inverse of `to_json`."""
        cost = values.get("cost")
        return from_mapping(
            cls,
            {
                **values,
                "plan": Plan.from_json(values["plan"]),
                "cost": from_mapping(Cost, cost) if cost else None,
                "curve": tuple(dict(point) for point in values.get("curve", ())),
            },
        )


@dataclass(frozen=True)
class LatencyErrors:
    """How far the latencies that the allocation reckoned with were from those that were measured.

    Attributes:
        variants: how many were predicted and measured.
        median_error_fraction: of the measured latency; the sign does not count.
    """

    variants: int
    median_error_fraction: float

    @classmethod
    def of(cls, records: Iterable[VariantRecord]) -> LatencyErrors | None:
        """Over the variants whose latency was predicted; None if there are none."""
        errors = [
            abs(record.predicted["latency_ms"] / record.cost.latency_ms - 1)
            for record in records
            if len(record.plan)
            and record.cost is not None
            and record.cost.latency_ms > 0
            and "latency_ms" in record.predicted
        ]
        return cls(len(errors), median(errors)) if errors else None

    def __str__(self) -> str:
        percent = 100 * self.median_error_fraction
        return (
            f"The latency of {self.variants} variants was predicted from single layers with a "
            f"median error of {percent:.2g} %."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Parity:
    """How far the outputs of the exported float file are from those of the torch model.

    Attributes:
        max_abs_error: largest absolute difference of any output entry.
        max_rel_error: that, divided by the largest absolute value of the same output.
        samples: how many inputs were compared.
    """

    max_abs_error: float
    max_rel_error: float
    samples: int


@dataclass(frozen=True)
class Interval:
    """Between which ends the drop of the metric lies; see `search.interval`.

    Attributes:
        low: of the drop, on the metric's scale; negative is better than the reference.
        high: the other end.
        confidence: that the true drop lies between them, whichever evaluation it was chosen by.
        chunks: disjoint parts of the split, on which both models were evaluated.
        looks: evaluations of compressed models on that split that the interval is widened for: one
            for each variant, and one for each epoch after which a variant was evaluated.
    """

    low: float
    high: float
    confidence: float
    chunks: int
    looks: int


@dataclass(frozen=True)
class Agreement:
    """How often the quantized file to deploy names another class, by its largest output.

    Attributes:
        simulation_differs_fraction: of the samples: another than the quantized model in torch. Of
            a segmentation a sample counts by the share of its positions.
        reference_differs_fraction: of the samples: another than the reference in float.
        samples: how many of the judged split were compared.
    """

    simulation_differs_fraction: float
    reference_differs_fraction: float
    samples: int

    def __str__(self) -> str:
        simulation = 100 * self.simulation_differs_fraction
        reference = 100 * self.reference_differs_fraction
        return (
            f"Of {self.samples} samples the quantized file names {simulation:.2g} % otherwise than "
            f"its simulation in torch, and {reference:.2g} % otherwise than the reference."
        )


@dataclass(frozen=True)
class Certificate:
    """What is finally claimed of the exported file; every number was measured on it.

    Ratios are reference / compressed for size, MACs, parameters and latency: above 1 is better.
    The reference is exported the same way to the same target, in float32. `within_delta` is of the
    measured drop itself; `is_certain` of the whole `interval` that the true one lies in.
    """

    metric_name: str
    metric: float
    reference_metric: float
    delta: float
    within_delta: bool
    latency_ratio: float
    size_ratio: float
    macs_ratio: float
    params_ratio: float
    latency_ms: float
    reference_latency_ms: float
    size_bytes: int
    reference_size_bytes: int
    macs: int
    reference_macs: int
    params: int
    reference_params: int
    parity: Parity | None
    interval: Interval | None = None
    agreement: Agreement | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    looks: int = 0
    split: str = "test"
    notes: tuple[str, ...] = ()

    @property
    def is_certain(self) -> bool:
        """Whether the drop is within delta by its interval, and not only as it was measured."""
        return self.interval is not None and self.interval.high <= self.delta

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "is_certain": self.is_certain}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Certificate:
        """The inverse of `to_json`."""
        parity, interval = values.get("parity"), values.get("interval")
        agreement = values.get("agreement")
        return from_mapping(
            cls,
            {
                **values,
                "parity": from_mapping(Parity, parity) if parity else None,
                "interval": from_mapping(Interval, interval) if interval else None,
                "agreement": from_mapping(Agreement, agreement) if agreement else None,
                "notes": tuple(values.get("notes", ())),
            },
        )


@dataclass
class Result:
    """Everything that came of a run.

    Attributes:
        model: the compressed model in torch, float weights; the reference's copy if nothing held.
        certificate: what is claimed of the exported file.
        variants: every variant that was made, oldest first.
        frontier: those that no other beats in metric and in all costs that count, cheapest first.
        artifacts: what was written: "onnx" (the file to deploy), "onnx_float", "exported_program",
            "torchscript", "torchao" (of the target inductor), "model_dir", "report" (the page).
        plan: of the model.
        lost: what could not be done with this model, and why.
        info: versions, hardware, seed, seconds of each step.
        reason: why the reference itself is the answer, or "".
        decisions: why the search did what it did, in sentences, in order.
        damages: of each choice alone, in the order in which they were proposed.
        layers: what each layer costs, before and after.
        frozen: what techniques left alone, and why.
        chosen: id of the variant that is the result; "" is the reference.
    """

    model: Any
    certificate: Certificate
    variants: list[VariantRecord]
    frontier: list[VariantRecord]
    artifacts: Mapping[str, Path]
    plan: Plan
    lost: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    decisions: tuple[str, ...] = ()
    damages: tuple[Sensed, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    chosen: str = ""
    open_runtime: Callable[[], Any] | None = None

    @property
    def latency_errors(self) -> LatencyErrors | None:
        """Predicted against measured; None where latency was not the objective."""
        return LatencyErrors.of(self.variants)

    def __str__(self) -> str:
        c = self.certificate
        within = "within" if c.within_delta else "NOT within"
        metric = f"{c.metric_name} {c.reference_metric:.4g} -> {c.metric:.4g}"
        return (
            f"{metric} ({within} delta {c.delta:g}), {c.latency_ratio:.2f}x faster, "
            f"{c.size_ratio:.2f}x smaller, {c.macs_ratio:.2f}x fewer MACs: {self.plan.describe()}"
        )

    def runtime_model(self) -> Any:
        """The deployed file in its runtime, as a module that is called like the model."""
        assert self.open_runtime is not None
        return self.open_runtime()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: all but the model. The schema's version is `schema_version`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "certificate": self.certificate.to_json(),
            "plan": self.plan.to_json(),
            "chosen": self.chosen,
            "variants": [record.to_json() for record in self.variants],
            "frontier": [record.id for record in self.frontier],
            "artifacts": {name: str(path) for name, path in self.artifacts.items()},
            "lost": list(self.lost),
            "info": dict(self.info),
            "latency_errors": self.latency_errors.to_json() if self.latency_errors else None,
            "reason": self.reason,
            "decisions": list(self.decisions),
            "damages": [sensed.to_json() for sensed in self.damages],
            "layers": [row.to_json() for row in self.layers],
            "frozen": [each.to_json() for each in self.frozen],
        }

    @classmethod
    def from_json(
        cls,
        values: Mapping[str, Any],
        model: Any = None,
        open_runtime: Callable[[], Any] | None = None,
    ) -> Result:
        """The inverse of `to_json`, with the model that it left out; older schemas are read too.

        Raises:
            StudyError: if a newer version of this package wrote it.
        """
        if values["schema_version"] > SCHEMA_VERSION:
            raise StudyError(
                f"result.json has schema version {values['schema_version']}, this package reads "
                f"up to {SCHEMA_VERSION}. Upgrade it, or choose another run_dir."
            )
        variants = [VariantRecord.from_json(record) for record in values["variants"]]
        by_id = {record.id: record for record in variants}
        return cls(
            model=model,
            certificate=Certificate.from_json(values["certificate"]),
            variants=variants,
            frontier=[by_id[name] for name in values["frontier"]],
            artifacts={name: Path(path) for name, path in values["artifacts"].items()},
            plan=Plan.from_json(values["plan"]),
            lost=tuple(values["lost"]),
            info=values["info"],
            reason=values["reason"],
            decisions=tuple(values.get("decisions", ())),
            damages=tuple(Sensed.from_json(each) for each in values.get("damages", ())),
            layers=tuple(LayerRow.from_json(each) for each in values.get("layers", ())),
            frozen=tuple(Frozen.from_json(each) for each in values.get("frozen", ())),
            chosen=values.get("chosen", ""),
            open_runtime=open_runtime,
        )
