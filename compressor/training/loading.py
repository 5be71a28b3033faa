"""The batches of an epoch: in an order that the seed decides, from any place in the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from compressor.distributed import Context
from compressor.distributed.failures import is_lost_connection
from compressor.errors import DataError
from compressor.interfaces.data import seed_generators
from compressor.interfaces.loaders import in_turns, shards_itself
from compressor.seeding import derive_seed, set_rng_state
from compressor.training.clock import Clock


def prepare_loader(loader: Iterable[Any], seed: int, epoch: int) -> None:
    """Seed the loader's own generators, and tell its samplers the number of the epoch."""
    loader = getattr(loader, "native_dl", loader)
    by_batch = getattr(loader, "batch_sampler", None)
    owners = [
        getattr(loader, "sampler", None),
        by_batch,
        getattr(by_batch, "sampler", None),
        getattr(loader, "dataset", None),
    ]
    for owner in {id(owner): owner for owner in owners}.values():
        tell = getattr(owner, "set_epoch", None)  # DistributedSampler shuffles by it
        if callable(tell):
            tell(epoch)
    seed_generators(loader, derive_seed(seed, "loader", epoch))


def batches_from(
    loader: Iterable[Any], clock: Clock, generators: Mapping[str, Any] | None
) -> Iterator[Any]:
    """What is left of the epoch of `loader`.

    Args:
        loader: begins an epoch.
        clock: says how many batches are done.
        generators: states of the global generators to go on with; None at the begin of an epoch.

    Raises:
        DataError: where the loader fails.
    """
    batches = _guarded(loader, clock)
    if generators is not None:
        for _ in islice(batches, clock.batch_in_epoch):
            pass
        set_rng_state(generators)
    return batches


def epoch_length(loader: Iterable[Any], context: Context | None = None) -> int | None:
    """Batches of an epoch; None when the loader does not know.

    Args:
        loader: of the user.
        context: processes that share its batches out among them; None: there is only this one.
    """
    takers = 1
    if context is not None and not context.splits_batches and not shards_itself(loader):
        takers = context.world_size
    try:
        return len(in_turns(loader, takers)) // takers
    except TypeError:  # an iterable dataset
        return None


def _guarded(loader: Iterable[Any], clock: Clock) -> Iterator[Any]:
    batches: Iterator[Any] | None = None
    for batch_number in count(1):
        try:
            batches = iter(loader) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if isinstance(error, DataError) or is_lost_connection(error):
                raise
            raise DataError(
                f"The training loader failed in epoch {clock.epoch + 1}, at batch {batch_number}: "
                f"{type(error).__name__}: {error}. The weights are as the batch before left them; "
                "mend the data and call fit() again, or resume."
            ) from error
        yield batch
