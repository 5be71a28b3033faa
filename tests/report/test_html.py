"""The page as text: what is in it, and that nothing in it leaves it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import StudyError
from compressor.evidence import Sensed
from compressor.report.charts import make_charts
from compressor.report.claims import claims
from compressor.report.data import View
from compressor.report.figures import plain, short
from compressor.report.html import render_page, write_report
from compressor.result import Result
from tests.report.results import CERTIFICATE, NAMES, full_result, hostile_result, record


class Page(HTMLParser):
    """What a parser sees: elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = self._is_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._is_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    return render_page(full_result().to_json())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_written_whole_and_its_path_returned(tmp_path: Path, text: str) -> None:
    path = write_report(full_result().to_json(), tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert path.read_text() == text


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        target = attributes.get("href") or "#"
        assert target.startswith(("#", "data:")), target
    style = re.search("<style>(.*?)</style>", render_page(full_result().to_json()), re.DOTALL)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_the_policy_names_the_scripts_of_the_page_and_no_others(page: Page) -> None:
    (policy,) = [
        attributes["content"]
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    digests = [hashlib.sha256(script.encode()).digest() for script in page.scripts[1:]]
    hashes = [f"'sha256-{base64.b64encode(each).decode()}'" for each in digests]
    assert f"script-src {' '.join(hashes)};" in policy
    assert policy.startswith("default-src 'none';")


def test_the_data_can_be_read_back(page: Page) -> None:
    data = json.loads(page.scripts[0])
    assert set(data["charts"]) == {"frontier", "damage", "layers", "predictions", "curves"}
    assert data["selected"] == "aaaa04"
    assert ["quantization", "fc", "static int8"] in data["variants"]["aaaa01"]["plan"]


def test_hostile_names_end_no_script_and_make_no_element() -> None:
    page = Page(render_page(hostile_result().to_json()))
    assert len(page.scripts) == 3, "the data, Plotly and ours"
    json.loads(page.scripts[0])
    for tag, attributes in page.tags:
        assert tag != "img"
        assert not [name for name in attributes if name.startswith("on")]


def test_what_is_no_number_is_left_out_and_not_written_as_one() -> None:
    result = full_result()
    odd = replace(result.variants[0], metrics={"accuracy": math.nan}, predicted={})
    cost = replace(result.certificate, latency_ratio=math.inf)
    values = replace(result, variants=[odd], frontier=[odd], certificate=cost).to_json()
    page = Page(render_page(values))
    assert "NaN" not in page.scripts[0]
    assert "Infinity" not in page.scripts[0]


def test_a_file_of_the_first_schema_is_shown_without_what_it_lacks() -> None:
    values: dict[str, Any] = full_result().to_json()
    for name in ("chosen", "damages", "layers", "frozen"):
        del values[name]
    for each in values["variants"]:
        del each["curve"]
    page = Page(render_page({**values, "schema_version": 1}))
    data = json.loads(page.scripts[0])
    assert set(data["charts"]) == {"frontier", "predictions"}
    assert data["selected"] == "aaaa04", "the last with the plan of the result"


def test_a_file_of_a_newer_schema_is_refused() -> None:
    with pytest.raises(StudyError, match="schema version 3"):
        render_page({**full_result().to_json(), "schema_version": 3})


def test_a_run_without_variants_is_shown() -> None:
    result = replace(full_result(), variants=[], frontier=[], reason="no time was left", chosen="")
    text = render_page(replace(result, damages=(), layers=(), frozen=()).to_json())
    assert "The reference itself is the answer: no time was left." in text
    assert "No variant was made." in text


def test_curves_go_on_where_those_of_their_start_ended() -> None:
    view = View(full_result())
    final = view.variants[3]
    assert [point.epoch for point in final.curve] == [0, 1, 2, 2, 3, 4, 5]
    assert [variant.record.id for variant in view.finalists()] == ["aaaa04"]


def test_variants_are_within_outside_or_failed_by_their_drop() -> None:
    view = View(full_result())
    verdicts = [variant.verdict for variant in view.variants]
    assert verdicts == ["within", "outside", "failed", "within", "outside"]
    drops = [variant.drop for variant in view.variants]
    assert drops[0] == pytest.approx(0.04)
    assert drops[2] is None


def test_an_error_is_worse_when_it_rises() -> None:
    result = full_result()
    config = {**result.info["config"], "metric_mode": "min"}
    view = View(replace(result, info={**result.info, "config": config}))
    assert view.variants[0].drop == pytest.approx(-0.04)


def test_decisions_name_variants_as_the_page_does() -> None:
    assert View(full_result()).decisions()[1].startswith("Variant 4 is taken")


def test_what_is_frozen_is_said_once_and_by_reason() -> None:
    view = View(full_result())
    assert view.sentences() == ["A decision."]
    groups = view.frozen()
    assert [(technique, len(sites)) for technique, _, sites in groups] == [
        ("sparsity", 1),
        ("channel pruning", 12),
    ]


def test_the_heat_map_has_a_row_a_site_and_a_column_a_choice() -> None:
    figures = make_charts(View(full_result()))["damage"].figures
    assert list(figures) == ["channel pruning", "quantization", "block removal"]
    cells, dots, crosses = figures["channel pruning"]["data"]
    assert crosses["x"] == [], "nothing is hopeless"
    assert len(cells["z"]) == len(NAMES)
    assert cells["z"][0] == pytest.approx([math.log10(0.5 / kept) for kept in (24, 16, 8)])
    assert list(zip(dots["x"], dots["y"], strict=True)) == [(1, 1)], "16 of 32 channels"
    assert figures["channel pruning"]["layout"]["yaxis"]["ticktext"] == list(NAMES)
    assert figures["quantization"]["layout"]["xaxis"]["ticktext"] == ["static int8"]


def test_layers_without_a_latency_are_not_among_the_bars_of_it() -> None:
    figures = make_charts(View(full_result()))["layers"].figures
    assert len(figures["parameters"]["layout"]["yaxis"]["tickvals"]) == 6
    before, after = figures["latency"]["data"]
    assert before["x"] == [0.2] * 5
    assert after["x"] == [0.05] * 4 + [0.0]


def test_predictions_are_drawn_against_what_was_measured() -> None:
    (_, points) = make_charts(View(full_result()))["predictions"].figures["latency"]["data"]
    for predicted, measured in zip(points["x"], points["y"], strict=True):
        assert predicted == pytest.approx(0.9 * measured)


def test_every_chart_is_told_in_a_sentence() -> None:
    for chart in make_charts(View(full_result())).values():
        assert chart.summaries.keys() == chart.figures.keys()
        assert all(summary.endswith(".") for summary in chart.summaries.values())


def test_texts_for_plotly_are_no_markup_and_not_too_long() -> None:
    assert plain("<b>a & b</b>") == "&lt;b&gt;a &amp; b&lt;/b&gt;"
    assert short("a" * 40 + ".conv") == "…" + "a" * 24 + ".conv"
    assert short("conv") == "conv"


def test_the_certificate_says_how_sure_it_is() -> None:
    view = View(full_result())
    assert view.verdict == "Within delta, for certain"
    text = " ".join(claims(full_result()))
    assert "With 95 % confidence the true drop lies between 0.34 and 0.98, all of it" in text
    assert "widened for 11 evaluations of compressed models there" in text
    assert "evaluated 12 times in all" in text
    unsure = replace(full_result(), certificate=replace(CERTIFICATE, interval=None))
    assert View(unsure).verdict == "Within delta as measured"
    failed = replace(full_result(), certificate=replace(CERTIFICATE, within_delta=False))
    assert View(failed).verdict == "Not within delta"


def test_each_chart_has_the_frontier_of_its_own_cost() -> None:
    """The smallest file need not be on the frontier of the run, which is that of its latency."""
    result = full_result()
    slow = record("aaaa06", 91.5, 0.9, 80_000)  # slower than aaaa01, and worse; but the smallest
    view = View(replace(result, variants=[*result.variants, slow]))
    figures = make_charts(view)["frontier"].figures
    lines = {name: figure["data"][0] for name, figure in figures.items()}
    assert lines["latency"]["y"] == [60.0, 90.95, 91.6]
    assert lines["latency"]["x"] == [0.2, 0.31, 0.5]
    assert lines["size"]["x"] == [80_000, 260_000]
    assert lines["size"]["y"] == [91.5, 91.6]


def test_what_is_hopeless_is_called_so_and_does_not_stretch_the_colours() -> None:
    """It stood as 1e6 in result.json, and gave the scale six decades that nothing else had."""
    result = full_result()
    worst = Sensed("channel_pruning", "conv1", "2 of 32 channels", math.inf, {"latency_ms": 0.02})
    values = replace(result, damages=(*result.damages, worst)).to_json()
    assert values["damages"][-1]["damage"] is None
    json.dumps(values, allow_nan=False)
    view = View(Result.from_json(values))
    assert view.result.damages[-1].damage == math.inf
    figure = make_charts(view)["damage"].figures["channel pruning"]
    cells, _, crosses = figure["data"]
    assert cells["zmax"] <= 0, "no damage that was measured is above 1"
    (row,) = [i for i, each in enumerate(cells["z"]) if each[-1] is not None]
    assert cells["z"][row][-1] == cells["zmax"]
    assert (crosses["x"], crosses["y"]) == ([3], [row])
    assert "damage hopeless" in cells["hovertext"][row][-1]
    assert "<td>hopeless</td>" in render_page(values)
    old = {**values["damages"][-1], "damage": 1e6}
    assert Sensed.from_json(old).damage == math.inf


def test_heat_map_and_layers_are_tables_too(page: Page, text: str) -> None:
    assert sum(tag == "details" for tag, _ in page.tags) >= 4
    body = text.partition('<script type="application/json"')[0]
    for each in full_result().damages:
        assert f"<td>{each.label}</td>" in body
    assert "<td>9.22 k → 2.30 k</td><td>10.0 MMACs → 1.00 MMACs</td>" in body
    assert "<td>0.200 ms → 0.0500 ms</td><td>static int8</td>" in body


def test_without_scripts_the_plan_of_the_result_is_there(text: str) -> None:
    before = text.partition('<script type="application/json"')[0]
    assert '<h3 id="plan-title">Variant 4 (aaaa04)</h3>' in before
    assert "<td>16 of 32 channels</td>" in before.partition('id="plan-table"')[2]
