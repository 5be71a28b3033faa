"""Gradients of one batch, in micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from compressor.errors import ConfigError
from compressor.interfaces.data import map_leaves
from compressor.logs import get_logger
from compressor.seeding import rng_state, set_rng_state
from compressor.training.errors import OutOfMemoryError
from compressor.training.events import Event
from compressor.training.meter import TrainMeter
from compressor.training.replication import Replication
from compressor.training.sharding import WHOLE, Part
from compressor.training.state import State
from compressor.training.step import Fire, Step, check_differentiable

logger = get_logger(__name__)

_NOTHING = nullcontext()

MicroBatchSize: TypeAlias = int | Literal["auto"] | None


class Gradients:
    """Forward and backward over the micro-batches of a batch.

    A micro-batch counts by its share of the samples, so a loss that is a mean over samples has the
    gradient of the whole batch. Batch norms see each micro-batch on its own.

    With "auto" a batch that does not fit into memory is begun again in halves, with the same
    random numbers and buffers, and later ones begin with what has fitted. Several processes agree
    on it before they exchange anything, so gradients travel after the backward pass, not during it.

    Of several processes each has a part of a batch, and counts by its share: the mean of all
    gradients is that of the whole batch.

    Args:
        step: of the user.
        fire: tells the listeners.
        autocast: in which forward and loss compute.
        scaler: of the loss.
        replication: what is called, and how gradients become those of all processes; None: there is
            only this one.
        micro_batch_size: samples, "auto", or None for whole batches.
        recomputes: whether a batch may be asked for again.

    Attributes:
        is_auto: it looks for the size itself.
        micro_batch_size: samples of a micro-batch at present; None: all of a batch.
    """

    def __init__(
        self,
        step: Step,
        fire: Fire,
        autocast: AbstractContextManager[Any],
        scaler: torch.amp.GradScaler,
        replication: Replication | None,
        micro_batch_size: MicroBatchSize,
        *,
        recomputes: bool,
    ) -> None:
        self._step = step
        self._fire = fire
        self._autocast = autocast
        self._scaler = scaler
        self._is_scaled = scaler.is_enabled()
        self._replication = replication
        self._part = WHOLE
        self.is_auto = micro_batch_size == "auto"
        self.micro_batch_size: int | None = check_size(micro_batch_size)
        self._remembers = recomputes or self.is_auto
        self._random: dict[str, Any] = {}

    def compute(self, state: State, meter: TrainMeter, part: Part = WHOLE) -> int:
        """Set the gradients of `state.batch`, and count its losses into `meter`.

        Args:
            state: of the training.
            meter: is told of the losses.
            part: what the batch is of that of all processes.

        Returns:
            Samples in the batch.

        Raises:
            OutOfMemoryError: if a single sample does not fit.
        """
        whole, samples = state.batch, self._step.sample_count(state.batch)
        self._part = part
        if self._replication is not None:
            self._replication.begin_batch()
        if self._remembers:
            self._random = rng_state()
        if self.is_auto:
            self._compute_what_fits(state, whole, samples, meter)
        elif self.micro_batch_size is None:
            self._compute_part(state, 1.0, meter, is_last=True)
        else:
            self._compute_parts(state, whole, samples, meter)
        state.batch = whole
        if self._replication is not None:
            self._replication.finish()
        return samples

    def recompute(self, state: State) -> None:
        """Set the gradients of `state.batch` again, unscaled, with the same random numbers."""
        whole, terms = state.batch, (state.losses, state.weights, state.task_terms)
        after = rng_state()
        set_rng_state(self._random)
        state.model.zero_grad(set_to_none=True)
        self._compute_parts(state, whole, self._step.sample_count(whole), None)
        state.batch, (state.losses, state.weights, state.task_terms) = whole, terms
        set_rng_state(after)
        if self._replication is not None:
            self._replication.finish()
        if self._is_scaled:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self._scaler.get_scale())

    def _compute_what_fits(self, state: State, whole: Any, samples: int, meter: TrainMeter) -> None:
        buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
        while True:
            parts = Parts()
            with memory_watched() as watch:
                self._compute_parts(state, whole, samples, parts)
            tried = min(self.micro_batch_size or samples, samples) if watch.is_out else 0
            tried = int(state.context.most(tried))
            if not tried:
                parts.tell(meter)
                return
            del parts
            if tried == 1:
                raise OutOfMemoryError(
                    "A single sample does not fit into memory. Use smaller inputs, "
                    "precision='bf16', or a device with more memory."
                )
            self.micro_batch_size = -(-tried // 2)
            logger.info(
                "out of memory: micro-batches of %d samples from now on", self.micro_batch_size
            )
            state.forget_batch()
            state.batch = whole
            state.model.zero_grad(set_to_none=True)
            set_rng_state(self._random)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            if state.device.type == "cuda":
                torch.cuda.empty_cache()

    def _compute_parts(
        self, state: State, whole: Any, samples: int, meter: TrainMeter | Parts | None
    ) -> None:
        if self.micro_batch_size is None or samples <= self.micro_batch_size:
            self._compute_part(state, 1.0, meter, is_last=not self.is_auto)
            return
        sums: dict[str, Tensor] = {}
        count = -(-samples // self.micro_batch_size)
        even_size = -(-samples // count)  # a last part of one sample is nothing for a batch norm
        parts = self._step.split(whole, even_size)
        for number, part in enumerate(parts, 1):
            state.batch = part
            share = self._step.sample_count(part) / samples
            is_last = number == len(parts) and not self.is_auto
            self._compute_part(state, share, meter, is_last=is_last)
            for name, value in state.losses.items():
                sums[name] = sums.get(name, 0.0) + share * value.detach()
        state.losses = sums

    def _compute_part(
        self, state: State, share: float, meter: TrainMeter | Parts | None, *, is_last: bool
    ) -> None:
        share *= self._part.share
        with _NOTHING if self._replication is None else self._replication.accumulating(is_last):
            with self._autocast:
                state.begin_losses(self._step.run(state, self._fire))
                self._fire(Event.AFTER_LOSS)
                total = state.total_loss()
            check_differentiable(total)
            if meter is not None:
                meter.update(state, total, share)
            factor = share if self._replication is None else share * state.context.world_size
            if factor != 1.0:
                total = factor * total
            if self._is_scaled:
                total = self._scaler.scale(total)
            total.backward()  # type: ignore[no-untyped-call]


class Parts:
    """What a meter is to be told of a batch once all of it has fitted into memory."""

    def __init__(self) -> None:
        self._seen: list[tuple[dict[str, Tensor], Any, Any, Tensor, float]] = []

    def update(self, state: State, total: Tensor, share: float) -> None:
        """Note a micro-batch."""
        losses = {name: value.detach() for name, value in state.losses.items()}
        outputs = map_leaves(_detached, state.outputs)
        self._seen.append((losses, state.batch, outputs, total.detach(), share))

    def tell(self, meter: TrainMeter) -> None:
        """Count all in."""
        for losses, batch, outputs, total, share in self._seen:
            meter.count(losses, batch, outputs, total, share)


class MemoryWatch:
    """Whether memory ran out."""

    is_out = False


@contextmanager
def memory_watched() -> Iterator[MemoryWatch]:
    """End the `with` quietly where memory runs out; the value says so.

    The traceback is dropped: its frames hold the tensors that fill the memory.
    """
    watch = MemoryWatch()
    try:
        yield watch
    except RuntimeError as error:  # torch.OutOfMemoryError is one; so are the CPU allocator's
        if not is_out_of_memory(error):
            raise
        error.__traceback__ = None
        watch.is_out = True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` is a device's or the CPU allocator's lack of memory."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words)


def check_size(value: MicroBatchSize) -> int | None:
    """The size to begin with.

    Raises:
        ConfigError: if it is no size.
    """
    if value is None or value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f"micro_batch_size={value!r} is no number of samples. Write 1 or more, 'auto', or None."
        )
    return value


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
