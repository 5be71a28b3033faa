"""A page as a list of blocks, written as Markdown for the documentation or as one HTML file.

In HTML charts are Plotly's, inline, so that the file works offline; in Markdown they are SVG files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from benchmarks.chart import COLOURS, Point, log_log_chart, plain_chart

IMAGES = "images"


@dataclass(frozen=True)
class Heading:
    """A title; `level` 1 is that of the page. `anchor` is where links lead to it."""

    level: int
    words: str
    anchor: str = ""


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    words: str


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads to a heading of the page."""

    words: str
    anchor: str


@dataclass(frozen=True)
class Table:
    """Rows of cells below a row of titles."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str | Link]]


@dataclass(frozen=True)
class Listing:
    """Lines as they are: figures and commands."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Chart:
    """Points of several series; `hover` has a label for each point, in the same order."""

    name: str
    caption: str
    x_title: str
    y_title: str
    series: Mapping[str, Sequence[Point]]
    hover: Mapping[str, Sequence[str]]
    is_logarithmic: bool = False

    def svg(self) -> str:
        draw = log_log_chart if self.is_logarithmic else plain_chart
        return draw(self.series, self.x_title, self.y_title)


Block = Heading | Words | Table | Listing | Chart


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page for `docs/`; its charts are the files of `images`."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def images(blocks: Sequence[Block]) -> dict[str, str]:
    """What the Markdown's charts show: file names, and SVG text."""
    return {f"{block.name}.svg": block.svg() for block in blocks if isinstance(block, Chart)}


def to_html(blocks: Sequence[Block]) -> str:
    """The page as one file that needs no other and no network."""
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("benchmarks", "templates")
    environment = Environment(loader=loader, autoescape=select_autoescape())
    environment.filters["code"] = mark_code
    environment.tests["link"] = lambda cell: isinstance(cell, Link)
    template = environment.get_template("report.html")
    pieces = [{"kind": type(block).__name__, "block": block} for block in blocks]
    title = next(block.words for block in blocks if isinstance(block, Heading))
    plots = {block.name: figure(block) for block in blocks if isinstance(block, Chart)}
    return template.render(title=title, pieces=pieces, plots=plots, plotly=get_plotlyjs())


def mark_code(words: str) -> Markup:
    """Escaped words, with what stands in backticks as code.

    >>> str(mark_code("a < b in `x`"))
    'a &lt; b in <code>x</code>'
    """
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(Markup.escape(words))))


def figure(chart: Chart) -> dict[str, Any]:
    """What Plotly draws: traces and layout."""
    kind = "log" if chart.is_logarithmic else "linear"
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": escape(name),
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "text": [escape(label) for label in chart.hover[name]],
            "marker": {"size": 9, "color": COLOURS[number % len(COLOURS)]},
        }
        for number, (name, points) in enumerate(chart.series.items())
    ]
    layout = {
        "xaxis": {"title": {"text": escape(chart.x_title)}, "type": kind},
        "yaxis": {"title": {"text": escape(chart.y_title)}, "type": kind},
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "height": 420,
        "hovermode": "closest",
    }
    return {"data": traces, "layout": layout}


def write_images(blocks: Sequence[Block], folder: Path) -> None:
    """Write the charts where the Markdown looks for them: below the folder that it is in."""
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for name, text in images(blocks).items():
        (folder / IMAGES / name).write_text(text)


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.words}"
    if isinstance(block, Words):
        return block.words
    if isinstance(block, Listing):
        return "\n".join(["```text", *block.lines, "```"])
    if isinstance(block, Chart):
        return f"![{block.caption}]({IMAGES}/{block.name}.svg)"
    lines = [_markdown_row(block.titles), "|" + "---|" * len(block.titles)]
    return "\n".join([*lines, *map(_markdown_row, block.rows)])


def _markdown_row(cells: Sequence[str | Link]) -> str:
    return f"| {' | '.join(_markdown_cell(cell) for cell in cells)} |"


def _markdown_cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f"[{cell.words}](#{cell.anchor})"
    return cell.replace("|", "\\|").replace("\n", " ")
