"""Libraries that only some need: imported where they are used, and missed with a way out."""

from __future__ import annotations

import importlib
from types import ModuleType

from compressor.errors import MissingDependencyError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which comes with the extra named `extra`.

    Raises:
        MissingDependencyError: if it is not installed; the message has the line that installs it.
        ImportError: as it came, if it is installed and fails to import something else.

    >>> require("math", extra="test").sqrt(4)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingDependencyError(
            f'{module} is not installed. It comes with: pip install "compressor[{extra}]"'
        ) from error
