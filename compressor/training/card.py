"""What is told of a training method, beside its code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One method in words. What it costs and gains is measured: `benchmarks/methods.py`.

    Attributes:
        summary: what it does, in a sentence.
        source: paper or document.
        functional: its name in `compressor.functional`; None if it has no such form.
        use_when: it helps.
        avoid_when: it does not.
        cost: in time and memory.
        settings: which to change first, and what they mean; '' where none is told of.
    """

    summary: str
    source: str
    functional: str | None
    use_when: str
    avoid_when: str
    cost: str
    settings: str = ""
