"""The fit and the chart of `benchmarks.group_time`."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.chart import Axis, log_log_chart
from benchmarks.group_time import exponent


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    rows = [{"operations": n, "s of processor time": 0.02 * n**1.5} for n in (10, 40, 300)]
    assert exponent(rows) == pytest.approx(1.5)


def test_a_decade_is_as_long_as_the_next() -> None:
    axis = Axis.around([3.0, 700.0], 0, 300)
    assert axis.ticks() == [1, 10, 100, 1000]
    assert [axis.place(value) for value in axis.ticks()] == pytest.approx([0, 100, 200, 300])


def test_the_chart_has_a_dot_for_each_point() -> None:
    chart = log_log_chart({"a < b": [(10, 0.1), (20, 0.3)], "c": [(5, 2.0)]}, "x", "y")
    root = ElementTree.fromstring(chart)
    assert sum(element.tag.endswith("circle") for element in root) == 3
