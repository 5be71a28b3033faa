"""Algorithms that change the structure of a model at SETUP, and what follows for all others."""

from __future__ import annotations

FIRST_AT_SETUP = (
    "Distillation",
    "GradualPruning",
    "GroupRegularization",
    "Holding",
    "LayerFreezing",
)
"""Who looks at the layers at SETUP: `before` of algorithms that replace some of them then."""

GROUPED = ("GradualPruning", "GroupRegularization")
MASKED = ("HoldMasks",)

MADE_FOR_THE_OLD = (
    "cannot act in one fit: groups or masks are for layers as they were given, and one of the two "
    "changes these before the first batch. Call compressor.functional.{function}(model) yourself, "
    "make groups or masks for the result, and leave the algorithm out."
)


def changing_layers(function: str, *others: str) -> dict[str, str]:
    """`conflicts` of an algorithm that changes layers for which others were told something.

    Args:
        function: its name in `compressor.functional`.
        others: whom that concerns, `GROUPED` or `MASKED`.
    """
    return dict.fromkeys(others, MADE_FOR_THE_OLD.format(function=function))
