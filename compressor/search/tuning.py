"""How one recovery differs from what is configured, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from compressor.result import from_mapping


@dataclass(frozen=True)
class Tuning:
    """Settings of one fine-tune; as configured unless said otherwise.

    Attributes:
        lr_factor: times the configured learning rate, above 0.
        distillation_weight: of the distillation loss, 0 to 1; None as configured.
        temperature: of the distillation, above 0; None as configured.
        scheduler: "cosine", "linear" or "constant"; None as configured.
    """

    lr_factor: float = 1.0
    distillation_weight: float | None = None
    temperature: float | None = None
    scheduler: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what is as configured is left out."""
        default = asdict(Tuning())
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tuning:
        """The inverse of `to_json`."""
        return from_mapping(cls, values)

    def __str__(self) -> str:
        named = {
            "lr_factor": f"the learning rate times {self.lr_factor:.3g}",
            "distillation_weight": f"distillation weighing {self.distillation_weight or 0:.2g}",
            "temperature": f"temperature {self.temperature or 0:.3g}",
            "scheduler": f"a {self.scheduler} schedule",
        }
        return ", ".join(named[name] for name in self.to_json()) or "as configured"


class Recovered(NamedTuple):
    """What a fine-tune came to.

    `epochs` are those that were really trained; `reason` is a sentence on why it was stopped early,
    "" if it was not; `earlier_looks` are the evaluations before it was interrupted; `curve` is that
    of `VariantRecord`.
    """

    epochs: int
    reason: str = ""
    earlier_looks: int = 0
    curve: tuple[Mapping[str, float], ...] = ()
