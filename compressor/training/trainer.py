"""One trainer for recovery, distillation and a user's own training: the loop of `Event`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import ConfigError, DataError
from compressor.interfaces.data import kept_generators, move, sample_count, seed_generators
from compressor.interfaces.evaluation import evaluating
from compressor.interfaces.optimizers import (
    OptimizerSpec,
    SchedulerConfig,
    SchedulerSpec,
    make_optimizer,
    make_scheduler,
)
from compressor.logs import get_logger
from compressor.seeding import derive_seed, isolated_rng
from compressor.training import binding, resume
from compressor.training.algorithm import Algorithm, Callback
from compressor.training.checkpoint import LATEST, read_checkpoint, write_checkpoint
from compressor.training.clock import Clock, Duration, DurationLike, parse_total
from compressor.training.dispatch import Dispatch
from compressor.training.events import Event
from compressor.training.meter import LossMeter
from compressor.training.precision import (
    Precision,
    check_precision,
    make_autocast,
    make_scaler,
)
from compressor.training.schedules import make_default_schedule
from compressor.training.state import State
from compressor.training.step import (
    check_differentiable,
    forward_events,
    in_training_mode,
    named_terms,
)

logger = get_logger(__name__)

Step: TypeAlias = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
Evaluate: TypeAlias = Callable[[nn.Module], Mapping[str, float]]


class Trainer:
    """Trains `model` in place.

    Nothing is drawn from the caller's generators, the global ones or the loader's own: every epoch
    seeds them anew from `seed`, and their states are put back after a fit. With `save_dir`, a
    checkpoint is written after every epoch, from which `resume` goes on as if nothing had happened:
    bit-equal on the CPU, if the loader's workers are not persistent (their generators outlive the
    epoch).

    Args:
        model: is moved to `device`.
        step: (model, batch) -> loss terms; calls the model itself. A tensor is the term "loss".
        train_dataloader: any iterable of batches that can be iterated again.
        evaluate: model -> metrics. Called in eval mode, without gradients.
        optimizers: a dict with "name", a factory, or an optimizer of the model's parameters; None
            is the default of `make_optimizer`.
        schedulers: a dict with "name", or a factory; None is `schedules.warmup_cosine`.
        max_duration: '10ep', '500ba', '1e6sp'; an int counts epochs.
        eval_interval: between evaluations. One always follows the end.
        eval_skip: no evaluation before so much has been trained, but for the one at the end.
        eval_key: the metric that a schedule with interval "eval" is stepped with.
        algorithms: change the training.
        callbacks: watch it.
        device: of torch.
        precision: in which steps compute; "fp16" scales the loss.
        learning_rate: where `optimizers` says none.
        seed: of all that is drawn.
        save_dir: folder of the checkpoint; None writes none.

    Raises:
        ConfigError: what contradicts itself.

    >>> data = [(torch.ones(4, 2), torch.zeros(4, 1))]
    >>> trainer = Trainer(
    ...     nn.Linear(2, 1),
    ...     lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    ...     train_dataloader=data,
    ...     optimizers={"name": "SGD", "lr": 0.1},
    ...     max_duration="20ep",
    ... )
    >>> trainer.fit()
    >>> trainer.state.train_metrics["train/loss"] < 0.1
    True
    """

    def __init__(
        self,
        model: nn.Module,
        step: Step,
        *,
        train_dataloader: Iterable[Any],
        evaluate: Evaluate | None = None,
        optimizers: OptimizerSpec | Optimizer | None = None,
        schedulers: SchedulerConfig | SchedulerSpec | None = None,
        max_duration: DurationLike = "10ep",
        eval_interval: DurationLike = "1ep",
        eval_skip: DurationLike = "0ep",
        eval_key: str | None = None,
        algorithms: Sequence[Algorithm] = (),
        callbacks: Sequence[Callback] = (),
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        learning_rate: float = 0.01,
        seed: int = 0,
        save_dir: str | Path | None = None,
    ) -> None:
        check_precision(precision)
        device = torch.device(device)
        self.dispatch = Dispatch(algorithms, callbacks)
        self.train_dataloader = train_dataloader
        # Hooks cost as much as all the rest of the engine: only for those who listen.
        is_heard = self.dispatch.is_heard(Event.BEFORE_FORWARD, Event.AFTER_FORWARD)
        self._call_step = self._observe_step if is_heard else step
        self.step = step
        self._evaluate_model = evaluate
        self._eval_interval = _parse_interval(eval_interval)
        self._eval_skip = Duration.parse(eval_skip)
        self._eval_key = eval_key
        self._evaluated_at = -1
        self._evaluations_due = 0
        self._save_dir = None if save_dir is None else Path(save_dir)
        self._autocast = make_autocast(precision, device)
        self.scaler = make_scaler(precision, device)
        self.state = State(
            model,
            parse_total(max_duration),
            device,
            precision,
            seed,
            Clock(batches_per_epoch=_length(train_dataloader)),
            algorithms=self.dispatch.algorithms,
        )
        with isolated_rng(derive_seed(seed, "setup")):
            self.dispatch.fire(Event.SETUP, self.state)
            model.to(device)
            self.optimizer = (
                optimizers
                if isinstance(optimizers, Optimizer)
                else make_optimizer(optimizers, model, learning_rate)
            )
        binding.check_bound(self.optimizer, model)
        self.schedule = make_scheduler(schedulers, self.optimizer) or make_default_schedule(
            self.optimizer, lambda: self.state.fraction
        )
        if self.schedule.interval == "eval" and (evaluate is None or eval_key is None):
            raise ConfigError(
                "The scheduler steps with the metric, and there is none. "
                "Give `evaluate` and `eval_key`, or another interval."
            )
        self.state.optimizer, self.state.schedule = self.optimizer, self.schedule

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.state.model

    def fit(self, duration: DurationLike | None = None) -> None:
        """Train up to `max_duration`, or `duration` more, which then is the new `max_duration`.

        A fit that was stopped early, or is complete, ends at once unless `duration` is given. All
        that listens is closed at the end, also when an error or Ctrl-C is the end.

        Raises:
            DivergedError: the loss became infinite or NaN.
            LossError: the loss is no scalar, or does not depend on the model.
            DataError: the loader gives no batch.
        """
        state = self.state
        if duration is not None:
            self._extend(parse_total(duration))
        if state.is_finished:
            return
        with ExitStack() as stack:
            stack.enter_context(kept_generators(self.train_dataloader))
            stack.callback(state.forget_batch)
            for listener in self.dispatch.listeners:
                stack.callback(listener.close)
            stack.enter_context(isolated_rng(derive_seed(state.seed, "fit")))
            stack.enter_context(in_training_mode(state.model))
            self._evaluations_due = self._count_due()
            self._fire(Event.FIT_START)
            while not state.is_finished:
                self._train_epoch()
                if not state.is_finished:
                    self._evaluate_if_due()
                    self._save()
            self._fire(Event.FIT_END)
            self._evaluate_at_end()
            self._save()

    def evaluate(self) -> dict[str, float]:
        """Evaluate the model as it is; the metrics are also `state.metrics`.

        Raises:
            ConfigError: if there is no `evaluate`.
        """
        if self._evaluate_model is None:
            raise ConfigError("This trainer has nothing to evaluate with. Give it `evaluate`.")
        clock = self.state.clock
        with isolated_rng(derive_seed(self.state.seed, "evaluate", clock.batch)):
            self._fire(Event.EVAL_START)
            with evaluating(self.model), torch.no_grad():
                metrics = self._evaluate_model(self.model)
            self.state.metrics = {name: float(value) for name, value in metrics.items()}
            self._evaluated_at = clock.batch
            self._fire(Event.EVAL_END)
        return self.state.metrics

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer made alike needs to go on from here."""
        return resume.state_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it is of another model, optimizer or list of algorithms; nothing is
                loaded then.
        """
        resume.load_state_dict(self, saved)

    def resume(self) -> bool:
        """Load the checkpoint of `save_dir`, if there is one; say whether there was.

        Raises:
            CheckpointError: if it is truncated, altered, or of another training.
        """
        path = self._save_dir and self._save_dir / LATEST
        if not path or not path.exists():
            return False
        self.load_state_dict(read_checkpoint(path))
        logger.info("going on after epoch %d of %s", self.state.clock.epoch, path)
        return True

    def _train_epoch(self) -> None:
        state, fire, clock = self.state, self._fire, self.state.clock
        clock.batch_in_epoch = 0  # an interrupted fit may have left some
        self._meter = LossMeter()
        resume.set_epoch(self.train_dataloader, clock.epoch)
        seed_generators(self.train_dataloader, derive_seed(state.seed, "loader", clock.epoch))
        with isolated_rng(derive_seed(state.seed, "epoch", clock.epoch)):
            fire(Event.EPOCH_START)
            for batch in self.train_dataloader:
                state.batch = move(batch, state.device, non_blocking=True)
                fire(Event.BATCH_START)
                self._train_batch()
                fire(Event.BATCH_END)
                if state.is_finished:
                    break
                self._evaluate_if_due()
            if not clock.batch_in_epoch:
                raise DataError(
                    f"The training loader gave no batch in epoch {clock.epoch + 1}. If one pass "
                    "uses it up, wrap it in a class whose __iter__ starts anew."
                )
            state.train_metrics = self._meter.means(clock)
            clock.end_epoch()
            fire(Event.EPOCH_END)
        if self.schedule.interval == "epoch":
            self.schedule.step()

    def _train_batch(self) -> None:
        state, fire, optimizer, scaler = self.state, self._fire, self.optimizer, self.scaler
        optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            losses = self._call_step(state.model, state.batch)
            state.begin_losses(named_terms(losses))
            fire(Event.AFTER_LOSS)
            total = state.total_loss()
        check_differentiable(total)
        self._meter.update(state.losses, total, state.clock)
        scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        fire(Event.BEFORE_STEP)
        state.step_skipped = self._step_optimizer()
        fire(Event.AFTER_STEP)
        state.clock.advance(sample_count(state.batch))
        if self.schedule.interval == "iteration" and not state.step_skipped:
            self.schedule.step()

    def _observe_step(self, model: nn.Module, batch: Any) -> Tensor | Mapping[str, Tensor]:
        with forward_events(self.state, self._fire):
            return self.step(model, batch)

    def _step_optimizer(self) -> bool:
        """Step, and say whether the step was skipped."""
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return False
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return bool(self.scaler.get_scale() < scale)

    def _evaluate_if_due(self) -> None:
        due = self._count_due()
        if due > self._evaluations_due:
            self._evaluations_due = due
            if self.state.clock.has_reached(self._eval_skip, self.state.max_duration):
                self._evaluate_and_schedule()

    def _evaluate_at_end(self) -> None:
        was_evaluated = self._evaluated_at == self.state.clock.batch
        if not was_evaluated or self.dispatch.changes_at(Event.FIT_END):
            self._evaluate_and_schedule()

    def _evaluate_and_schedule(self) -> None:
        if self._evaluate_model is None:
            return
        self.evaluate()
        if self.schedule.interval == "eval" and self._eval_key is not None:
            self.schedule.step(self.state.metric(self._eval_key))

    def _count_due(self) -> int:
        """How many evaluations are due by now, in all."""
        interval = self._eval_interval
        return int(self.state.clock.now(interval.unit) // interval.value)

    def _save(self) -> None:
        if self._save_dir is not None:
            self._fire(Event.CHECKPOINT)
            write_checkpoint(self._save_dir / LATEST, self.state_dict())

    def _extend(self, duration: Duration) -> None:
        state = self.state
        state.max_duration = replace(
            duration, value=state.clock.now(duration.unit) + duration.value
        )
        state.stop_reason = ""

    def _fire(self, event: Event) -> None:
        self.dispatch.fire(event, self.state)


def _parse_interval(value: DurationLike) -> Duration:
    interval = parse_total(value)
    if not interval.value:
        raise ConfigError(f"{value!r} is no interval. Write 1 or more.")
    return interval


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterable dataset
        return None
