"""The trainer: one loop for recovery, distillation, quantization-aware training, a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compressor.distributed import current_context
from compressor.distributed.agreement import agree, check_structure
from compressor.distributed.alone import raise_together
from compressor.errors import ConfigError
from compressor.interfaces.data import kept_generators
from compressor.interfaces.optimizers import DEFAULT_LR, Schedule
from compressor.logs import get_logger
from compressor.seeding import derive_seed, isolated_rng
from compressor.structure.describe import outline
from compressor.training import binding, resume
from compressor.training.algorithm import Algorithm, Callback
from compressor.training.clock import Clock, Duration, DurationLike, Every, parse_total
from compressor.training.dispatch import Dispatch
from compressor.training.epoch_loop import EpochLoop
from compressor.training.errors import DivergedError
from compressor.training.evaluation_loop import EvaluationLoop
from compressor.training.evaluator import (
    Evaluations,
    Evaluator,
    check_evaluators,
    make_evaluators,
)
from compressor.training.events import Event
from compressor.training.fits import Fits
from compressor.training.gradients import Gradients, MicroBatchSize
from compressor.training.loading import epoch_length
from compressor.training.loggers.base import Logger
from compressor.training.meter import TrainMeter
from compressor.training.precision import (
    Precision,
    check_precision,
    make_autocast,
    make_scaler,
    reset_scaler,
)
from compressor.training.predicting import predict
from compressor.training.registered import Registered
from compressor.training.replication import Replication
from compressor.training.saving import Saving, read_together
from compressor.training.setup import (
    DeviceLike,
    Optimizers,
    Schedulers,
    check_device,
    check_manual,
    find_loggers,
    hyperparameters,
    set_schedule,
    set_up,
    torch_device,
)
from compressor.training.state import State
from compressor.training.step import LossFunction, ManualStep, in_training_mode, make_step

logger = get_logger(__name__)


class Trainer:
    """Trains `model` in place.

    Nothing is drawn from the caller's generators, the global ones or the loader's own: every epoch
    seeds them anew from `seed`, and their states are put back after a fit. With `save_dir`, a
    checkpoint is written at every `save_interval`, from which `resume` goes on as if nothing had
    happened: bit-equal on the CPU, if the loader's workers are not persistent (their generators
    outlive the epoch), no dataset shuffles through a buffer as it goes, and there are at most two
    processes: sums of more depend on their order. The number of processes may be another then.

    Where several processes were started (torchrun), all call the same methods, and train one model:
    each takes a part of every batch, so that their number does not change what is trained, but for
    batch norms, which see the part, and losses that are no mean over samples. A loader with a
    DistributedSampler, or with `is_sharded = True`, has taken the parts itself. Rank 0 evaluates,
    writes, and reads. A `ManualStep` gets the batches as they come, and does itself what is to be
    done together.

    Args:
        model: is moved to `device`. A `TaskModel` says itself how it is trained and evaluated.
        step: (model, batch) -> loss terms, for any other model; calls the model itself. A tensor is
            the term "loss". Or a `ManualStep`, which does all that is to be done with a batch.
        train_dataloader: any iterable of batches that can be iterated again.
        eval_dataloader: a loader, an `Evaluator`, or a list of them.
        optimizers: a dict with "name", an optimizer of the model's parameters, a factory, or a
            function of the model; None is the default of `make_optimizer`.
        schedulers: a dict with "name", a scheduler of that optimizer, a factory, a function of the
            optimizer, or a name of `schedules.SHAPES`. None is "cosine"; for an optimizer of your
            own, a rate that stays.
        max_duration: '10ep', '500ba', '1e6sp', '90m'; an int counts epochs.
        eval_interval: between evaluations. One always follows the end, which is the only one
            if this is 0.
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

    >>> import torch
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
        learning_rate: float = DEFAULT_LR,
        seed: int = 0,
        save_dir: str | Path | None = None,
        save_interval: DurationLike = "1ep",
        log_interval: DurationLike = "1ep",
        autoresume: bool = False,
    ) -> None:
        check_precision(precision)
        if autoresume and save_dir is None:
            raise ConfigError("autoresume needs a folder of checkpoints. Give save_dir.")
        if isinstance(step, ManualStep):
            check_manual(optimizers, schedulers, micro_batch_size, precision, compile)
        check_device(torch_device(device))
        self.dispatch = Dispatch(algorithms, [*callbacks, *loggers])
        self.evaluations = Evaluations(make_evaluators(eval_dataloader), eval_interval, eval_skip)
        check_evaluators(self.evaluations.all, model)
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
            Clock(batches_per_epoch=epoch_length(train_dataloader, self.context)),
            self.context,
            algorithms=self.dispatch.algorithms,
            loggers=find_loggers(self.dispatch.callbacks, loggers, self.context.rank),
        )
        self._fire = self.dispatch.bind(state)
        self.meter = TrainMeter(model, log_interval)
        self._evaluation_loop = EvaluationLoop(state, self.dispatch, self.evaluations, eval_key)
        self._saving = Saving(save_dir, save_interval)
        self._autoresume = autoresume
        self._changes_at_the_end = self.dispatch.changes_at(Event.FIT_END)
        self._is_fitting = False
        if not all(each.is_by_epoch for each in self.evaluations.intervals):
            self.meter.check_own_metrics()
        self._fits = Fits(is_kept=autoresume)
        self.scaler = make_scaler(precision, state.device)
        options = compile if isinstance(compile, Mapping) else {}
        self._replication = Replication(state, options if compile else None)
        work: Gradients | ManualStep
        if isinstance(step, ManualStep):
            work = step
        else:
            is_heard = self.dispatch.is_heard(Event.AFTER_FORWARD, Event.AFTER_LOSS)
            state.step = make_step(model, step, is_observed=is_heard)
            work = Gradients(
                state.step,
                self._fire,
                make_autocast(precision, state.device),
                self.scaler,
                self._replication if self.context.world_size > 1 else None,
                micro_batch_size,
                recomputes=any(each.recomputes for each in self.dispatch.algorithms),
            )
            state.recompute = partial(work.recompute, state)
        self._work = work
        self.loop = EpochLoop(state, self.dispatch, self.meter, self.scaler, work)
        state.on_edit = self._follow_edit
        is_manual = isinstance(work, ManualStep)
        set_up(state, self.dispatch, optimizers, None if is_manual else learning_rate)
        if not is_manual:
            has_metric = bool(self.evaluations.all) and eval_key is not None
            is_own = isinstance(optimizers, (Optimizer, list, tuple))
            set_schedule(state, schedulers, is_own=is_own, has_metric=has_metric)
            if save_dir is not None:
                state.skeleton = outline(model)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.state.model

    @property
    def train_dataloader(self) -> Any:
        """What is trained on."""
        return self.state.train_dataloader

    @property
    def optimizer(self) -> Optimizer | None:
        """Of the model; None with a `ManualStep`."""
        return self.state.optimizer

    @property
    def schedule(self) -> Schedule | None:
        """Of the learning rate; None with a `ManualStep`."""
        return self.state.schedule

    @property
    def fits(self) -> tuple[Duration, ...]:
        """Where each call of `fit` was to end, for a program that may be run again."""
        return tuple(self._fits.ends)

    @property
    def micro_batch_size(self) -> int | None:
        """Samples of a micro-batch at present; None: all of a batch."""
        return self._work.micro_batch_size if isinstance(self._work, Gradients) else None

    def take_micro_batch_size(self, size: int | None) -> None:
        """Begin with what "auto" found before; a size of the user's own stays."""
        if isinstance(self._work, Gradients) and self._work.is_auto:
            self._work.micro_batch_size = size

    def register(self, name: str, value: Any) -> None:
        """Save `value` with the checkpoints, and restore it: a model, a tensor, a plain value.

        Raises:
            ConfigError: if `name` could not be an attribute.
        """
        self.registered.add(name, value)

    def fit(self, duration: DurationLike | None = None) -> None:
        """Train up to `max_duration`, or `duration` more, which then is the new `max_duration`.

        A fit that was stopped early, or is complete, ends at once unless `duration` is given. With
        `autoresume` a program that was killed can be run again as it is: its calls of `fit` end
        where they were to end then. All that listens is closed at the end, also when an error or
        Ctrl-C is the end; the next fit goes on in the middle of the epoch.

        Raises:
            DivergedError: the loss became infinite or NaN.
            LossError: the loss is no scalar, or does not depend on the model.
            DataError: the loader gives no batch, or fails.
            DivergedRanksError: processes that train together hold different models.
        """
        state = self.state
        if self._autoresume and not state.clock.batch:
            self._resume_program()
        if not self._fits.begin(state, duration) or state.is_finished:
            return
        binding.check_complete(state.optimizer, state.model)
        with ExitStack() as stack:
            stack.enter_context(kept_generators(self.train_dataloader))
            stack.callback(state.forget_batch)
            stack.callback(reset_scaler, self.scaler)
            stack.callback(self._replication.end)
            for listener in self.dispatch.listeners:
                stack.callback(listener.close)
            stack.enter_context(isolated_rng(derive_seed(state.seed, "fit")))
            stack.enter_context(in_training_mode(state.model))
            self.registered.to(state.device)
            self.loop.start()
            stack.callback(setattr, self, "_is_fitting", False)
            self._is_fitting = True
            self._agree()
            self._tell_loggers()
            self._fire(Event.FIT_START)
            looks_within_epochs = not all(every.is_by_epoch for every in self._intervals)
            while not self.loop.is_finished():
                self.loop.run_epoch(self._look_around if looks_within_epochs else None)
                if not self.loop.is_finished():
                    self._look_around()
            self._fire_together(Event.FIT_END)
            agree(self.context, state.model)
            if not self.evaluations.is_up_to_date(state.clock) or self._changes_at_the_end:
                self._evaluate(self.evaluations.all)
            self._save()
            self._begin_intervals()  # what was due with the end is done

    def eval(self) -> dict[str, float]:
        """Run all evaluators on the model as it is; the metrics are also `state.metrics`.

        Raises:
            ConfigError: if there is none.
        """
        if not self.evaluations.all:
            raise ConfigError("This trainer has nothing to evaluate on. Give eval_dataloader.")
        try:
            if not self._is_fitting:
                self._agree()
            self._evaluate(self.evaluations.all)
        finally:
            if not self._is_fitting:
                self.state.forget_batch()
        return self.state.metrics

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Outputs of the task for each batch, on the CPU, in eval mode.

        Raises:
            ConfigError: if the model is no `TaskModel`.
        """
        return predict(self.state, dataloader)

    def state_dict(self) -> dict[str, Any]:
        """All that a trainer made alike needs to go on from here.

        The tensors are the trainer's own, which train on: copy what is to be kept in memory.
        """
        return resume.state_dict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if it is of another model, optimizer or list of algorithms; nothing is
                loaded then.
        """
        self.loop.interrupted = resume.load_state_dict(self, saved)
        self._fits.forget()
        self._begin_intervals()

    def resume(self, path: str | Path | None = None) -> bool:
        """Load the checkpoint at `path`, or that of `save_dir`; say whether there was one.

        Raises:
            CheckpointError: if it is truncated, altered, or of another training.
        """
        found = self._saving.find(self.context, path)
        if found is not None:
            self._load(found)
        return found is not None

    def _resume_program(self) -> None:
        """Load the checkpoint of this program when it ran before, if there is one."""
        found = self._saving.find(self.context)
        if found is not None:
            self._fits.expect(self._load(found)["fits"])

    def _load(self, path: Path) -> Mapping[str, Any]:
        saved = read_together(self.context, path)
        self.load_state_dict(saved)
        clock = self.state.clock
        logger.info("going on after epoch %d, batch %d of %s", clock.epoch, clock.batch, path)
        return saved

    def _look_around(self) -> None:
        """Evaluate and save, where it is time."""
        try:
            self._evaluate(self.evaluations.due(self.state))
        except Exception:
            if self.context.world_size == 1:  # it may have failed in this process alone
                self._save()  # what was trained is not lost
            raise
        if self._saving.every.is_due(self.state.clock):
            self._save()

    def _evaluate(self, evaluators: Sequence[Evaluator]) -> None:
        self._evaluation_loop.run(evaluators, is_fitting=self._is_fitting)

    def _save(self) -> None:
        if self._saving.path is not None:
            self._fire_together(Event.CHECKPOINT)
            self._saving.save(self)

    def _fire_together(self, event: Event) -> None:
        """Fire `event`; a listener that finds the training diverged in one process ends all."""
        error = None
        try:
            self._fire(event)
        except DivergedError as diverged:
            error = diverged
        raise_together(self.context, error)

    def _follow_edit(self) -> None:
        """The model has changed its structure: gradients travel otherwise, and ranks compare."""
        self._replication.end()
        self.loop.note_edit()

    @property
    def _intervals(self) -> tuple[Every, ...]:
        return (*self.evaluations.intervals, self._saving.every, self.meter.every)

    def _begin_intervals(self) -> None:
        for every in self._intervals:
            every.begin(self.state.clock)

    def _agree(self) -> None:
        """All processes begin with the parameters of rank 0."""
        model = self.state.model
        check_structure(self.context, model)
        self.context.broadcast([*model.parameters(), *model.buffers()])

    def _tell_loggers(self) -> None:
        if not self.state.clock.batch:
            for each in self.state.loggers:
                each.log_hyperparameters(hyperparameters(self.state))
