"""The trainer: one loop for recovery, distillation, quantization-aware training, a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from compressor.distributed import current_context
from compressor.errors import ConfigError, DataError
from compressor.interfaces.data import kept_generators, move
from compressor.interfaces.evaluation import evaluating
from compressor.interfaces.optimizers import Schedule
from compressor.logs import get_logger
from compressor.seeding import derive_seed, isolated_rng
from compressor.structure.describe import outline
from compressor.training import resume
from compressor.training.algorithm import Algorithm, Callback
from compressor.training.checkpoint import LATEST, read_checkpoint, write_checkpoint
from compressor.training.clock import Clock, Duration, DurationLike, Every, Stopwatch, parse_total
from compressor.training.dispatch import Dispatch
from compressor.training.evaluator import (
    Evaluations,
    Evaluator,
    make_evaluators,
    run_evaluator,
)
from compressor.training.events import Event
from compressor.training.gradients import Gradients, MicroBatchSize
from compressor.training.loading import batches_from, epoch_length, prepare_loader
from compressor.training.loggers.base import Logger
from compressor.training.meter import TrainMeter
from compressor.training.precision import Precision, check_precision, make_autocast, make_scaler
from compressor.training.registered import Registered
from compressor.training.setup import (
    DeviceLike,
    Optimizers,
    Schedulers,
    set_schedule,
    set_up,
    torch_device,
)
from compressor.training.state import State
from compressor.training.step import LossFunction, ManualStep, in_training_mode, make_step
from compressor.training.tasks.base import TaskModel

logger = get_logger(__name__)


class Trainer:
    """Trains `model` in place.

    Nothing is drawn from the caller's generators, the global ones or the loader's own: every epoch
    seeds them anew from `seed`, and their states are put back after a fit. With `save_dir`, a
    checkpoint is written at every `save_interval`, from which `resume` goes on as if nothing had
    happened: bit-equal on the CPU, if the loader's workers are not persistent (their generators
    outlive the epoch).

    Args:
        model: is moved to `device`. A `TaskModel` says itself how it is trained and evaluated.
        step: (model, batch) -> loss terms, for any other model; calls the model itself. A tensor is
            the term "loss". Or a `ManualStep`, which does all that is to be done with a batch.
        train_dataloader: any iterable of batches that can be iterated again.
        eval_dataloader: a loader, an `Evaluator`, or a list of them.
        optimizers: a dict with "name", an optimizer of the model's parameters, a factory, or a
            function of the model; None is the default of `make_optimizer`.
        schedulers: a dict with "name", a scheduler of that optimizer, a factory, or a function of
            the optimizer; None is `schedules.warmup_cosine`.
        max_duration: '10ep', '500ba', '1e6sp', '90m'; an int counts epochs.
        eval_interval: between evaluations. One always follows the end.
        eval_skip: no evaluation before so much has been trained, but for the one at the end.
        eval_key: the metric that a schedule with interval "eval" is stepped with.
        algorithms: change the training.
        callbacks: watch it.
        loggers: are told of losses, metrics, and what callbacks measure.
        micro_batch_size: samples of which the gradients are computed at once; "auto" finds what
            fits into memory; None takes a batch as it comes.
        compile: run the model through `torch.compile`; a mapping is its options.
        device: of torch, or "GPU".
        precision: in which steps compute; "fp16" scales the loss.
        learning_rate: where `optimizers` says none.
        seed: of all that is drawn.
        save_dir: folder of the checkpoint; None writes none.
        save_interval: between checkpoints. One always follows the end.
        log_interval: between the losses that loggers are told of.
        autoresume: `fit` goes on from the checkpoint of `save_dir`, if there is one.

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
        step: LossFunction | ManualStep | None = None,
        *,
        train_dataloader: Iterable[Any] = (),
        eval_dataloader: Iterable[Any] | Evaluator | Sequence[Evaluator] | None = None,
        optimizers: Optimizers = None,
        schedulers: Schedulers = None,
        max_duration: DurationLike = "10ep",
        eval_interval: DurationLike = "1ep",
        eval_skip: DurationLike = "0ep",
        eval_key: str | None = None,
        algorithms: Sequence[Algorithm] = (),
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
        micro_batch_size: MicroBatchSize = None,
        compile: bool | Mapping[str, Any] = False,
        device: DeviceLike = "cpu",
        precision: Precision = "fp32",
        learning_rate: float = 0.01,
        seed: int = 0,
        save_dir: str | Path | None = None,
        save_interval: DurationLike = "1ep",
        log_interval: DurationLike = "1ep",
        autoresume: bool = False,
    ) -> None:
        check_precision(precision)
        if autoresume and save_dir is None:
            raise ConfigError("autoresume needs a folder of checkpoints. Give save_dir.")
        self.dispatch = Dispatch(algorithms, [*callbacks, *loggers])
        self.train_dataloader = train_dataloader
        self.evaluations = Evaluations(make_evaluators(eval_dataloader), eval_interval, eval_skip)
        self.registered = Registered()
        self.context = current_context()
        self.state = state = State(
            model,
            parse_total(max_duration),
            torch_device(device),
            train_dataloader,
            precision,
            seed,
            self.context.rank,
            Clock(batches_per_epoch=epoch_length(train_dataloader)),
            algorithms=self.dispatch.algorithms,
            loggers=tuple(loggers) if self.context.rank == 0 else (),
        )
        self._fire = partial(self.dispatch.fire, state=state)
        self.meter = TrainMeter(model, log_interval)
        self._eval_key = eval_key
        self._save_every = Every(save_interval)
        self._save_dir = None if save_dir is None else Path(save_dir)
        self._autoresume = autoresume
        self._changes_at_the_end = self.dispatch.changes_at(Event.FIT_END)
        self._interrupted: Mapping[str, Any] | None = None  # the generators within an epoch
        self._is_fitting = False
        self._looks_within_epochs = not all(
            every.is_by_epoch
            for every in (*self.evaluations.intervals, self._save_every, self.meter.every)
        )
        self._stopwatch = Stopwatch(state.clock)
        self.scaler = make_scaler(precision, state.device)
        self._is_scaled = self.scaler.is_enabled()
        self._manual = step if isinstance(step, ManualStep) else None
        if not isinstance(step, ManualStep):
            is_heard = self.dispatch.is_heard(Event.AFTER_FORWARD, Event.AFTER_LOSS)
            state.step = make_step(model, step, is_observed=is_heard)
            self._gradients = Gradients(
                state.step,
                self._fire,
                make_autocast(precision, state.device),
                self.scaler,
                self.context,
                micro_batch_size,
                recomputes=any(each.recomputes for each in self.dispatch.algorithms),
            )
            state.recompute = partial(self._gradients.recompute, state)
        set_up(state, self.dispatch, optimizers, None if self._manual else learning_rate)
        if self._manual is None:
            has_metric = bool(self.evaluations.all) and eval_key is not None
            set_schedule(state, schedulers, has_metric=has_metric)
            if save_dir is not None:
                state.skeleton = outline(model)
        if compile:
            options = compile if isinstance(compile, Mapping) else {}
            state.runner = torch.compile(model, **options)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.state.model

    @property
    def optimizer(self) -> Optimizer | None:
        """Of the model; None with a `ManualStep`."""
        return self.state.optimizer

    @property
    def schedule(self) -> Schedule | None:
        """Of the learning rate; None with a `ManualStep`."""
        return self.state.schedule

    def register(self, name: str, value: Any) -> None:
        """Save `value` with the checkpoints, and restore it: a model, a tensor, a plain value.

        Raises:
            ConfigError: if `name` could not be an attribute.
        """
        self.registered.add(name, value)

    def fit(self, duration: DurationLike | None = None) -> None:
        """Train up to `max_duration`, or `duration` more, which then is the new `max_duration`.

        A fit that was stopped early, or is complete, ends at once unless `duration` is given. All
        that listens is closed at the end, also when an error or Ctrl-C is the end.

        Raises:
            DivergedError: the loss became infinite or NaN.
            LossError: the loss is no scalar, or does not depend on the model.
            DataError: the loader gives no batch, or fails.
        """
        state = self.state
        if self._autoresume and not state.clock.batch:
            self.resume()
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
            self.registered.to(state.device)
            for every in (*self.evaluations.intervals, self._save_every, self.meter.every):
                every.begin(state.clock)
            self._stopwatch.start()
            stack.callback(setattr, self, "_is_fitting", False)
            self._is_fitting = True
            self._agree()
            self._tell_loggers()
            self._fire(Event.FIT_START)
            while not state.is_finished:
                self._train_epoch()
                if not state.is_finished:
                    self._look_around()
            self._fire(Event.FIT_END)
            if not self.evaluations.is_up_to_date(state.clock) or self._changes_at_the_end:
                self._evaluate(self.evaluations.all)
            self._save()

    def eval(self) -> dict[str, float]:
        """Run all evaluators on the model as it is; the metrics are also `state.metrics`.

        Raises:
            ConfigError: if there is none.
        """
        if not self.evaluations.all:
            raise ConfigError("This trainer has nothing to evaluate on. Give eval_dataloader.")
        self._evaluate(self.evaluations.all)
        return self.state.metrics

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Outputs of the task for each batch, on the CPU, in eval mode.

        Raises:
            ConfigError: if the model is no `TaskModel`.
        """
        task = self.model
        if not isinstance(task, TaskModel):
            raise ConfigError(
                f"How {type(task).__name__} is called on a batch is known only to its loss. "
                "Wrap it in a task, such as ClassifierTask(model), to predict."
            )
        state = self.state
        task.to(state.device)
        cpu = torch.device("cpu")
        with evaluating(task), torch.no_grad(), isolated_rng(derive_seed(state.seed, "predict")):
            batches = (move(batch, state.device) for batch in dataloader)
            return [move(task.eval_forward(batch), cpu) for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer made alike needs to go on from here."""
        return resume.state_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it is of another model, optimizer or list of algorithms; nothing is
                loaded then.
        """
        self._interrupted = resume.load_state_dict(self, saved)

    def resume(self, path: str | Path | None = None) -> bool:
        """Load the checkpoint at `path`, or that of `save_dir`; say whether there was one.

        Raises:
            CheckpointError: if it is truncated, altered, or of another training.
        """
        if path is None:
            path = self._save_dir and self._save_dir / LATEST
            if not path or not path.exists():
                return False
        self.load_state_dict(read_checkpoint(Path(path)))
        clock = self.state.clock
        logger.info("going on after epoch %d, batch %d of %s", clock.epoch, clock.batch, path)
        return True

    def _train_epoch(self) -> None:
        state, fire, clock = self.state, self._fire, self.state.clock
        generators, self._interrupted = self._interrupted, None
        prepare_loader(self.train_dataloader, state.seed, clock.epoch)
        if generators is None:
            clock.batch_in_epoch = 0  # an interrupted fit may have left some
            self.meter.begin_epoch()
            with isolated_rng(self._seed("epoch start")):
                fire(Event.EPOCH_START)
        with isolated_rng(self._seed("epoch")):
            for batch in batches_from(self.train_dataloader, clock, generators):
                state.batch = move(batch, state.device, non_blocking=True)
                fire(Event.BATCH_START)
                self._train_batch()
                fire(Event.BATCH_END)
                if self._looks_within_epochs:
                    self.meter.log_if_due(state)
                if state.is_finished:
                    break
                if self._looks_within_epochs:
                    self._look_around()
            if not clock.batch_in_epoch:
                raise DataError(
                    f"The training loader gave no batch in epoch {clock.epoch + 1}. If one pass "
                    "uses it up, wrap it in a class whose __iter__ starts anew."
                )
            state.train_metrics = self.meter.end_epoch(clock, self.context)
            clock.end_epoch()
            fire(Event.EPOCH_END)
        self.meter.log_epoch_if_due(state)
        if self.schedule is not None and self.schedule.interval == "epoch":
            self.schedule.step()

    def _train_batch(self) -> None:
        state, fire = self.state, self._fire
        if self._manual is not None:
            state.values.update(self._manual(state.batch))
            self._advance(self._manual.sample_count(state.batch))
            return
        assert self.optimizer is not None
        assert self.schedule is not None
        self.optimizer.zero_grad(set_to_none=True)
        samples = self._gradients.compute(state, self.meter)
        self.meter.check(state.clock)
        if self._is_scaled:
            self.scaler.unscale_(self.optimizer)
        fire(Event.BEFORE_STEP)
        state.step_skipped = self._step_optimizer(self.optimizer)
        fire(Event.AFTER_STEP)
        self._advance(samples)
        if self.schedule.interval == "iteration" and not state.step_skipped:
            self.schedule.step()

    def _advance(self, samples: int) -> None:
        self.state.clock.advance(samples * self.context.world_size)
        self._stopwatch.note()

    def _step_optimizer(self, optimizer: Optimizer) -> bool:
        """Step, and say whether the step was skipped."""
        if not self._is_scaled:
            optimizer.step()
            return False
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return bool(self.scaler.get_scale() < scale)

    def _look_around(self) -> None:
        """Evaluate and save, where it is time."""
        self._evaluate(self.evaluations.due(self.state))
        if self._save_every.is_due(self.state.clock):
            self._save()

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> None:
        state = self.state
        if not evaluators:
            return
        self.context.broadcast(list(state.model.buffers()))
        for evaluator in evaluators:
            with isolated_rng(derive_seed(state.seed, "evaluate", state.clock.batch)):
                state.evaluator = evaluator.label
                self._fire(Event.EVAL_START)
                metrics = run_evaluator(evaluator, state, state.step)
                state.take_metrics(metrics)
                self._fire(Event.EVAL_END)
                state.log(metrics)
        self.evaluations.note(evaluators, state.clock)
        schedule, key = self.schedule, self._eval_key
        if self._is_fitting and schedule is not None and schedule.interval == "eval":
            assert key is not None
            schedule.step(state.metric(key))

    def _save(self) -> None:
        if self._save_dir is not None:
            self._fire(Event.CHECKPOINT)
            if self.context.rank == 0:
                write_checkpoint(self._save_dir / LATEST, self.state_dict())

    def _extend(self, duration: Duration) -> None:
        state = self.state
        state.max_duration = replace(
            duration, value=state.clock.now(duration.unit) + duration.value
        )
        state.stop_reason = ""

    def _agree(self) -> None:
        """All processes begin with the parameters of rank 0."""
        model = self.state.model
        self.context.broadcast([*model.parameters(), *model.buffers()])

    def _seed(self, *parts: Any) -> int:
        """Of a stream of this epoch; rank 0 draws what a single process would."""
        rank = [self.state.rank] if self.state.rank else []
        return derive_seed(self.state.seed, *parts, self.state.clock.epoch, *rank)

    def _tell_loggers(self) -> None:
        if not self.state.clock.batch:
            for each in self.state.loggers:
                each.log_hyperparameters(resume.hyperparameters(self))
