"""Everything that algorithms see and may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import LossError, MetricError, SurgeryError, suggest
from compressor.interfaces.inputs import ModelInputs
from compressor.interfaces.optimizers import Schedule
from compressor.training import binding
from compressor.training.clock import Clock, Duration
from compressor.training.events import IN_USE, Event
from compressor.training.precision import Precision

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit
    from compressor.training.algorithm import Algorithm


@dataclass
class State:
    """A training as it stands.

    Attributes:
        model: is trained, in place.
        max_duration: the whole, of which `fraction` is a part.
        device: of model and batches.
        precision: in which steps compute; parameters stay as they are.
        seed: of all that is drawn.
        clock: what is done.
        event: that was fired last; None before SETUP.
        algorithms: are told of edits.
        optimizer: None until SETUP is over.
        schedule: of the learning rate; None until SETUP is over.
        batch: as the loader gave it, on `device`.
        inputs: of the latest call of the model in this step; recorded only while somebody listens
            to BEFORE_FORWARD or AFTER_FORWARD.
        outputs: of that call.
        losses: named terms of this batch, each of shape ().
        weights: by which terms enter the total; 1 where there is none.
        task_terms: names of the terms that the user's own loss gave.
        step_skipped: the last step was left out, because the gradients had overflowed.
        metrics: of the last evaluation, by the user's names.
        train_metrics: mean of each term, and of the total, over the last epoch.
        stop_reason: why training ends early; '' when it does not.
    """

    model: nn.Module
    max_duration: Duration
    device: torch.device
    precision: Precision = "fp32"
    seed: int = 0
    clock: Clock = field(default_factory=Clock)
    event: Event | None = None
    algorithms: tuple[Algorithm, ...] = ()
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    batch: Any = None
    inputs: ModelInputs | None = None
    outputs: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    task_terms: tuple[str, ...] = ()
    step_skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    train_metrics: dict[str, float] = field(default_factory=dict)
    stop_reason: str = ""

    @property
    def fraction(self) -> float:
        """The part of the whole training that has passed, 0 to 1."""
        return self.clock.fraction_of(self.max_duration)

    @property
    def is_finished(self) -> bool:
        """Whether there is no further batch to train."""
        return bool(self.stop_reason) or self.clock.has_reached(
            self.max_duration, self.max_duration
        )

    def stop(self, reason: str) -> None:
        """Let training end after this batch, or at once when it is between epochs."""
        self.stop_reason = reason

    def forget_batch(self) -> None:
        """Let go of the last batch and all that was computed from it."""
        self.event = self.batch = self.inputs = self.outputs = None
        self.losses = {}

    def begin_losses(self, losses: dict[str, Tensor]) -> None:
        """Take the terms of the user's own loss; forget those of the batch before."""
        self.losses, self.weights, self.task_terms = losses, {}, tuple(losses)

    def add_loss(self, name: str, value: Tensor, weight: float) -> None:
        """One more term.

        Raises:
            LossError: if there is one of that name.
        """
        if name in self.losses:
            raise LossError(
                f"There is already a loss term {name!r}. "
                "Rename the loss function's, or set the algorithm's `key`."
            )
        self.losses[name] = value
        self.weights[name] = weight

    def total_loss(self) -> Tensor:
        """Sum of weight × term, of shape ()."""
        total: Tensor | None = None
        for name, value in self.losses.items():
            weight = self.weights.get(name, 1.0)
            term = value if weight == 1.0 else weight * value
            total = term if total is None else total + term
        if total is None:
            raise LossError("The loss has no term. Return a tensor, or a dict of them.")
        return total

    def metric(self, key: str) -> float:
        """The value of the last evaluation.

        Raises:
            MetricError: if the evaluation does not give `key`.
        """
        if key not in self.metrics:
            raise MetricError(f"The evaluation gave no {key!r}. {suggest(key, self.metrics)}")
        return self.metrics[key]

    def edit(self, change: Callable[[nn.Module], Edit]) -> Edit:
        """Change the model through `structure.surgery`; all that is bound to parameters follows.

        The only way to change parameters once there is a trainer: a parameter exchanged behind the
        optimizer's back is never trained, without any error.

        Args:
            change: is called with the model, edits it in place, and returns what surgery returned.

        Returns:
            What `change` returned.

        Raises:
            SurgeryError: in the middle of a batch or an evaluation.

        Example: `state.edit(lambda model: surgery.keep_channels(model, group, kept))`.
        """
        if self.event in IN_USE:
            raise SurgeryError(
                f"The model cannot change its structure at {self.event.name}, when tensors of it "
                "are in use. Do it at SETUP or BATCH_END."
            )
        before = binding.parameter_names(self.model)
        edit = change(self.model)
        if self.optimizer is not None:
            binding.rebind(self.optimizer, before, self.model, edit)
        for algorithm in self.algorithms:
            algorithm.rebind(edit, self)
        return edit
