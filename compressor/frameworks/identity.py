"""Whether what the user handed in is the same in another process."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from compressor.distributed import Context
from compressor.errors import ModelError
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


def check_same_structure(model: nn.Module, context: Context) -> None:
    """Do nothing if all processes have a model of these classes and sizes.

    Raises:
        ModelError: in all processes, if one has another.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    everybody = context.gather((type(model).__qualname__, sizes))
    first = everybody[0]
    for rank, other in enumerate(everybody):
        if other != first:
            names = [n for n in {**first[1], **other[1]} if first[1].get(n) != other[1].get(n)]
            where = f"{names[0]!r} differs" if names else f"it is a {other[0]}"
            raise ModelError(
                f"The model of rank {rank} has another structure than that of rank 0: {where}. "
                "Give all processes the same model."
            )
