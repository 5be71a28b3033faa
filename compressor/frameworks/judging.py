"""Evaluates and times deployed models, beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from compressor.config import Config
from compressor.export.verify import agreement
from compressor.frameworks.base import Judged
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.paired import evaluate_pairs
from compressor.frameworks.subset import draw_subset
from compressor.interfaces.data import kept_generators
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.interfaces.task import Task
from compressor.profiling.counts import count
from compressor.profiling.memory import peak_activation_memory
from compressor.result import Agreement, Cost
from compressor.search.interval import Paired
from compressor.seeding import isolated_rng
from compressor.targets import Deployed


class Judging:
    """Metrics and costs of one job's models.

    Attributes:
        baseline: what was measured of the reference; latencies are on its scale.
        looks: evaluations of the judged split.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        data: Mapping[str, Any],
        reference: nn.Module,
        example: ModelInputs,
        deployment: Callable[[], Deployment],
    ) -> None:
        """Evaluate nothing yet.

        Args:
            config: of the job.
            task: the user's functions.
            data: loaders by split.
            reference: on the device of the job.
            example: inputs of a call, on the CPU.
            deployment: the target as it is now.
        """
        self.baseline: Judged | None = None
        self.looks = 0
        self._config = config
        self._task = task
        self._data = data
        self._reference = reference
        self._example = example
        self._deployment = deployment
        self._device = device_of(reference)

    @property
    def reference(self) -> Judged:
        """The baseline, which must be known by now."""
        assert self.baseline is not None
        return self.baseline

    def judge_reference(self) -> Judged:
        """Metrics in torch, cost on the target in float32."""
        metrics = self.evaluate(self._reference, self._config.eval_split)
        deployed = self._deployment().reference(self._reference, self._example)
        timing = self._deployment().time(deployed.module, self._example)
        return Judged(metrics, self._cost(self._reference, deployed.size_bytes, timing.best_ms))

    def judge(self, model: nn.Module, deployed: Deployed, split: str) -> Judged:
        """Of `model` as it is deployed, on `split`."""
        cost = self.measure(model, deployed)
        return Judged(self.evaluate(deployed.module, split), cost)

    def measure(self, model: nn.Module, deployed: Deployed) -> Cost:
        """Of `model` as it is deployed, with nothing else at work on this machine."""
        return self._cost(model, deployed.size_bytes, self.latency_ms(deployed.module))

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """The user's metrics; the same of the same model, whatever was evaluated before."""
        self.looks += split == self._config.eval_split
        return self._evaluate(model, self._data[split])

    def latency_ms(self, module: nn.Module) -> float:
        """On the scale of the baseline; see `Deployment.time_beside`."""
        deployed = self._deployment().reference(self._reference, self._example)
        return self._deployment().time_beside(
            deployed.module,
            module,
            self._example,
            reference_ms=self.reference.cost.latency_ms,
        )

    def reference_metrics(self, split: str) -> Mapping[str, float]:
        """Of the reference in torch; those of the judged split are known."""
        if split == self._config.eval_split:
            return self.reference.metrics
        return self.evaluate(self._reference, split)

    def pair(
        self, deployed: nn.Module, split: str, key: str, metrics: tuple[float, float]
    ) -> Paired | str:
        """Reference and deployed model on the same parts of `split`; `metrics` are of the whole."""
        with isolated_rng(self._config.seed):  # a loader may shuffle
            return evaluate_pairs(
                self._evaluate, self._reference, deployed, self._data[split], key, metrics
            )

    def agreement(self, deployed: Deployed, split: str) -> Agreement | None:
        """Of a quantized file that names classes, on the first samples of `split`, unlabelled."""
        kind = self._config.task_type
        if deployed.simulate is None or kind not in {"classification", "segmentation"}:
            return None
        judged = draw_subset(
            self._data[split],
            lambda batch: self._task.inputs(self._reference, batch),
            self._config.seed,
        )
        return agreement(
            deployed.module,
            deployed.simulate(),
            self._reference,
            judged.inputs,
            has_positions=kind == "segmentation",
        )

    def _evaluate(self, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
        with isolated_rng(self._config.seed), kept_generators(loader):
            return self._task.evaluate(model, loader, self._config.device)

    def _cost(self, model: nn.Module, size_bytes: int, latency_ms: float) -> Cost:
        inputs = self._example.with_batch(1).to(self._device)
        counted = count(model, inputs)
        memory_bytes = peak_activation_memory(model, inputs)
        return Cost(counted.params, counted.macs, size_bytes, latency_ms, memory_bytes)
