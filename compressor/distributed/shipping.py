"""The user's job as bytes for the workers of Ray, with the functions of their script in them."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Mapping
from typing import IO, Any

from torch.utils.data import DataLoader

from compressor.errors import ConfigError, first_line
from compressor.optional import require

DATA = "data"  # how the names of its parts begin
WAYS_OUT = {
    True: "Hand in data=make_loaders, a function without arguments that returns the mapping of "
    "splits: it is called once here and once in every worker.",
    False: "Let it open files, locks and connections when it is first used, not when it is made; "
    "or leave them out in its `__getstate__`.",
}


def ship(value: object) -> bytes:
    """`value` as bytes; functions and classes that cannot be imported go along.

    Raises:
        MissingDependencyError: without Ray.
        Exception: what pickling raises; `check_shipping` would have said more.
    """
    file = io.BytesIO()
    _pickle(value, file)
    return file.getvalue()


def check_shipping(parts: Mapping[str, object]) -> None:
    """Pickle what is to be shipped, and keep nothing of it.

    Args:
        parts: by the name that the user knows them by.

    Raises:
        ConfigError: if a part cannot be pickled; it names the part and the way out.
        MissingDependencyError: without Ray.
    """
    require("ray", extra="ray")
    for name, part in parts.items():
        try:
            _pickle(part, _Nowhere())
        except Exception as error:  # pickling calls methods of the user's objects
            raise ConfigError(
                f"{name} cannot be sent to the workers of Ray: {first_line(error)} "
                f"{WAYS_OUT[name.startswith(DATA)]}"
            ) from error


def unship(shipped: bytes) -> Any:
    """What `ship` was given, in another process.

    Raises:
        ConfigError: if it cannot be read here, as where a module of the user's is missing.
    """
    try:
        return pickle.loads(shipped)
    except Exception as error:  # unpickling imports the user's modules
        raise ConfigError(
            f"The job cannot be read in a worker of Ray: {first_line(error)} Install what your "
            "script imports on every node, or start Ray yourself before the engine: "
            "ray.init(runtime_env={'working_dir': '.'})."
        ) from error


class _Nowhere(io.RawIOBase):
    """A file that forgets."""

    def write(self, content: Any) -> int:
        """Its length."""
        return len(content)


def _pickle(value: object, file: IO[bytes] | _Nowhere) -> None:
    pickler = require("ray.cloudpickle", extra="ray").CloudPickler

    class Pickler(pickler):  # type: ignore[misc, valid-type]
        """Leaves out the processes that an earlier pass has left a loader."""

        def reducer_override(self, each: Any) -> Any:
            if isinstance(each, DataLoader) and vars(each).get("_iterator") is not None:
                new = copyreg.__newobj__  # type: ignore[attr-defined]
                return new, (type(each),), {**vars(each), "_iterator": None}
            return super().reducer_override(each)

    Pickler(file).dump(value)
