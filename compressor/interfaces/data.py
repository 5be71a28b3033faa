"""The user's data: a mapping of split names to any iterables of batches of any form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError, suggest
from compressor.seeding import isolated_rng


class DataLoaderView:
    """A user's loader, with what evaluation functions read; everything else is the loader's own.

    Args:
        loader: any iterable of batches that can be iterated again and again; never changed. A view
            of it has its limit here too.
        max_batches: end every pass after so many; None: no limit.
    """

    def __init__(self, loader: Iterable[Any], max_batches: int | None = None) -> None:
        if isinstance(loader, DataLoaderView):
            limits = [each for each in (loader._max_batches, max_batches) if each is not None]
            loader, max_batches = loader._loader, min(limits, default=None)
        self._loader: Iterable[Any] = loader
        self._max_batches: int | None = max_batches
        self._batch_size: int | None = None

    @property
    def native_dl(self) -> Any:
        """The user's loader itself."""
        return self._loader

    def over(self, loader: Iterable[Any]) -> DataLoaderView:
        """The same view of another loader."""
        return DataLoaderView(loader, self._max_batches)

    def widened(self, factor: int) -> DataLoaderView:
        """The same view with so many times as many batches in a pass, if they are limited."""
        limit = self._max_batches
        return DataLoaderView(self._loader, None if limit is None else limit * factor)

    @property
    def batch_size(self) -> int:
        """Samples in a full batch; a loader that does not say is asked for its first batch."""
        if self._batch_size is None:
            said = getattr(self._loader, "batch_size", None)
            sampler = getattr(self._loader, "batch_sampler", None)
            said = said or getattr(sampler, "batch_size", None)
            self._batch_size = said or sample_count(first_batch(self._loader))
        return self._batch_size

    @property
    def dataset_size(self) -> int | None:
        """Samples in one pass; None when the loader does not know."""
        samples = getattr(self._loader, "sampler", None)
        if samples is None:
            samples = getattr(self._loader, "dataset", None)
        try:
            total = len(samples)  # type: ignore[arg-type]
            if getattr(self._loader, "drop_last", False) or self._max_batches is not None:
                total = min(total, len(self) * self.batch_size)
        except TypeError:  # something has no length
            return None
        return total

    def __iter__(self) -> Iterator[Any]:
        return (
            iter(self._loader)
            if self._max_batches is None
            else take(self._loader, self._max_batches)
        )

    def __len__(self) -> int:
        batches = len(self._loader)  # type: ignore[arg-type]
        return batches if self._max_batches is None else min(batches, self._max_batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in (
            "_loader",
            "_max_batches",
        ):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)


def check_data(
    data: object, eval_split: str, holdout: str | None, max_batches: int | None = None
) -> dict[str, DataLoaderView]:
    """A view of every split, after a look at those that are needed. `data` is not changed.

    Args:
        data: split name to iterable of batches.
        eval_split: name of the split that variants are judged on.
        holdout: name of the split that the result is measured on, if there is one.
        max_batches: end every pass over a view after so many, for a dry run; None: no limit.

    Raises:
        DataError: not a mapping, a split that is missing, empty, not iterable, or used up by one
            pass.
    """
    if not isinstance(data, Mapping):
        raise DataError(
            f"The data is a {type(data).__name__}. "
            "Give a mapping of splits: {'train': train_loader, 'test': test_loader}."
        )
    if "train" not in data:
        raise DataError(f"The data has no 'train' split. It has: {_names(data)}. Add 'train'.")
    for option, split in (("eval_split", eval_split), ("holdout", holdout)):
        if split is not None and split not in data:
            raise DataError(
                f"{option}={split!r} is not a split of the data. {suggest(split, map(str, data))} "
                f"Add it, or set {option}."
            )
    for split in dict.fromkeys(("train", eval_split, holdout)):
        if split is not None:
            _check_loader(data[split], split)
    return {str(split): DataLoaderView(loader, max_batches) for split, loader in data.items()}


def take(loader: Iterable[Any], batches: int) -> Iterator[Any]:
    """The first `batches` batches, or all of a shorter loader; no further one is fetched.

    >>> list(take([1, 2, 3], 2))
    [1, 2]
    """
    return islice(loader, batches)


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch, without a trace: global generators and the loader's own are put back.

    Raises:
        DataError: if there is none.
    """
    for batch in _peek(loader):
        return batch
    raise DataError("A loader yields no batch. Check its dataset, its sampler and drop_last.")


def move(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """A batch of the same form with every tensor on `device`; what is no tensor stays.

    Args:
        batch: tensors in any nesting of tuple, list and mapping; also anything with `.to(device)`.
        device: of torch.
        non_blocking: let Python go on while a GPU copies. Only a copy from pinned memory overlaps,
            so what lies in ordinary memory of the CPU is pinned first.

    >>> move({"x": [torch.ones(1)], "name": "a"}, "meta")
    {'x': [tensor(..., device='meta', size=(1,))], 'name': 'a'}
    """
    kind = type(batch)
    if kind is tuple or kind is list or kind is dict:  # on the path of every step: under 1 µs
        for leaf in batch.values() if kind is dict else batch:
            if type(leaf) is not Tensor or leaf.device != device:
                break
        else:
            return batch if kind is tuple else batch.copy()
    is_to_gpu = torch.device(device).type == "cuda"

    def to_device(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if non_blocking and is_to_gpu and _can_be_pinned(leaf):
                leaf = leaf.pin_memory()  # torch keeps the memory until the copy has been made
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return map_leaves(to_device, batch)


def split_batch(batch: Any, size: int) -> list[Any]:
    """Parts of a batch, in order, each of `size` samples but the last; `[batch]` if it has no more.

    What has an entry for each of the `sample_count` samples is cut, everything else is in every
    part as it is. Entries per sample have

    - a tensor with so many of them in dimension 0; the parts are views of it;
    - a list or tuple of so many items, such as file names, unless its tensors say otherwise: when
      all of them that have a dimension 0 have a row for every sample, it is a container.

    So `[x, y]` of two samples is two tensors to cut and not two samples. Containers are cut inside:
    the batch itself, every mapping, named tuple and other kind of list is one. A batch in which no
    tensor comes first that is stacked from samples, as where images differ in size, cannot be
    split by this rule.

    Raises:
        DataError: if `size` is not at least 1.

    >>> split_batch({"x": torch.tensor([1, 2, 3]), "name": ["a", "b", "c"], "scale": 0.5}, 2)[1]
    {'x': tensor([3]), 'name': ['c'], 'scale': 0.5}
    """
    if size < 1:
        raise DataError(f"Parts of {size} samples hold no batch. Give a size of 1 or more.")
    count = sample_count(batch)
    if count <= size:
        return [batch]

    def is_per_sample(value: Any) -> bool:
        is_list = (type(value) is list or type(value) is tuple) and value is not batch
        return is_list and len(value) == count and not _is_stacked(value, count)

    def part(first: int) -> Any:
        def cut(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _rows(leaf, first, size) if _row_count(leaf) == count else leaf
            return leaf[first : first + size] if isinstance(leaf, (list, tuple)) else leaf

        return map_leaves(cut, batch, is_per_sample)

    return [part(first) for first in range(0, count, size)]


def map_leaves(
    function: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """A batch of the same form with `function` applied to all that is not a container.

    Args:
        function: of a leaf.
        batch: tensors and anything else in any nesting of tuple, list and mapping.
        is_leaf: says which containers to hand to `function` as they are; None: none of them.
    """
    if is_leaf is not None and is_leaf(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_leaves(function, value, is_leaf) for key, value in batch.items()}
        if type(batch) is dict:
            return mapped
        result = copy.copy(batch)  # an OrderedDict, a tokenizer's UserDict
        for key, value in mapped.items():
            result[key] = value  # type: ignore[index]
        return result
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(function, value, is_leaf) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_leaves(function, value, is_leaf) for value in batch)
    return function(batch)


def leaves(batch: Any) -> Iterator[Any]:
    """All that is not a container, depth first."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (tuple, list)):
        for value in batch:
            yield from leaves(value)
    else:
        yield batch


def sample_count(batch: Any) -> int:
    """Length of dimension 0 of the first tensor that has one, else 1.

    >>> sample_count({"x": torch.zeros(8, 3), "y": torch.zeros(8)})
    8
    """
    kind = type(batch)
    if kind is tuple or kind is list or kind is dict:  # on the path of every step: under 1 µs
        for leaf in batch.values() if kind is dict else batch:
            if type(leaf) is not Tensor:
                break
            if leaf.ndim:
                rows: int = leaf.shape[0]
                return rows
    counts = (_row_count(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor))
    return next((count for count in counts if count is not None), 1)


@contextmanager
def kept_generators(loader: object) -> Iterator[None]:
    """Put back the state of a loader's own generators: another pass leaves it as it was.

    >>> own = torch.Generator().manual_seed(0)
    >>> loader = torch.utils.data.DataLoader([1, 2, 3], shuffle=True, generator=own)
    >>> with kept_generators(loader):
    ...     first = list(loader)
    >>> first == list(loader)
    True
    """
    states = [(each, each.get_state()) for each in _generators(loader)]
    try:
        yield
    finally:
        for each, state in states:
            each.set_state(state)


def seed_generators(loader: object, seed: int) -> None:
    """Seed a loader's own generators; a loader without any draws from the global ones."""
    for each in _generators(loader):
        each.manual_seed(seed)


def _row_count(tensor: Tensor) -> int | None:
    """Length of dimension 0; None if there is none."""
    return tensor.shape[0] if tensor.ndim else None


def _is_stacked(batch: Any, count: int) -> bool:
    """Whether it holds tensors, and all that have a dimension 0 have `count` rows."""
    rows = {_row_count(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor)}
    return rows - {None} == {count}


def _rows(tensor: Tensor, first: int, size: int) -> Tensor:
    if tensor.layout is torch.strided:
        return tensor[first : first + size]
    last = min(first + size, len(tensor))  # sparse: there are no views of it
    return tensor.index_select(0, torch.arange(first, last, device=tensor.device))


def _can_be_pinned(tensor: Tensor) -> bool:
    """Whether it lies in ordinary memory; subclasses would lose their class, sparse ones fail."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return is_plain and tensor.device.type == "cpu" and not tensor.is_pinned()


def _check_loader(loader: Any, split: str) -> None:
    if isinstance(loader, Iterator):
        raise DataError(
            f"The {split!r} split is a {type(loader).__name__}, which one pass uses up. "
            "Wrap it: a list of its batches, a DataLoader, or a class whose __iter__ starts anew."
        )
    if not hasattr(loader, "__iter__"):
        is_dataset = hasattr(loader, "__getitem__")
        help = "Wrap it in a torch.utils.data.DataLoader." if is_dataset else "Give a DataLoader."
        raise DataError(f"The {split!r} split is a {type(loader).__name__}, not a loader. {help}")
    try:
        is_empty = not len(loader)
    except TypeError:  # of unknown length
        is_empty = not _peek(loader)
    if is_empty:
        raise DataError(
            f"The {split!r} split yields no batch. Check its dataset, its sampler and drop_last."
        )


def _peek(loader: Iterable[Any]) -> list[Any]:
    """The first batch, or nothing; global generators and the loader's own are put back."""
    with isolated_rng(0), kept_generators(loader):
        return list(take(loader, 1))


def _generators(loader: object) -> list[torch.Generator]:
    """Those that a DataLoader, or a view of one, and its samplers draw from."""
    by_batch = getattr(loader, "batch_sampler", None)
    owners = (
        loader,
        getattr(loader, "sampler", None),
        by_batch,
        getattr(by_batch, "sampler", None),
    )
    found = [getattr(owner, "generator", None) for owner in owners]
    return [item for item in found if isinstance(item, torch.Generator)]


def _names(data: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, data)) or "none"
