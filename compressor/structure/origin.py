"""What a compressed model was cut from, noted on the model: saving it needs no reference then.

The note has no values of the reference and takes no memory to speak of. It is in no state dict,
stays when the model is copied or trained, and is not what a file holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor.errors import ModelError
from compressor.result import digest
from compressor.structure.describe import outline
from compressor.structure.record import ORIGIN


@dataclass(frozen=True)
class Origin:
    """A reference as `describe.diff` and a file need it.

    Attributes:
        outline: of the reference; see `describe.outline`.
        fingerprint: its class and sizes.
    """

    outline: nn.Module
    fingerprint: str

    @classmethod
    def of(cls, reference: nn.Module) -> Origin:
        """Of `reference` as it is now, whatever is done to it later."""
        return cls(outline(reference), fingerprint(reference))

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Itself: it is never changed."""
        del memo
        return self


def remember_origin(model: nn.Module, reference: nn.Module) -> None:
    """Note on `model`, in place, that it was cut from `reference`.

    If that was itself cut from another model, from that one: whoever loads the model has its class.
    """
    setattr(model, ORIGIN, vars(reference).get(ORIGIN) or Origin.of(reference))


def origin_of(model: nn.Module) -> Origin:
    """What `remember_origin` noted on `model`, or on the model that it is a copy of.

    Raises:
        ModelError: if nothing was noted.
    """
    noted = vars(model).get(ORIGIN)
    if isinstance(noted, Origin):
        return noted
    raise ModelError(
        f"The {type(model).__name__} does not say what it was compressed from; only models that "
        "Engine.run, prune or load returned, and copies of them, do. Give reference=, the model "
        "before it was compressed, or an instance of its class with its sizes."
    )


def fingerprint(reference: nn.Module) -> str:
    """Class and structure of a model, its values left out."""
    shapes = {name: list(value.shape) for name, value in reference.named_parameters()}
    return f"{type(reference).__qualname__}-{digest(shapes)}"
