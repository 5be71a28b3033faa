"""What `benchmarks.methods` shows of its results: a row a method, gains paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from benchmarks.methods_table import METHODS, PLAIN, Method

Result = Mapping[str, Any]


class Done(Protocol):
    """A unit of `benchmarks.methods`."""

    @property
    def part(self) -> str: ...
    @property
    def place(self) -> str: ...
    @property
    def method(self) -> Method: ...
    @property
    def seed(self) -> int: ...


NETWORKS = {
    "scratch": "ResNet-20",
    "recovery": "ResNet-20",
    "group_norms": "ResNet-20, group norms, bf16",
    "text": "small BERT",
    "text_bf16": "small BERT, bf16",
}


def method_rows(results: Sequence[tuple[Done, Result]]) -> list[dict[str, Any]]:
    """A row for each method and network; what was not measured is None."""
    found = {
        part: accuracies((u, r) for u, r in results if u.part == part)
        for part in ("scratch", "recovery", "text")
    }
    times = {(u.place, u.method.name): r for u, r in results if u.part == "time"}
    rows = []
    for place, method in distinct(results):
        trained = found["text" if place.startswith("text") else "scratch"]
        recovered = found["recovery"] if place == "scratch" else {}
        timed = times.get((place, method.name), {})
        rows.append(
            {
                "method": method.name,
                "network": NETWORKS[place],
                "settings": method.settings,
                "step time ratio": timed.get("ratio"),
                "± of ratio": timed.get("spread"),
                **columns("scratch", trained, place, method.name),
                **columns("recovery", recovered, "recovery", method.name),
            }
        )
    return rows


def level_rows(results: Sequence[tuple[Done, Result]]) -> list[dict[str, Any]]:
    """A row for each combination, best first."""
    units = [(u, r) for u, r in results if u.part == "levels"]
    found = accuracies(units)
    rows = []
    for name in dict.fromkeys(unit.method.name for unit, _ in units):
        seconds = [r["seconds"] for u, r in units if u.method.name == name]
        own = next(r for u, r in units if u.method.name == name)
        rows.append(
            {
                "combination": name,
                "algorithms": ", ".join(own["settings"]["algorithms"]),
                "learning rate": own["settings"]["optimizer"]["lr"],
                **columns("recovery", found, "recovery", name),
                "seconds": statistics.median(seconds),
            }
        )
    return sorted(rows, key=lambda row: -row["recovery accuracy %"])


def summarize(
    rows: Sequence[Mapping[str, Any]], levels: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """How many rows there are, and the largest gains."""
    gains = [row["recovery gain"] for row in rows if row["recovery gain"] is not None]
    summary = {"methods": float(len({row["method"] for row in rows} - {PLAIN}))}
    if gains:
        summary["largest_recovery_gain"] = max(gains)
    if levels:
        summary["best_level_accuracy"] = levels[0]["recovery accuracy %"]
    return summary


def distinct(results: Iterable[tuple[Done, Result]]) -> list[tuple[str, Method]]:
    """Places, "recovery" being that of "scratch", and methods, both in the order of the tables."""
    found: dict[tuple[str, str], Method] = {}
    for unit, _ in results:
        if unit.part != "levels":
            place = "scratch" if unit.place == "recovery" else unit.place
            found.setdefault((place, unit.method.name), unit.method)
    order = [method.name for method in METHODS]
    places = list(NETWORKS)

    def rank(key: tuple[str, str]) -> tuple[int, int]:
        place, name = key
        return places.index(place), order.index(name) if name in order else len(order)

    return [(key[0], found[key]) for key in sorted(found, key=rank)]


def accuracies(
    results: Iterable[tuple[Done, Result]],
) -> dict[tuple[str, str], dict[int, float]]:
    """By place and method, by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for unit, result in results:
        found.setdefault((unit.place, unit.method.name), {})[unit.seed] = result["accuracy"]
    return found


def names(kind: str) -> list[str]:
    """Of the columns of a kind of training."""
    shown = [f"{kind} accuracy %", f"± of {kind}", f"{kind} gain", f"± of {kind} gain"]
    return [*shown, f"{kind} seeds"]


def columns(
    kind: str, found: Mapping[tuple[str, str], Mapping[int, float]], place: str, name: str
) -> dict[str, float | None]:
    """Mean and spread over seeds of the accuracy, and of the gain over "plain", paired."""
    own, plain = found.get((place, name), {}), found.get((place, PLAIN), {})
    gains = [own[seed] - plain[seed] for seed in own if seed in plain]
    values: list[float | None] = [*mean_and_spread(list(own.values()))]
    values += [None, None] if name == PLAIN else [*mean_and_spread(gains)]
    return dict(zip(names(kind), [*values, len(own)], strict=True))


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None of nothing, and the latter of one value.

    >>> mean_and_spread([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None
