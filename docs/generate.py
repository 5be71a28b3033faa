"""Writes the pages that are made from the code: `python -m docs.generate`."""

from __future__ import annotations

import inspect
from pathlib import Path

from compressor.training import algorithms
from compressor.training.algorithm import Algorithm

FOLDER = Path(__file__).parent


def algorithms_page() -> str:
    """A card for each algorithm, from its class."""
    classes = [
        value
        for _, value in sorted(vars(algorithms).items(), key=lambda item: item[0].lower())
        if inspect.isclass(value) and issubclass(value, Algorithm) and value.card is not None
    ]
    lines = [
        "# Algorithms",
        "",
        "Made from the cards in the code by `python -m docs.generate`. Classes are in",
        "`compressor.training.algorithms`, functions in `compressor.functional`.",
        "",
        "| algorithm | what it does | function |",
        "|---|---|---|",
    ]
    for cls in classes:
        card = cls.card
        assert card is not None
        function = f"`{card.functional}`" if card.functional else ""
        lines.append(f"| [{cls.__name__}](#{cls.__name__.lower()}) | {card.summary} | {function} |")
    for cls in classes:
        lines += ["", f"## {cls.__name__}", "", *_card(cls)]
    return "\n".join(lines) + "\n"


def _card(cls: type[Algorithm]) -> list[str]:
    card = cls.card
    assert card is not None
    signature = str(inspect.signature(cls)).replace("'", "").replace(" -> None", "")
    return [
        card.summary,
        "",
        f"    {cls.__name__}{signature}",
        "",
        f"- **Source:** {card.source}",
        f"- **Use it when:** {card.use_when}",
        f"- **Leave it when:** {card.avoid_when}",
        f"- **Cost:** {card.cost}",
    ]


PAGES = {"algorithms.md": algorithms_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make())
