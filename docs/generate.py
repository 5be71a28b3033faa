"""Writes the pages that are made from the code: `python -m docs.generate`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from compressor.techniques import TECHNIQUES
from compressor.training import algorithms
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card

FOLDER = Path(__file__).parent


def algorithms_page() -> str:
    """A card for each algorithm, from its class."""
    classes = [
        value
        for _, value in sorted(vars(algorithms).items(), key=lambda item: item[0].lower())
        if inspect.isclass(value) and issubclass(value, Algorithm)
    ]
    cards = [(cls, cls.card) for cls in classes if cls.card is not None]
    lines = [
        "# Algorithms",
        "",
        "Made from the cards in the code by `python -m docs.generate`. Classes are in",
        "`compressor.training.algorithms`, functions in `compressor.functional`.",
        "",
        "| algorithm | what it does | function |",
        "|---|---|---|",
    ]
    for cls, card in cards:
        name = cls.__name__
        lines.append(f"| [{name}](#{name.lower()}) | {card.summary} | {_function(card)} |")
    for cls, card in cards:
        lines += ["", f"## {cls.__name__}", "", card.summary, "", *_signature(cls), *_facts(card)]
    return "\n".join(lines) + "\n"


def techniques_page() -> str:
    """A card for each technique, in the order in which they are applied."""
    classes = sorted((TECHNIQUES.get(name) for name in TECHNIQUES.names()), key=lambda c: c.stage)
    cards = [(cls, cls.card) for cls in classes if cls.card is not None]
    lines = [
        "# Techniques",
        "",
        "Made from the cards in the code by `python -m docs.generate`. The engine may use all, or",
        'those that `config={"techniques": ["channel_pruning", "quantization"]}` names. They are',
        "applied stage by stage, in this order. Classes are in `compressor.techniques`, functions",
        "in `compressor.functional`.",
        "",
        "| technique | stage | what it does | function |",
        "|---|---|---|---|",
    ]
    for cls, card in cards:
        row = (f"[{cls.name}](#{cls.name})", cls.stage.name.lower(), card.summary, _function(card))
        lines.append(f"| {' | '.join(row)} |")
    for cls, card in cards:
        lines += ["", f"## {cls.name}", "", card.summary, "", *_signature(cls), *_facts(card)]
    return "\n".join(lines) + "\n"


def _function(card: Card) -> str:
    return f"`{card.functional}`" if card.functional else ""


def _signature(cls: type) -> Sequence[str]:
    signature = str(inspect.signature(cls)).replace("'", "").replace(" -> None", "")
    return f"    {cls.__name__}{signature}", ""


def _facts(card: Card) -> Sequence[str]:
    return (
        f"- **Source:** {card.source}",
        f"- **Use it when:** {card.use_when}",
        f"- **Leave it when:** {card.avoid_when}",
        f"- **Cost:** {card.cost}",
    )


PAGES = {"algorithms.md": algorithms_page, "techniques.md": techniques_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
