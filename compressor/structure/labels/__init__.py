"""Which entries of which tensors live and die together, read off an exported graph."""

from compressor.structure.labels import (  # noqa: F401  (they register their rules)
    contraction,
    movement,
    normalization,
    recurrent,
    reduction,
)
from compressor.structure.labels.flow import Flow

__all__ = ["Flow"]
