"""What a user's job in PyTorch consists of: model, data, task, techniques, target."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from compressor.config import Config
from compressor.errors import ConfigError
from compressor.frameworks.base import Job
from compressor.frameworks.checks import (
    answers_alike,
    check_calls,
    check_default_evaluation,
)
from compressor.frameworks.defaults import make_task, make_techniques
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.judging import Judging
from compressor.frameworks.numbers import Numbers
from compressor.frameworks.recovery import Recovery
from compressor.frameworks.reference_costs import ReferenceCosts
from compressor.frameworks.sensing import Sensing
from compressor.frameworks.subset import Subset, draw_subset, model_digest
from compressor.frameworks.teacher import as_teacher
from compressor.interfaces.data import check_data, first_batch, move
from compressor.interfaces.inputs import ModelInputs
from compressor.interfaces.instances import check_instance, check_module
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import digest
from compressor.structure.attention import replace_attention
from compressor.structure.trace import copy_model, in_eval
from compressor.techniques import ChannelPruning, TechniqueContext

logger = get_logger(__name__)

DRYRUN_BATCHES = 2
EXAMPLE_SAMPLES = 32
# How the kernels of each kind of target step (measured for ONNX Runtime on x86: fp32 by 16, int8
# by 4 and never below 16); bytes and MACs do not step, but odd widths leave the fast layouts.
WIDTH_MULTIPLE = {"latency": 16, "compression": 8, "macs": 8, "quantization": 8}


class TorchJob:
    """One job, understood. What is costly to make is made when it is first asked for, and once.

    Attention of hard-wired width has the form in which heads can be removed; see
    `structure.attention`.
    """

    def __init__(self, job: Job, run_dir: Path, progress: Progress) -> None:
        """Understand the job.

        Raises:
            CompressorError: for data, devices, models and configurations that cannot be worked
                with.
        """
        self.config: Config = job.config
        check_module("model", job.model)
        check_instance("forward_pass", job.forward_pass)
        self.config.device.check_available()
        self.device = self.config.device.torch_device
        limit = DRYRUN_BATCHES if job.is_dryrun else None
        self.data = check_data(
            job.open_data(), self.config.eval_split, self.config.holdout, max_batches=limit
        )
        self.task = make_task(job)
        self.techniques = make_techniques(self.config)
        self._given = in_eval(copy_model(job.model).to(self.device))
        self.reference = copy_model(self._given)
        if ChannelPruning.name in self.techniques:  # layers compare by name, so from the beginning
            replace_attention(self.reference)
        self.task.forward_pass.infer_sampler(first_batch(self.data["train"]))
        check_calls(self.task, self.reference, self.data, self.device, self.config.seed)
        if job.eval_func is None:
            judged = self.config.eval_split
            check_default_evaluation(
                self.task,
                self.reference,
                judged,
                self.data[judged],
                self.config.device,
                self.config.seed,
            )
        self._job = job
        self._progress = progress
        self._lost: list[str] = []
        self._folder = run_dir / "reference"
        self._deployment = Deployment(self.config.target, self._folder)
        if self.config.optimization == "quantization" and not self._deployment.target.formats:
            raise ConfigError(
                f"optimization='quantization' needs a runtime with int8, and the target is "
                f"{self.config.target.runtime!r}. {self._deployment.target.way_out()}"
            )

    @cached_property
    def subset(self) -> Subset:
        """The fixed sample of the training split."""
        return draw_subset(
            self.data["train"],
            lambda batch: self.task.inputs(self.reference, batch),
            self.config.seed,
        )

    @cached_property
    def example(self) -> ModelInputs:
        """One call's inputs, on the CPU. Two samples at least, so that the batch can be told."""
        inputs = self.subset.inputs[0]
        return inputs.with_batch(min(max(inputs.batch_size, 2), EXAMPLE_SAMPLES))

    @cached_property
    def context(self) -> TechniqueContext:
        """What the techniques may know."""
        multiple = WIDTH_MULTIPLE[self.config.optimization]
        is_latency = self.config.optimization == "latency"
        return TechniqueContext(
            inputs=self.example.to(self.device),
            width_multiple=multiple,
            min_width=multiple,
            importance=self.config.importance,
            group_cost=(lambda *of: self._costs.group_cost(*of)) if is_latency else None,
            accumulate_gradients=self._accumulate_gradients,
            stores_compact=self._counts_bytes and self._deployment.target.stores_compact,
            layer_saves=(lambda *of: self._costs.layer_saves(*of)) if is_latency else None,
            layer_formats=lambda: self._numbers.formats,
        )

    @cached_property
    def recovery(self) -> Recovery:
        """The trainer's side of the job."""
        return Recovery(
            self.config,
            self.config.eval_key or next(iter(self._judging.reference.metrics)),
            self.task,
            (lambda: self._teacher) if self._answers_alike else None,
            self.data,
            lambda model: self._judging.evaluate(model, self.config.eval_split),
            self._progress,
        )

    @cached_property
    def _teacher(self) -> nn.Module:
        """The reference, to learn from."""
        return as_teacher(self.reference, self.subset.inputs)

    @cached_property
    def _judging(self) -> Judging:
        """Evaluates and times."""
        return Judging(
            self.config,
            self.task,
            self.data,
            self.reference,
            self.example,
            lambda: self._deployment,
        )

    @cached_property
    def _sensing(self) -> Sensing:
        """Makes variants, and measures their damage."""
        return Sensing(
            self.reference,
            self.subset,
            self.techniques,
            lambda: self.context,
            is_classifier=self.config.task_type == "classification",
        )

    @cached_property
    def _costs(self) -> ReferenceCosts:
        """What layers of the reference cost."""
        return ReferenceCosts(
            self.reference,
            self.example,
            self.config,
            self._deployment,
            self._numbers,
            techniques=self.techniques,
            folder=self._folder,
            key=self._reference_digest(),
            latency_ms=lambda: self._judging.reference.cost.latency_ms,
            time_ms=self._judging.latency_ms,
            is_dryrun=self._job.is_dryrun,
        )

    @cached_property
    def _numbers(self) -> Numbers:
        """The reference in few bits."""
        return Numbers(
            self.config,
            self._deployment,
            self.reference,
            self.example,
            self.subset.inputs,
            self._lose,
        )

    @cached_property
    def _answers_alike(self) -> bool:
        """Whether the model's outputs in training are of the form that they have in evaluation."""
        batch = first_batch(self.data["train"])
        alike = answers_alike(self.task, self.reference, batch, self.device, self.config.seed)
        trainers = (self.config.fine_tuner, self.config.full_trainer)
        if not alike and any(trainer.distillation is not None for trainer in trainers):
            self._lose(
                "In training the model returns something else than in evaluation: it is recovered "
                "by your loss alone, without distillation."
            )
        return alike

    def _reference_digest(self) -> str:
        """Of the reference, the subset, and the task's way of comparing outputs."""
        return digest([model_digest(self.reference), self.subset.digest(), self.config.task_type])

    @property
    def _counts_bytes(self) -> bool:
        """Whether a smaller file is worth anything in this run."""
        is_limited = self.config.budget.size_bytes is not None
        return is_limited or self.config.optimization == "compression"

    def _accumulate_gradients(self, model: nn.Module) -> None:
        """The gradient of the user's loss over the subset; batch norms use their statistics."""
        if self._answers_alike:
            model.eval()
        else:
            _train_steadily(model)
        for batch in self.subset.batches:
            terms = self.task.loss(model, move(batch, self.device))
            torch.stack([term.float() for term in terms.values()]).sum().backward()  # type: ignore[no-untyped-call]

    def _lose(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._lost.append(sentence)


def _train_steadily(model: nn.Module) -> None:
    """Put `model` into training mode, in place, but for what draws and what keeps statistics."""
    for module in model.train().modules():
        if isinstance(module, (_NormBase, _DropoutNd)):
            module.eval()
