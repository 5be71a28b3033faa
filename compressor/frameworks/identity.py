"""What the user handed in, as text that is the same in the next process: for digests."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compressor.interfaces.inputs import tensor_bytes


def source_of(value: Any) -> str:
    """Name and source of a function or class, or of an instance's class; the name if no source."""
    if value is None:
        return ""
    named = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    try:
        return f"{name}\n{inspect.getsource(named)}"
    except (OSError, TypeError):  # written in a prompt, or in C
        return name


def stable(value: Any) -> Any:
    """JSON for `value`: tensors by a hash of their content, unknown objects by their class."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        content = hashlib.sha256(tensor_bytes(value)).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, Mapping):
        return {str(key): stable(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [stable(item) for item in value]
    return f"{type(value).__module__}.{type(value).__qualname__}"
