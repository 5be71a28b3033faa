"""What a DataLoader of torch takes its indices from: who shards by it, and what else could."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from compressor.interfaces.data import DataLoaderView


def shards_itself(loader: Any) -> bool:
    """Whether a loader gives each process other samples: by its sampler, or as it says."""
    native = getattr(loader, "native_dl", loader)
    by_batch = getattr(native, "batch_sampler", None)
    samplers = (getattr(native, "sampler", None), by_batch, getattr(by_batch, "sampler", None))
    if any(isinstance(each, DistributedSampler) for each in samplers):
        return True
    if any(getattr(each, "num_replicas", 1) > 1 for each in samplers):  # those of others
        return True
    owners = (native, getattr(native, "dataset", None), *samplers)
    return any(getattr(owner, "is_sharded", False) is True for owner in owners)


def in_turns(loader: Any, takers: int) -> Any:
    """What so many processes take whole batches of in turn, each as many as a view is cut to."""
    return loader.widened(takers) if isinstance(loader, DataLoaderView) else loader


def whole_loader(loader: Any) -> Any:
    """`loader`, or one of the whole dataset in its order, if it shards by a DistributedSampler."""
    native = getattr(loader, "native_dl", loader)
    sampler = getattr(native, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or not native.batch_size:
        return loader

    def in_order(_: Any) -> BatchSampler:
        indices = range(len(native.dataset))
        return BatchSampler(indices, native.batch_size, native.drop_last)

    return with_sampler(loader, in_order) or loader


def with_sampler(loader: Any, make: Callable[[Any], Any]) -> Any:
    """A loader that takes its indices from `make(batch_sampler)`; None if it knows no indices."""
    native = getattr(loader, "native_dl", loader)
    is_known = isinstance(native, DataLoader) and type(native).__iter__ is DataLoader.__iter__
    if not is_known or native.batch_sampler is None or not hasattr(native.dataset, "__getitem__"):
        return None
    if isinstance(native.dataset, IterableDataset) or not native.in_order:
        return None
    own = object.__new__(type(native))
    # DataLoader forbids to set it; a subclass may have attributes of its own.
    own.__dict__.update(native.__dict__, batch_sampler=make(native.batch_sampler), _iterator=None)
    return loader.over(own) if isinstance(loader, DataLoaderView) else own
