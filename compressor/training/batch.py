"""One item of a batch of any form: the inputs, the targets."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compressor.errors import DataError


def get_item(batch: Any, key: int | str) -> Any:
    """The item of `batch` called `key`.

    Args:
        batch: a tuple, list, named tuple, mapping, or an object with attributes.
        key: index, key, or name of a field or attribute.

    Raises:
        DataError: if there is none.

    >>> get_item(("inputs", "targets"), 1), get_item({"x": 2}, "x")
    ('targets', 2)
    """
    if not _has(batch, key):
        raise _missing(batch, key)
    if isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and isinstance(key, int)):
        return batch[key]  # type: ignore[index]
    return getattr(batch, str(key))


def set_item(batch: Any, key: int | str, value: Any) -> Any:
    """A batch of the same form with `value` in place of the item `key`; `batch` is not changed.

    Args:
        batch: as in `get_item`; its other items are shared.
        key: of an item that it has.
        value: the new one.

    Raises:
        DataError: if there is no such item.

    >>> set_item(("inputs", "targets"), 0, "mixed")
    ('mixed', 'targets')
    """
    if not _has(batch, key):
        raise _missing(batch, key)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return batch._replace(**{batch._fields[key] if isinstance(key, int) else key: value})  # type: ignore[attr-defined]
    if isinstance(batch, (tuple, list)):
        items = list(batch)
        items[int(key)] = value
        return items if type(batch) is list else type(batch)(items)
    if isinstance(batch, Mapping):
        changed = copy.copy(batch)  # an OrderedDict, a tokenizer's UserDict
        changed[key] = value  # type: ignore[index]
        return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{str(key): value})
    changed = copy.copy(batch)
    setattr(changed, str(key), value)
    return changed


def _has(batch: Any, key: int | str) -> bool:
    if isinstance(batch, (tuple, list)):
        if isinstance(key, int):
            return -len(batch) <= key < len(batch)
        return key in getattr(batch, "_fields", ())
    if isinstance(batch, Mapping):
        return key in batch
    return isinstance(key, str) and not isinstance(batch, Tensor) and hasattr(batch, key)


def _missing(batch: Any, key: int | str) -> DataError:
    kind = type(batch).__name__
    if isinstance(batch, Tensor):
        return DataError(
            f"The batch is a tensor of shape {tuple(batch.shape)} and has no item {key!r}. "
            "Let the loader give (inputs, targets) or a dict."
        )
    if isinstance(batch, Mapping):
        has = f"the keys {', '.join(map(repr, batch))}" if batch else "no key"
    elif hasattr(batch, "_fields"):
        has = f"the fields {', '.join(batch._fields)}"
    elif isinstance(batch, (tuple, list)):
        has = f"{len(batch)} items"
    else:
        names = ", ".join(getattr(batch, "__dict__", ()))
        has = f"the attributes {names}" if names else "no attribute"
    return DataError(
        f"The batch, a {kind}, has no item {key!r}; it has {has}. Set input_key and target_key to "
        "where the inputs and the targets are; if the model is called with more than one of them, "
        "put it into a TaskModel of your own, whose forward and loss take the batch apart."
    )
