"""An epoch: its batches, each of them forward, backward and step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, isinf
from typing import Any

import torch
from torch.optim import Optimizer

from compressor.distributed.agreement import agree
from compressor.distributed.alone import raise_together
from compressor.errors import DataError
from compressor.interfaces.data import move
from compressor.seeding import derive_seed, isolated_rng, rng_state
from compressor.training.clock import Stopwatch
from compressor.training.dispatch import Dispatch
from compressor.training.errors import DivergedError
from compressor.training.events import Event
from compressor.training.gradients import Gradients
from compressor.training.loading import batches_from, prepare_loader
from compressor.training.meter import TrainMeter
from compressor.training.sharding import WHOLE, Part, Sharding
from compressor.training.state import State
from compressor.training.step import ManualStep


class EpochLoop:
    """Trains epoch after epoch, and goes on in the middle of one that was interrupted.

    Several processes agree after every batch: on the time, on whether to stop, and, after an edit
    in one of them, on the model.

    Args:
        state: of the training.
        dispatch: calls who listens.
        meter: is told of every batch.
        scaler: of the loss.
        work: what is done with a batch: its gradients, or all of it.

    Attributes:
        interrupted: states of the global generators at the place within an epoch at which to go on;
            None at the begin of one.
    """

    def __init__(
        self,
        state: State,
        dispatch: Dispatch,
        meter: TrainMeter,
        scaler: torch.amp.GradScaler,
        work: Gradients | ManualStep,
    ) -> None:
        self._state = state
        self._fire = dispatch.bind(state)
        self._meter = meter
        self._scaler = scaler
        self._is_scaled = scaler.is_enabled()
        self._work = work
        self._stopwatch = Stopwatch(state.clock)
        self._is_within_epoch = False
        self._is_edited = False
        self._divergence: DivergedError | None = None  # in this process, of several
        self._is_one_of_several = state.context.world_size > 1
        self._sharding: Sharding | None = None
        if self._is_one_of_several and state.step is not None:
            self._sharding = Sharding(state.context, state.step, state.model)
        self.interrupted: Mapping[str, Any] | None = None

    def start(self) -> None:
        """A fit begins."""
        self._stopwatch.start()
        self._is_edited, self._divergence = False, None

    def note_edit(self) -> None:
        """The structure of the model has changed."""
        self._is_edited = True

    def generators(self) -> Mapping[str, Any] | None:
        """States of the global generators within an epoch; None between epochs."""
        if not self._state.clock.batch_in_epoch:
            return None
        return rng_state() if self._is_within_epoch else self.interrupted

    def is_finished(self) -> bool:
        """Whether there is no further batch; all processes say the same.

        Raises:
            DivergedError: if the loss of one of them is no number.
            DivergedRanksError: if the model was edited, and is no longer the same in all.
        """
        if self._is_one_of_several:
            self._agree()
        return self._state.is_finished

    def _agree(self) -> None:
        state, context = self._state, self._state.context
        has_news = bool(state.stop_reason) or self._is_edited or self._divergence is not None
        # One message in place of two, at every batch: no training lasts for ever.
        latest = context.most(inf if has_news else self._stopwatch.elapsed())
        if not isinf(latest):
            state.clock.seconds = latest
            return
        state.clock.seconds = context.most(self._stopwatch.elapsed())
        divergence, self._divergence = self._divergence, None
        raise_together(context, divergence)
        is_edited, self._is_edited = self._is_edited, False
        if context.most(is_edited):
            agree(context, state.model)
        if context.most(bool(state.stop_reason)) and not state.stop_reason:
            state.stop("another process stopped")

    def run_epoch(self, look_around: Callable[[], None] | None) -> None:
        """Train what is left of an epoch.

        Args:
            look_around: is called between batches; None: there is nothing to do there.

        Raises:
            DataError: if the loader gives no batch, or fails.
        """
        state, fire, clock = self._state, self._fire, self._state.clock
        generators = self.interrupted
        prepare_loader(state.train_dataloader, state.seed, clock.epoch)
        if generators is None:
            clock.batch_in_epoch = 0  # an interrupted fit may have left some
            self._meter.begin_epoch()
            with isolated_rng(self._seed("epoch start")):
                fire(Event.EPOCH_START)
        run = self._run_batch_of_several if self._is_one_of_several else self._run_batch
        with isolated_rng(self._seed("epoch")), self._place_kept(generators):
            for batch in batches_from(self._loader(), clock, generators):
                run(batch)
                is_finished = self.is_finished()
                if look_around is not None:
                    self._meter.log_if_due(state)
                if is_finished:
                    break
                if look_around is not None:
                    look_around()
                    if self.is_finished():
                        break
            if not clock.batch_in_epoch:
                raise DataError(
                    f"The training loader gave no batch in epoch {clock.epoch + 1}. If one pass "
                    "uses it up, wrap it in a class whose __iter__ starts anew."
                )
            state.train_metrics = self._meter.end_epoch(clock, state.context)
            clock.end_epoch()
            with self._divergence_noted():
                fire(Event.EPOCH_END)
        self._meter.log_epoch_if_due(state)
        if state.schedule is not None and state.schedule.interval == "epoch":
            state.schedule.step()

    @contextmanager
    def _place_kept(self, generators: Mapping[str, Any] | None) -> Iterator[None]:
        """When the epoch is left by an error, the next fit goes on where it was."""
        clock = self._state.clock
        began_at = clock.batch
        self._is_within_epoch = True
        try:
            yield
            self.interrupted = None
        except BaseException:
            if clock.batch > began_at or not clock.batch_in_epoch:
                self.interrupted = rng_state() if clock.batch_in_epoch else None
            else:  # not even one batch further
                self.interrupted = generators
            raise
        finally:
            self._is_within_epoch = False

    def _loader(self) -> Any:
        """What gives this process its batches."""
        state = self._state
        if self._sharding is None:
            return state.train_dataloader
        return self._sharding.of(state.train_dataloader, state.seed, state.clock.epoch)

    def _run_batch(self, batch: Any) -> None:
        state, fire = self._state, self._fire
        state.batch = move(batch, state.device, non_blocking=True)
        fire(Event.BATCH_START)
        self._train_batch(WHOLE if self._sharding is None else self._sharding.part)
        fire(Event.BATCH_END)

    def _run_batch_of_several(self, batch: Any) -> None:
        with self._divergence_noted():
            self._run_batch(batch)

    @contextmanager
    def _divergence_noted(self) -> Iterator[None]:
        """Of several processes, one in which the loss is no number tells the others, at the end."""
        try:
            yield
        except DivergedError as error:
            if not self._is_one_of_several:
                raise
            self._divergence = error

    def _train_batch(self, part: Part) -> None:
        state, fire, work = self._state, self._fire, self._work
        if isinstance(work, ManualStep):
            state.values.update(work(state.batch))
            self._advance(work.sample_count(state.batch) * state.context.world_size)
            return
        optimizer, schedule = state.optimizer, state.schedule
        assert optimizer is not None
        assert schedule is not None
        optimizer.zero_grad(set_to_none=True)
        samples = work.compute(state, self._meter, part)
        self._meter.check(state.clock)
        if self._is_scaled:
            self._scaler.unscale_(optimizer)
        fire(Event.BEFORE_STEP)
        state.step_skipped = self._step(optimizer)
        fire(Event.AFTER_STEP)
        self._advance(samples if part.samples is None else part.samples)
        if schedule.interval == "iteration" and not state.step_skipped:
            schedule.step()

    def _advance(self, samples: int) -> None:
        self._state.clock.advance(samples)
        if not self._is_one_of_several:  # else the time is agreed on
            self._stopwatch.note()

    def _step(self, optimizer: Optimizer) -> bool:
        """Step, and say whether the step was skipped."""
        if not self._is_scaled:
            optimizer.step()
            return False
        scale = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return bool(self._scaler.get_scale() < scale)

    def _seed(self, *parts: Any) -> int:
        """Of a stream of this epoch; rank 0 draws what a single process would."""
        rank = [self._state.rank] if self._state.rank else []
        return derive_seed(self._state.seed, *parts, self._state.clock.epoch, *rank)
