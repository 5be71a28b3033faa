"""The pages of techniques and algorithms, from the classes and their cards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

from compressor import functional
from compressor.techniques import TECHNIQUES, Technique
from compressor.training import algorithms
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from docs.measured_methods import measured

MADE = "Made from the code by `python -m docs.generate`."
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Yields")
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
ARGUMENT = re.compile(r"^(\w+): ", re.MULTILINE)


class Described(NamedTuple):
    """A docstring taken apart."""

    text: str  # without its sections
    arguments: dict[str, str]
    example: str


def algorithm_classes() -> list[type[Algorithm]]:
    """Those with a card, by name."""
    found = [
        value
        for _, value in sorted(vars(algorithms).items(), key=lambda item: item[0].lower())
        if inspect.isclass(value) and issubclass(value, Algorithm)
    ]
    return [cls for cls in found if cls.card is not None]


def technique_classes() -> list[type[Technique]]:
    """Those with a card, in the order in which they are applied."""
    found = sorted((TECHNIQUES.get(name) for name in TECHNIQUES.names()), key=lambda c: c.stage)
    return [cls for cls in found if cls.card is not None]


def algorithms_page() -> str:
    """The index of the algorithms."""
    lines = [
        "# Algorithms",
        "",
        "Training methods for the [trainer](training.md), each also a function for a loop of your",
        "own. Classes are in `compressor.training.algorithms`, functions in",
        f"`compressor.functional`. {MADE}",
        "",
        "| algorithm | what it does | function |",
        "|---|---|---|",
    ]
    for cls in algorithm_classes():
        card, name = _card(cls), cls.__name__
        lines.append(
            f"| [{name}](algorithms/{name.lower()}.md) | {card.summary} | {_function(card)} |"
        )
    return "\n".join(lines) + "\n"


def techniques_page() -> str:
    """The index of the techniques."""
    lines = [
        "# Techniques",
        "",
        "Ways to compress. The engine may use all, or those that",
        '`config={"techniques": ["channel_pruning", "quantization"]}` names. They are applied',
        "stage by stage, in this order. Classes are in `compressor.techniques`, functions in",
        f"`compressor.functional`. {MADE}",
        "",
        "| technique | stage | what it does | function |",
        "|---|---|---|---|",
    ]
    for cls in technique_classes():
        card, link = _card(cls), f"[{cls.name}](techniques/{cls.name}.md)"
        row = (link, cls.stage.name.lower(), card.summary, _function(card))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def algorithm_page(cls: type[Algorithm]) -> str:
    """One algorithm: what it is, when to use it, its options, and its function."""
    card, name = _card(cls), cls.__name__
    lines = [
        f"# {name}",
        "",
        card.summary,
        "",
        *_facts(card),
        *([f"- **Settings:** {card.settings}"] if card.settings else []),
        *([f"- **[Measured](../methods.md):** {figures}"] if (figures := measured(name)) else []),
        "",
        "```python",
        f"from compressor.training.algorithms import {name}",
        "```",
        "",
        *_options(cls),
    ]
    if card.functional:
        lines += _functional(card.functional)
    if cls.conflicts:
        lines += ["## Not beside", "", *_conflicts(cls), ""]
    return "\n".join([*lines, "[All algorithms](../algorithms.md)"]) + "\n"


def technique_page(cls: type[Technique]) -> str:
    """One technique: what it is, when to use it, what it chooses from."""
    card = _card(cls)
    lines = [
        f"# {cls.name}",
        "",
        card.summary,
        "",
        *_facts(card),
        "",
        f"Applied in stage `{cls.stage.name.lower()}`, number {cls.stage.value + 1} of "
        f"{len(type(cls.stage))}.",
        "",
        "## What it chooses from",
        "",
        described(cls.choices).text,
        "",
        "## What it does to a model",
        "",
        described(cls.apply).text,
        "",
        "## By itself",
        "",
        "In the engine, alone:",
        "",
        "```python",
        f'config = {{"techniques": ["{cls.name}"]}}',
        "```",
        "",
        "In a program of your own, its class lists choices and applies those that it is given,",
        "as [the guide](../structure.md#in-the-engine) shows:",
        "",
        "```python",
        f"from compressor.techniques import {cls.__name__}",
        "```",
        "",
        *_options(cls),
    ]
    if card.functional:
        lines += _functional(card.functional)
    return "\n".join([*lines, "[All techniques](../techniques.md)"]) + "\n"


def _conflicts(cls: type[Algorithm]) -> list[str]:
    """Whom it cannot act beside, by the reason; a key may be that of a base."""
    beside: dict[str, list[str]] = {}
    for key, reason in cls.conflicts.items():
        named = [
            each.__name__
            for each in algorithm_classes()
            if key in {base.__name__ for base in each.__mro__}
        ]
        beside.setdefault(reason, []).extend(f"`{name}`" for name in named or [key])
    return [f"- {', '.join(names)}: they {reason}" for reason, names in beside.items()]


def _card(cls: type[Algorithm] | type[Technique]) -> Card:
    assert cls.card is not None
    return cls.card


def _function(card: Card) -> str:
    return f"`{card.functional}`" if card.functional else ""


def _facts(card: Card) -> Sequence[str]:
    return (
        f"- **Source:** {card.source}",
        f"- **Use it when:** {card.use_when}",
        f"- **Leave it when:** {card.avoid_when}",
        f"- **Cost:** {card.cost}",
    )


def _options(cls: type) -> list[str]:
    """The arguments of a class, with their defaults and meanings."""
    parameters = inspect.signature(cls).parameters.values()
    if not parameters:
        return []
    meanings = described(cls).arguments | described(cls.__init__).arguments
    lines = ["## Options", "", "| option | default | what it means |", "|---|---|---|"]
    for each in parameters:
        default = "" if each.default is each.empty else f"`{_shown(each.default)}`"
        meaning = meanings.get(each.name, "").replace("|", "\\|")
        lines.append(f"| `{each.name}` | {default} | {meaning} |")
    return [*lines, ""]


def _functional(name: str) -> list[str]:
    """A function of `compressor.functional`: its call, what it does, its example."""
    function = getattr(functional, name)
    about = described(function)
    lines = [
        f"## `cf.{name}`",
        "",
        "```text",
        f"cf.{name}{_signature(function)}",
        "```",
        "",
        about.text,
        "",
    ]
    lines += [f"- `{key}`: {meaning}" for key, meaning in about.arguments.items()]
    if about.arguments:
        lines.append("")
    if about.example:
        lines += ["```pycon", about.example, "```", ""]
    return lines


def _signature(function: object) -> str:
    """Names and defaults; types are in the reference of the API."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def _shown(value: object) -> str:
    return value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else repr(value)


def described(item: object, section: str = "Args") -> Described:
    """Text, arguments (or attributes) and example of a docstring in Google's style."""
    doc = inspect.getdoc(item) or ""
    doc, _, example = doc.partition("\n>>> ")
    parts = SECTION.split(doc)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    pieces = ARGUMENT.split(inspect.cleandoc("\n" + sections.get(section, "")))
    arguments = {
        name: " ".join(meaning.split())
        for name, meaning in zip(pieces[1::2], pieces[2::2], strict=True)
    }
    return Described(parts[0].strip(), arguments, f">>> {example}".strip() if example else "")
