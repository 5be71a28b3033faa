"""What Plotly figures are made of: plain dictionaries, coloured when they are drawn.

A colour is written "@name"; the page puts the one of its theme there, by the same name as in its
style sheet. What comes from the user's model is escaped: Plotly reads its texts as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.report.data import Variant
from compressor.units import RESOURCES, amount

Json = dict[str, Any]

LOG_FROM = 8.0  # ratio of the largest to the smallest value, from which an axis is logarithmic
LONGEST_NAME = 30


@dataclass(frozen=True)
class Chart:
    """One place on the page, with one or several figures to choose from.

    Attributes:
        key: of the place.
        figures: by what the button says that chooses it.
        summaries: what each shows, in a sentence, for those who do not see it.
        is_tall: grows with the model; the page gives it a place of its own to scroll in.
    """

    key: str
    figures: Mapping[str, Json]
    summaries: Mapping[str, str]
    is_tall: bool = False


def plain(text: str) -> str:
    """`text` as Plotly shows it letter by letter.

    >>> plain("<b>conv</b>")
    '&lt;b&gt;conv&lt;/b&gt;'
    """
    return html.escape(text, quote=False)


def short(name: str) -> str:
    """The end of a long name, which tells modules apart."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def make_figure(traces: Sequence[Json], *, height: int = 420, **layout: Any) -> Json:
    """A figure of `traces`, `height` pixels high."""
    return {"data": list(traces), "layout": {"height": height, "showlegend": False, **layout}}


def points_of(
    variants: Sequence[Variant], xs: Sequence[Any], ys: Sequence[Any], texts: Sequence[str]
) -> Json:
    """Dots, which the page selects their variants by."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(xs),
        "y": list(ys),
        "customdata": [variant.record.id for variant in variants],
        "hovertext": list(texts),
        "hoverinfo": "text",
    }


def make_line(
    xs: Sequence[Any],
    ys: Sequence[Any],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    mode: str = "lines",
    hover: bool = True,
) -> Json:
    """A line; without `hover` it says nothing."""
    line: Json = {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": list(xs),
        "y": list(ys),
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 7},
    }
    return line if hover else {**line, "hoverinfo": "skip"}


def rows_axis(names: Sequence[str]) -> Json:
    """Names from above to below; numbers in the figure, since names may look like numbers."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": [plain(short(name)) for name in names],
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
        "ticks": "",
    }


def cost_axis(resource: str, values: Sequence[float]) -> Json:
    """Linear, or where the values are far apart logarithmic, with ticks at 1, 2 and 5."""
    title = {"text": axis_title(resource)}
    if not values or min(values) <= 0 or max(values) / min(values) < LOG_FROM:
        return {"title": title, "type": "linear"}
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    is_bare = resource == "latency_ms"  # the title has the unit
    texts = [f"{tick:g}" if is_bare else amount(resource, tick) for tick in ticks]
    return {"title": title, "type": "log", "tickvals": ticks, "ticktext": texts}


def axis_title(resource: str) -> str:
    """What an axis of that cost is called, with its unit where the name does not say it."""
    known = RESOURCES[resource]
    unit = "bytes" if known.unit == "B" else known.unit
    return f"{known.name}, {unit}" if unit not in ("", known.name) else known.name
