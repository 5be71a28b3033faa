"""What a run found out on its way, as values: damages of choices, costs of layers, what stays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HOPELESS = 1e6  # stands for an infinite damage where numbers must be finite: maps on disk, sums


@dataclass(frozen=True)
class Sensed:
    """One choice made alone of the reference, before any training.

    Attributes:
        technique: registered name.
        site: where, by the reference's module names.
        label: what a person calls the setting.
        damage: divergence of the outputs; 0 is none, infinity is hopeless: outputs that are no
            numbers, or a choice that cannot be made. JSON has null for it.
        saved: what it saves of each resource that the run wanted to be small, in the unit of its
            name, such as {"latency_ms": 0.02}; negative where it costs.
    """

    technique: str
    site: str
    label: str
    damage: float
    saved: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        damage = self.damage if math.isfinite(self.damage) else None
        return {**asdict(self), "damage": damage, "saved": dict(self.saved)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sensed:
        """The inverse of `to_json`; earlier files have `HOPELESS` for null."""
        damage = values["damage"]
        return cls(
            values["technique"],
            values["site"],
            values["label"],
            math.inf if damage is None or not damage < HOPELESS else damage,
            dict(values["saved"]),
        )


@dataclass(frozen=True)
class LayerBill:
    """What one layer costs in one call with one sample.

    Attributes:
        params: of its own; a tied tensor belongs to the first of its layers.
        macs: multiply-accumulates.
        latency_ms: timed alone on the target, times a factor that makes the layers of the reference
            add up to its latency; None where that was not measured.
    """

    params: int
    macs: int
    latency_ms: float | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerBill:
        """Of the plain values that `LayerRow.to_json` has."""
        return cls(values["params"], values["macs"], values["latency_ms"])


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after.

    Attributes:
        name: by the reference's module names; "" is the model itself.
        type: name of its class in the reference.
        reference: what it costs there.
        compressed: what stands in its place costs in the compressed model; zeros where it is gone.
        format: in which it is stored and computed in the file to deploy; "" is float.
    """

    name: str
    type: str
    reference: LayerBill
    compressed: LayerBill
    format: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LayerRow:
        """The inverse of `to_json`."""
        return cls(
            values["name"],
            values["type"],
            LayerBill.from_json(values["reference"]),
            LayerBill.from_json(values["compressed"]),
            values["format"],
        )


@dataclass(frozen=True)
class Frozen:
    """A part of the model that a technique left alone, and why.

    Attributes:
        technique: registered name.
        site: where; "" is the whole model.
        reason: a sentence.
    """

    technique: str
    site: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.technique, self.site, self.reason)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Frozen:
        """The inverse of `to_json`."""
        return cls(values["technique"], values["site"], values["reason"])
