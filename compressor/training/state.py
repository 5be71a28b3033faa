"""Everything that algorithms see and may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.distributed import Context, SingleProcess
from compressor.errors import ConfigError, LossError, MetricError, SurgeryError, suggest
from compressor.interfaces.inputs import device_of
from compressor.interfaces.optimizers import Schedule
from compressor.structure.describe import diff
from compressor.structure.surgery import Edit
from compressor.training import binding
from compressor.training.clock import Clock, Duration, parse_total
from compressor.training.events import SURGERY_ALLOWED, Event
from compressor.training.loading import epoch_length
from compressor.training.precision import Precision
from compressor.training.step import Call, Step, make_step

if TYPE_CHECKING:
    from compressor.training.algorithm import Algorithm
    from compressor.training.loggers.base import Logger


@dataclass
class State:
    """A training as it stands. A trainer makes one; for a loop of your own, give the first four.

    Attributes:
        model: is trained, in place.
        max_duration: the whole, of which `fraction` is a part: '10ep', 3, a `Duration`.
        device: of model and batches; None: where the model is.
        train_dataloader: what is trained on.
        precision: in which steps compute; parameters stay as they are.
        seed: of all that is drawn.
        rank: of this process, 0 if it is the only one.
        context: the processes that train together. What is decided from values that differ between
            them must be reduced through it, or their models part.
        clock: what is done.
        event: that was fired last; None before SETUP.
        algorithms: are told of edits.
        loggers: what `log` tells.
        optimizer: None until SETUP is over.
        schedule: of the learning rate; None until SETUP is over.
        runner: what is called: the model, perhaps compiled, or wrapped for several processes.
        batch: on `device`; the micro-batch from BEFORE_FORWARD to AFTER_LOSS, else the whole.
        outputs: of the model for it.
        calls: of the model for it; recorded only while somebody listens to AFTER_FORWARD or
            AFTER_LOSS.
        losses: named terms of this batch, each of shape ().
        weights: by which terms enter the total; 1 where there is none.
        task_terms: names of the terms that the user's own loss gave.
        step_skipped: the last step was left out, because the gradients had overflowed.
        metrics: the latest of each evaluator, by the user's names, "label/name" if it has a label.
        evaluator: label of the one that ran last, or is running.
        evaluated: names of the metrics that it gave.
        train_metrics: "train/" and the name: mean of each term, and of the total, over the last
            epoch, and the task's own metrics of training.
        stop_reason: why training ends early; '' when it does not.
        values: what a step of your own returned last, and what callbacks of recipes keep.
    """

    model: nn.Module
    max_duration: Duration
    device: torch.device = None  # type: ignore[assignment]
    train_dataloader: Any = ()
    precision: Precision = "fp32"
    seed: int = 0
    rank: int = 0
    clock: Clock = field(default_factory=Clock)
    context: Context = field(default_factory=SingleProcess)
    event: Event | None = None
    algorithms: tuple[Algorithm, ...] = ()
    loggers: tuple[Logger, ...] = ()
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None
    runner: Any = None
    batch: Any = None
    outputs: Any = None
    calls: list[Call] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    task_terms: tuple[str, ...] = ()
    step_skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    evaluator: str = ""
    evaluated: frozenset[str] = frozenset()
    train_metrics: dict[str, float] = field(default_factory=dict)
    stop_reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    step: Step | None = field(default=None, repr=False)
    skeleton: nn.Module | None = field(default=None, repr=False)
    recompute: Callable[[], None] | None = field(default=None, repr=False)
    on_edit: Callable[[], None] | None = field(default=None, repr=False)
    _given: dict[str, frozenset[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Settle what was left out."""
        self.max_duration = parse_total(self.max_duration)
        if self.device is None:
            self.device = device_of(self.model)
        if self.runner is None:
            self.runner = self.model
        if self.clock.batches_per_epoch is None:
            self.clock.batches_per_epoch = epoch_length(self.train_dataloader) or None

    @property
    def fraction(self) -> float:
        """The part of the whole training that has passed, 0 to 1."""
        return self.clock.fraction_of(self.max_duration)

    @property
    def is_finished(self) -> bool:
        """Whether there is no further batch to train."""
        total = self.max_duration
        return bool(self.stop_reason) or self.clock.now(total.unit) >= total.value

    def stop(self, reason: str) -> None:
        """Let training end after this batch, or at once when it is between epochs."""
        self.stop_reason = reason

    def forget_batch(self) -> None:
        """Let go of the last batch and all that was computed from it."""
        self.event = self.batch = self.outputs = None
        self.losses, self.calls = {}, []

    @property
    def loss(self) -> Tensor:
        """The total, of shape (), a copy. Setting it makes the value the only term, "loss"."""
        return self.total_loss().clone()  # `state.loss *= 2` would change a term in place

    @loss.setter
    def loss(self, value: Tensor | Mapping[str, Tensor]) -> None:
        self.begin_losses(dict(value) if isinstance(value, Mapping) else {"loss": value})

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
        if total.dim():
            shapes = {name: tuple(value.shape) for name, value in self.losses.items()}
            raise LossError(f"The loss terms have the shapes {shapes}. Each must be a scalar.")
        return total

    def recompute_loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The terms of the user's own loss for `outputs` of the present batch, without the model.

        Args:
            outputs: such as `state.outputs`.
            batch: the present one with other targets in it.
        """
        return self._known_step().loss(self, outputs, batch)

    def run_model(self, model: nn.Module, batch: Any) -> Any:
        """Call `model`, this one or another of its kind, on `batch` as the step does.

        Returns:
            A task's outputs; of a function of (model, batch), the loss that it gives.
        """
        return self._known_step().call(model, batch)

    def recompute_gradients(self) -> None:
        """Compute the gradients of this batch anew, with the same random numbers; at BEFORE_STEP.

        They are complete and unscaled, and take the place of those that were there.

        Raises:
            ConfigError: without a trainer, or if the algorithm does not say `recomputes = True`.
        """
        if self.recompute is None or self.event is not Event.BEFORE_STEP:
            raise ConfigError(
                "Gradients can be computed anew only at BEFORE_STEP, in a Trainer, by an algorithm "
                "whose class says `recomputes = True`."
            )
        self.recompute()
        self.event = Event.BEFORE_STEP

    def take_metrics(self, metrics: Mapping[str, float]) -> None:
        """Take what the evaluator of the label `evaluator` gave, in place of what it gave last."""
        before = self._given.get(self.evaluator, frozenset())
        kept = {name: value for name, value in self.metrics.items() if name not in before}
        self.metrics = {**kept, **metrics}
        self.evaluated = self._given[self.evaluator] = frozenset(metrics)

    def metric(self, key: str) -> float:
        """The value of the last evaluation.

        Raises:
            MetricError: if the evaluation does not give `key`.
        """
        if key not in self.metrics:
            raise MetricError(f"The evaluation gave no {key!r}. {suggest(key, self.metrics)}")
        return self.metrics[key]

    def log(self, metrics: Mapping[str, float]) -> None:
        """Hand `metrics` to all loggers, as of this batch."""
        for logger in self.loggers:
            logger.log(metrics, self.clock.batch)

    def structure(self) -> dict[str, Any] | None:
        """The edits since the beginning, as JSON; None where a trainer does not keep account."""
        return None if self.skeleton is None else diff(self.skeleton, self.model)

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

        Example: `state.edit(lambda model: cutting.keep_channels(model, group, kept))`.
        """
        if self.event not in SURGERY_ALLOWED:
            assert self.event is not None
            raise SurgeryError(
                f"The model cannot change its structure at {self.event.name}, when tensors of it "
                "are in use. Do it at SETUP, BATCH_END or EPOCH_END."
            )
        before = binding.parameter_names(self.model)
        edit = change(self.model)
        if not isinstance(edit, Edit):
            raise SurgeryError(
                f"The change returned a {type(edit).__name__}. Return what surgery returned, by "
                "which the optimizer follows: return surgery.replace(model, name, new)."
            )
        if self.optimizer is not None:
            binding.rebind(self.optimizer, before, self.model, edit)
        for algorithm in self.algorithms:
            algorithm.rebind(edit, self)
        if self.on_edit is not None:
            self.on_edit()
        return edit

    def _known_step(self) -> Step:
        if self.step is None:
            self.step = make_step(self.model, None, is_observed=True)
        return self.step
