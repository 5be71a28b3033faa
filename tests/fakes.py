"""A framework without networks: models record what was done to them, metrics are arithmetic.

A model loses `damage` of accuracy for its choices; each epoch of training wins back a tenth of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.config import ExecutorConfig
from compressor.errors import ModelError
from compressor.evidence import Frozen, LayerBill, LayerRow
from compressor.files import write_text
from compressor.frameworks.base import Exported, Job, Judged
from compressor.progress import Progress
from compressor.result import Choice, Cost, Plan
from compressor.search.making import Base
from compressor.search.space import LayerChange, LayerCost, LayerState
from compressor.search.tuning import Recovered, Tuning

REFERENCE_ACCURACY = 90.0
LAYERS = {f"layer{i}": LayerState(16, 16) for i in range(6)}
POINTS_PER_DAMAGE = 10.0
RECOVERED_PER_EPOCH = 0.1


@dataclass
class FakeModel:
    """What was done to it."""

    plan: Plan
    epochs: int = 0


@dataclass
class FakeBench:
    """Counts what it is asked, so that tests can say what was not done again."""

    job: Job
    calls: list[str] = field(default_factory=list)
    fails_to_build: frozenset[str] = frozenset()
    int8_points: float = 0.0
    trained_share: float = 1.0  # of them that is left when the numbers are trained
    name: str = "fake"

    def check(self) -> None:
        self.calls.append("check")

    def digest(self) -> str:
        return self.name

    def job_digest(self) -> str:
        return self.name

    def baseline(self) -> Judged:
        self.calls.append("baseline")
        return self._judged(FakeModel(Plan()), Plan())

    def use_baseline(self, baseline: Judged) -> None:
        self.calls.append("use_baseline")

    def target(self) -> Mapping[str, Any]:
        return {"runtime": "fake"}

    def lost(self) -> Sequence[str]:
        return ()

    def frozen(self) -> Sequence[Frozen]:
        return [Frozen("block_removal", "stem", "Nothing runs beside it.")]

    def layer_rows(self, model: FakeModel, plan: Plan) -> Sequence[LayerRow]:
        del model
        removed = {choice.site for choice in plan.of("block_removal")}
        whole, gone = LayerBill(256, 100), LayerBill(0, 0)
        return [
            LayerRow(name, "Fake", whole, gone if name in removed else whole) for name in LAYERS
        ]

    def is_number(self, technique: str) -> bool:
        return technique == "quantization"

    def propose(self) -> list[Choice]:
        self.calls.append("propose")
        removals = [Choice("block_removal", layer, {"removed": True}) for layer in LAYERS]
        numbers = [Choice("quantization", layer, {"format": "static_int8"}) for layer in LAYERS]
        wanted = self.job.config.techniques or ("block_removal", "quantization")
        return [choice for choice in removals + numbers if choice.technique in wanted]

    def further(self, choices: Sequence[Choice], made: Plan) -> list[Choice]:
        return [choice for choice in choices if choice not in made.choices]

    def layers(self) -> Mapping[str, LayerState]:
        return LAYERS

    def effects(self, choices: Sequence[Choice]) -> Mapping[str, Mapping[str, LayerChange]]:
        return {
            c.key: {
                c.site: LayerChange(bits=8) if "format" in c.setting else LayerChange(removes=True)
            }
            for c in choices
        }

    def layer_cost(self, resource: str) -> LayerCost:
        def cost(layer: str, state: LayerState) -> float:
            del layer
            if state.is_removed:
                return 0.0
            return 1.0 if resource == "macs" else state.bits / 32

        return cost

    def damage_of(self, plan: Plan, base: Base[FakeModel] | None = None) -> float:
        self.calls.append(f"sense {', '.join(f'{c.technique} {c.site}' for c in plan)}")
        kept = _kept(base.model.epochs) if base else 1.0
        known = base.plan if base else Plan()
        return sum(_damage(c) * (kept if c in known.choices else 1.0) for c in plan)

    def reranked(self, plan: Plan, importance: str) -> Plan:
        del importance
        return plan

    def build(self, plan: Plan, base: Base[FakeModel] | None = None) -> FakeModel:
        self.calls.append("build")
        if self.fails_to_build & {choice.site for choice in plan}:
            raise ModelError("This plan cannot be built. Choose another.")
        return FakeModel(plan, base.model.epochs // 2 if base else 0)

    def recover(
        self,
        model: FakeModel,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None = None,
    ) -> Recovered:
        del plan, folder, is_final, tuning, wanted
        self.calls.append("recover")
        model.epochs += epochs
        return Recovered(epochs)

    def epoch_seconds(self) -> float:
        return 1.0

    def judge(self, model: FakeModel, plan: Plan, folder: Path) -> Judged:
        del folder
        self.calls.append("judge")
        return self._judged(model, plan)

    def workers(self, executor: ExecutorConfig, folder: Path) -> AbstractContextManager[None]:
        del executor, folder
        return nullcontext()

    def save(self, model: FakeModel, folder: Path) -> None:
        text = json.dumps({"plan": model.plan.to_json(), "epochs": model.epochs})
        write_text(folder / "model.json", text)

    def load(self, folder: Path) -> FakeModel:
        values = json.loads((folder / "model.json").read_text())
        return FakeModel(Plan.from_json(values["plan"]), values["epochs"])

    def export(self, model: FakeModel, plan: Plan, folder: Path) -> Exported:
        self.calls.append("export")
        self.save(model, folder / "model")
        judged = self._judged(model, plan)
        return Exported(
            {"model_dir": folder / "model"}, judged, {"accuracy": REFERENCE_ACCURACY}, parity=None
        )

    def runtime_model(self, artifacts: Mapping[str, Path]) -> Any:
        return self.load(artifacts["model_dir"])

    def looks(self) -> int:
        return sum(call in {"baseline", "judge"} for call in self.calls)

    def _judged(self, model: FakeModel, plan: Plan) -> Judged:
        removed = plan.of("block_removal")
        damage = sum(map(_damage, removed))
        kept = _kept(model.epochs)
        numbers = plan.of("quantization")
        shares = (self.trained_share if c.setting.get("trained") else 1.0 for c in numbers)
        points = POINTS_PER_DAMAGE * damage * kept + self.int8_points * sum(shares)
        layers = 1 + len(LAYERS) - len(removed)  # one layer is no site
        eighths = 4 * layers - 3 * len(plan.of("quantization"))
        cost = Cost(layers * 256, layers * 100, eighths * 64, latency_ms=eighths / 4)
        return Judged({"accuracy": REFERENCE_ACCURACY - points}, cost)


def _damage(choice: Choice) -> float:
    is_number = choice.technique == "quantization"
    return 0.001 if is_number else 0.1 * (1 + list(LAYERS).index(choice.site))


def _kept(epochs: int) -> float:
    """The part of a loss that is left after training."""
    return max(1 - RECOVERED_PER_EPOCH * epochs, 0.2)


class FakeFramework:
    """Opens fake benches; remembers the last."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.bench: FakeBench | None = None

    def open(self, job: Job, run_dir: Path, progress: Progress) -> FakeBench:
        del run_dir, progress
        self.bench = FakeBench(job, **self.options)
        return self.bench
