"""Charts of the model: the damage of each choice, and what each layer costs before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compressor.evidence import LayerBill, Sensed
from compressor.report.data import View
from compressor.report.figures import (
    LONGEST_NAME,
    Chart,
    Json,
    axis_title,
    make_figure,
    plain,
    rows_axis,
)
from compressor.report.words import words_of
from compressor.units import amount, damage_text, name_of

LEAST_DAMAGE = 1e-6  # below, damages are the noise of the arithmetic
ROW_PIXELS = 22
AXIS_PIXELS = 130


def damage_chart(view: View) -> Chart:
    """Damage of every choice, by technique: a row a site, a column a choice."""
    groups: dict[str, list[Sensed]] = {}
    for sensed in view.result.damages:
        groups.setdefault(sensed.technique, []).append(sensed)
    taken = {(c.technique, c.site, c.label) for c in view.result.plan}
    figures, summaries = {}, {}
    for technique, choices in groups.items():
        name = words_of(technique)
        figures[name] = _heat_map(choices, taken)
        worst = max(choices, key=lambda sensed: sensed.damage)
        summaries[name] = (
            f"Heat map of the damage of {len(choices)} choices of {name}. The worst is "
            f"{worst.label or 'the only choice'} at {worst.site or 'the whole model'}, "
            f"{damage_text(worst.damage)}."
        )
    return Chart("damage", figures, summaries, is_tall=True)


def layer_chart(view: View) -> Chart:
    """What each layer costs, before and after."""
    figures, summaries = {}, {}
    for key in ("params", "macs", "latency_ms"):
        rows = [
            (row, _of(row.reference, key), _of(row.compressed, key)) for row in view.result.layers
        ]
        shown = [(row, before, after) for row, before, after in rows if 0 < before < math.inf]
        if not shown:
            continue
        name = name_of(key)
        labels = [row.name or "(model)" for row, _, _ in shown]
        texts = [
            f"{plain(label)} ({plain(row.type)})<br>{amount(key, before)} → "
            f"{amount(key, after) if after else 'gone'}"
            f"{f'<br>{plain(words_of(row.format))}' if row.format else ''}"
            for label, (row, before, after) in zip(labels, shown, strict=True)
        ]
        befores, afters = [each[1] for each in shown], [each[2] for each in shown]
        bars = [
            _bars(befores, texts, "reference", "@faint"),
            _bars(afters, texts, "compressed", "@accent"),
        ]
        figures[name] = make_figure(
            bars,
            xaxis={"title": {"text": axis_title(key)}, "side": "top", "rangemode": "tozero"},
            yaxis=rows_axis(labels),
            height=AXIS_PIXELS + ROW_PIXELS * len(shown),
            barmode="group",
            bargap=0.25,
            bargroupgap=0,
        )
        totals = (amount(key, sum(befores)), amount(key, sum(afters)))
        summaries[name] = (
            f"Bars of the {name} of {len(shown)} layers: {totals[0]} before, {totals[1]} now."
        )
    return Chart("layers", figures, summaries, is_tall=True)


def _heat_map(choices: Sequence[Sensed], taken: set[tuple[str, str, str]]) -> Json:
    sites: dict[str, list[Sensed]] = {}
    for sensed in choices:
        sites.setdefault(sensed.site, []).append(sensed)
    rows = list(sites.values())
    width = max(map(len, rows))
    gaps: list[list[Any]] = [[None] * (width - len(row)) for row in rows]
    known = [_power(each) for row in rows for each in row if math.isfinite(each.damage)] or [0.0]
    lowest = math.floor(min(known))
    ticks = list(range(lowest, max(math.ceil(max(known)), lowest + 2) + 1))
    powers = [
        [_power(each) if math.isfinite(each.damage) else ticks[-1] for each in row] + gap
        for row, gap in zip(rows, gaps, strict=True)
    ]
    texts = [[_sensed_text(each) for each in row] + [""] * (width - len(row)) for row in rows]
    places = [
        (column, row, each) for row, found in enumerate(rows) for column, each in enumerate(found)
    ]
    dots = [
        (column, row)
        for column, row, each in places
        if (each.technique, each.site, each.label) in taken
    ]
    crosses = [(column, row) for column, row, each in places if not math.isfinite(each.damage)]
    cells: Json = {
        "type": "heatmap",
        "z": powers,
        "zmin": ticks[0],
        "zmax": ticks[-1],
        "x": list(range(width)),
        "y": list(range(len(rows))),
        "hovertext": texts,
        "hoverinfo": "text",
        "colorscale": [[0, "@heat-low"], [0.5, "@heat-middle"], [1, "@heat-high"]],
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "title": {"text": "damage"},
            "tickvals": ticks,
            "ticktext": [f"{10.0**tick:g}" for tick in ticks],
            "thickness": 12,
            "len": 1,
            "lenmode": "fraction",
        },
    }
    return make_figure(
        [cells, _marks("taken", "circle", dots), _marks("hopeless", "x", crosses)],
        xaxis={
            "tickvals": list(range(width)),
            "ticktext": _column_names(rows, width),
            "side": "top",
            "showgrid": False,
            "zeroline": False,
            "range": [-0.5, width - 0.5],
        },
        yaxis=rows_axis([site or "(model)" for site in sites]),
        height=AXIS_PIXELS + ROW_PIXELS * max(len(rows), 4),
    )


def _power(sensed: Sensed) -> float:
    return math.log10(max(sensed.damage, LEAST_DAMAGE))


def _marks(name: str, symbol: str, places: Sequence[tuple[int, int]]) -> Json:
    line = {"color": "@text", "width": 1.5}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [column for column, _ in places],
        "y": [row for _, row in places],
        "hoverinfo": "skip",
        "marker": {"symbol": symbol, "size": 9, "color": "@card", "line": line},
    }


def _column_names(rows: Sequence[Sequence[Sensed]], width: int) -> list[str]:
    """The setting, where all choices of a column have the same; else its number."""
    names = []
    for column in range(width):
        labels = {row[column].label.partition(";")[0] for row in rows if column < len(row)}
        label = labels.pop() if len(labels) == 1 and len(rows) > 1 else ""
        is_named = 0 < len(label) <= LONGEST_NAME // 2
        names.append(plain(label) if is_named else f"choice {column + 1}")
    return names


def _sensed_text(sensed: Sensed) -> str:
    lines = [
        plain(sensed.site or "the whole model"),
        plain(sensed.label),
        f"damage {damage_text(sensed.damage)}",
        *(
            f"saves {amount(resource, value)} of {name_of(resource)}"
            for resource, value in sensed.saved.items()
        ),
    ]
    return "<br>".join(filter(None, lines))


def _bars(values: Sequence[float], texts: Sequence[str], name: str, color: str) -> Json:
    shown = list(values)
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": shown,
        "y": list(range(len(shown))),
        "hovertext": list(texts),
        "hoverinfo": "text",
        "marker": {"color": color},
    }


def _of(bill: LayerBill, key: str) -> float:
    return float(getattr(bill, key) or 0.0)
