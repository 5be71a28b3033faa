"""`--set key=value`: one entry of a job, by its dotted name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def parse(text: str) -> tuple[tuple[str, ...], Any]:
    """Names and value; the value is read as YAML.

    Raises:
        ValueError: if it has no name, or no value that can be read.

    >>> parse("budget.minutes=30"), parse("techniques=[low_rank, quantization]")
    ((('budget', 'minutes'), 30), (('techniques',), ['low_rank', 'quantization']))
    """
    import yaml

    key, equals, value = text.partition("=")
    names = tuple(key.strip().split("."))
    if not equals or not all(names):
        raise ValueError(f"{text!r} is not key=value. Write for example budget.minutes=30.")
    try:
        return names, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"The value of {text!r} cannot be read. Quote it as YAML does.") from error


def nest(overrides: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """All of them as one mapping; later ones win.

    >>> nest([(("budget", "minutes"), 30), (("delta",), 1)])
    {'budget': {'minutes': 30}, 'delta': 1}
    """
    values: dict[str, Any] = {}
    for names, value in overrides:
        for name in reversed(names):
            value = {name: value}
        values = merge(values, value)
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the entries of `above` in place of its own; mappings are merged in turn.

    >>> merge({"delta": 1, "budget": {"trials": 3}}, {"budget": {"minutes": 5}})
    {'delta': 1, 'budget': {'trials': 3, 'minutes': 5}}
    """
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[name] = value
    return merged
