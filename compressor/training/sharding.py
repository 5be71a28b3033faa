"""What one of several processes takes of the batches of a loader.

The batches are those of one process. Where the context splits them, each process takes a part of
every batch; else each takes whole batches of its own, in turn.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.distributed import Context
from compressor.distributed.agreement import digests
from compressor.errors import DataError
from compressor.interfaces.data import leaves
from compressor.interfaces.loaders import in_turns, shards_itself, with_sampler
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.step import Step


class Part(NamedTuple):
    """What a process takes of a batch of all processes.

    Attributes:
        share: of the batch, by which its losses and gradients count; 0 if there was nothing left.
        samples: in the whole batch; None: in what the process has.
    """

    share: float
    samples: int | None = None


WHOLE = Part(1.0)


class Sharding:
    """Iterates over batches of a loader, so that every process gets its own.

    Args:
        context: the processes.
        step: knows the samples of a batch.
        model: decides how small a part may be.

    Attributes:
        part: what the last batch that was taken is of the whole.
    """

    def __init__(self, context: Context, step: Step, model: nn.Module) -> None:
        self._context = context
        self._step = step
        self._model = model
        self._loader: Any = None  # the user's, of which `_own` is made
        self._own: Any = None
        self.part = WHOLE

    def of(self, loader: Iterable[Any], seed: int, epoch: int) -> Iterable[Any]:
        """An epoch of `loader` as this process sees it; each pass sets `part` batch by batch.

        Args:
            loader: of the user.
            seed: of the training.
            epoch: its number; the order of the batches is that of one process.
        """
        seed = derive_seed(seed, "epoch", epoch)
        if shards_itself(loader):
            return _Passes(self._own_shard, loader)
        if self._loader is not loader:  # kept, because its workers may outlive an epoch
            self._loader, self._own = loader, with_sampler(loader, _PartSampler)
        if self._own is None:
            if not self._context.splits_batches:
                loader = in_turns(loader, self._context.world_size)
            return _Passes(self._cut_batches, loader, seed)
        return _Passes(self._take_indices, self._own, seed)

    def _own_shard(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader of one process, until one of the processes has none left."""
        context = self._context
        batches = iter(loader)
        while True:
            batch = next(batches, _END)
            samples = 0 if batch is _END else self._step.sample_count(batch)
            all_of = context.total({"batches": float(batch is not _END), "samples": samples})
            if all_of["batches"] < context.world_size:
                return
            self.part = _part_of(samples, int(all_of["samples"]))
            yield batch

    def _take_indices(self, loader: Any, seed: int) -> Iterator[Any]:
        """Only what this process needs is loaded: the sampler says which."""
        native = getattr(loader, "native_dl", loader)
        sampler: _PartSampler = native.batch_sampler
        sampler.begin(self._context, CommonStream(seed, native), self._least)
        for number, batch in enumerate(loader):
            self.part, first = sampler.parts.popleft()
            if not number:
                self._compare(first)
            yield batch
        _check_rounds(sampler.seen, self._context)

    def _cut_batches(self, loader: Iterable[Any], seed: int) -> Iterator[Any]:
        """Every process loads everything, and takes its part."""
        stream, step, context = CommonStream(seed), self._step, self._context
        with stream:
            batches = iter(loader)
        count, together = 0, []
        while True:
            with stream:
                batch = next(batches, _END)
            if batch is _END:
                break
            if not count:
                self._compare(_digest(batch))
            count += 1
            if context.splits_batches:
                yield self._cut(batch)
                continue
            together.append(batch)
            if len(together) == context.world_size:
                samples = [*map(step.sample_count, together)]
                self.part = _part_of(samples[context.rank], sum(samples))
                yield together[context.rank]
                together = []
        _check_rounds(count, context)

    def _cut(self, batch: Any) -> Any:
        step = self._step
        samples = step.sample_count(batch)
        size = part_size(samples, self._context.world_size, self._least)
        parts = step.split(batch, size)
        rank = self._context.rank
        if rank < len(parts):
            part = parts[rank]
            share = step.sample_count(part) / samples if len(parts) > 1 else 1.0
            self.part = Part(share, samples)
            return part
        self.part = Part(0.0, samples)
        return step.split(batch, self._least)[0]

    @property
    def _least(self) -> int:
        """Samples of which a part consists, if it can: one is nothing for a batch norm."""
        has_norms = any(isinstance(module, _BatchNorm) for module in self._model.modules())
        return 2 if has_norms else 1

    def _compare(self, first: str) -> None:
        """Check that the first batch of the epoch is the same everywhere.

        Raises:
            DataError: if it is not: parts of different batches are not all of any.
        """
        if len(set(self._context.gather(first))) > 1:
            raise DataError(
                "The training loader gives each process other batches. If it shards by itself, say "
                "so (`loader.is_sharded = True`), and each batch is taken as it comes; else let it "
                "draw the same everywhere, from the global generators or one of its own."
            )


class CommonStream:
    """Inside the `with`, the global generators are at one place in all processes.

    Args:
        seed: of the stream.
        loader: a DataLoader that draws from the same stream before its samplers do, if it has no
            generator of its own; None: all that draws does so inside.
    """

    def __init__(self, seed: int, loader: Any = None) -> None:
        with isolated_rng(seed):
            if loader is not None and loader.generator is None:
                torch.empty((), dtype=torch.int64).random_()  # as its iterator does first
            self._inside = _states()
        self._outside = self._inside

    def __enter__(self) -> None:
        self._outside = _states()
        _set_states(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = _states()
        _set_states(self._outside)


def part_size(samples: int, count: int, least: int = 1) -> int:
    """Samples of each of `count` consecutive parts of a batch but the last, which may be empty.

    Args:
        samples: of the batch.
        count: of parts, if they need not be larger.
        least: samples of the smallest part that is not empty, if the batch has so many.

    >>> part_size(8, 2), part_size(7, 2), part_size(3, 2, least=2)
    (4, 4, 3)
    """
    size = max(-(-samples // count), least, 1)
    while size < samples and 0 < samples % size < least:
        size += 1
    return size


class _PartSampler:
    """A batch sampler that gives the indices of one process.

    Args:
        batches: the sampler of the batches of all.

    Attributes:
        parts: what the batches are of the wholes that have not been taken yet, with a digest of
            the first batch.
        seen: batches of all, so far.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.parts: deque[tuple[Part, str]] = deque()
        self.seen = 0

    def begin(self, context: Context, stream: CommonStream, least: int) -> None:
        """An epoch begins."""
        self._context, self._stream, self._least = context, stream, least
        self.parts.clear()
        self.seen = 0

    def __iter__(self) -> Iterator[Any]:
        context, stream = self._context, self._stream
        with stream:
            batches = iter(self._batches)
        together: list[Any] = []
        first = ""
        while True:
            with stream:
                batch = next(batches, _END)
            if batch is _END:
                return
            self.seen += 1
            first = first or hashlib.sha256(repr(batch).encode()).hexdigest()
            if context.splits_batches:
                own, part = self._cut(batch)
            else:
                together.append(batch)
                if len(together) < context.world_size:
                    continue
                own = together[context.rank]
                part = _part_of(len(own), sum(map(len, together)))
                together = []
            self.parts.append((part, first))
            yield own

    def _cut(self, batch: Sequence[Any]) -> tuple[Any, Part]:
        samples, rank = len(batch), self._context.rank
        size = part_size(samples, self._context.world_size, self._least)
        own = batch[rank * size : (rank + 1) * size]
        if len(own):
            return own, Part(len(own) / samples, samples)
        return batch[: self._least], Part(0.0, samples)


class _Passes:
    """An iterable that calls a generator function anew for each pass."""

    def __init__(self, function: Callable[..., Iterator[Any]], *args: Any) -> None:
        self._function = function
        self._args = args

    def __iter__(self) -> Iterator[Any]:
        return self._function(*self._args)


_END: Any = object()


def _part_of(own: int, samples: int) -> Part:
    """A whole batch of `own` samples, of a round of `samples`."""
    return Part(own / max(samples, 1), samples)


def _check_rounds(batches: int, context: Context) -> None:
    """Do nothing if whole batches were enough for all.

    Raises:
        DataError: if there were fewer than processes.
    """
    if not context.splits_batches and 0 < batches < context.world_size:
        raise DataError(
            f"The training loader has {batches} batches for {context.world_size} processes, each "
            "of which takes whole ones. Start fewer processes, or make batches smaller."
        )


def _digest(batch: Any) -> str:
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    return repr([shapes, digests(tensors)])


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
