"""A scatter on logarithmic or plain axes as an SVG file, for the documentation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

WIDTH, HEIGHT, MARGIN = 640, 420, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
ROUND_STEPS = (1, 2, 2.5, 5, 10)  # times a power of ten: what people count in
MOST_TICKS = 6

Point = tuple[float, float]


class Scale(Protocol):
    """Where values are on an axis, and which of them are written on it."""

    def place(self, value: float) -> float: ...

    def ticks(self) -> list[float]: ...


def log_log_chart(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> str:
    """The points of each series (all above 0) as SVG text, a colour each, with a legend."""
    points = [point for entries in series.values() for point in entries]
    x_axis = Axis.around([x for x, _ in points], MARGIN, WIDTH - 20)
    y_axis = Axis.around([y for _, y in points], HEIGHT - MARGIN, 20)
    return draw(series, x_axis, y_axis, x_title, y_title)


def plain_chart(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str) -> str:
    """The same on axes that are not logarithmic, from the lowest to the highest value."""
    points = [point for entries in series.values() for point in entries]
    x_axis = PlainAxis.around([x for x, _ in points], MARGIN, WIDTH - 20)
    y_axis = PlainAxis.around([y for _, y in points], HEIGHT - MARGIN, 20)
    return draw(series, x_axis, y_axis, x_title, y_title)


def draw(
    series: Mapping[str, Sequence[Point]], x_axis: Scale, y_axis: Scale, x_title: str, y_title: str
) -> str:
    """The points of each series on the two axes as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(line(x, 20, x, HEIGHT - MARGIN))
        parts.append(text(x, HEIGHT - MARGIN + 18, f"{value:g}", "middle"))
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(line(MARGIN, y, WIDTH - 20, y))
        parts.append(text(MARGIN - 6, y + 4, f"{value:g}", "end"))
    parts.append(text((MARGIN + WIDTH) / 2, HEIGHT - 14, x_title, "middle"))
    turned = f'transform="rotate(-90 16 {HEIGHT / 2:.0f})"'
    parts.append(text(16, HEIGHT / 2, y_title, "middle", turned))
    for number, (name, entries) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        for x, y in entries:
            place = f'cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}"'
            parts.append(f'<circle {place} r="4" fill="{colour}" fill-opacity="0.8"/>')
        parts.append(text(MARGIN + 12, 36 + 16 * number, name, "start", f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


class Axis:
    """A logarithmic scale between whole powers of ten."""

    def __init__(self, low: int, high: int, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Axis:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return cls(low, max(high, low + 1), start, end)

    def place(self, value: float) -> float:
        """Where `value` is, in pixels."""
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """The powers of ten."""
        return [10.0**power for power in range(self.low, self.high + 1)]


class PlainAxis:
    """A scale between multiples of a round step."""

    def __init__(self, low: int, high: int, step: float, start: float, end: float) -> None:
        self.low, self.high, self.step, self.start, self.end = low, high, step, start, end

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> PlainAxis:
        width = max(values) - min(values) or max(abs(max(values)), 1.0)
        power = 10.0 ** math.floor(math.log10(width / MOST_TICKS))
        step = next(power * step for step in ROUND_STEPS if power * step >= width / MOST_TICKS)
        low, high = math.floor(min(values) / step), math.ceil(max(values) / step)
        return cls(low, max(high, low + 1), step, start, end)

    def place(self, value: float) -> float:
        """Where `value` is, in pixels."""
        share = (value / self.step - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """The multiples of the step."""
        return [number * self.step for number in range(self.low, self.high + 1)]


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(words)}</text>'
