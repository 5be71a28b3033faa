"""What is told of a training method, beside its code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One method in words.

    Attributes:
        summary: what it does, in a sentence.
        source: paper or document.
        functional: its name in `compressor.functional`; None if it has no such form.
        use_when: it helps.
        avoid_when: it does not.
        cost: in time and memory.
    """

    summary: str
    source: str
    functional: str | None
    use_when: str
    avoid_when: str
    cost: str
