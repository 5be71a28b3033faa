"""A page is made of any result.json, however odd: what is not known is unknown."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from compressor.errors import StudyError
from compressor.report.html import render_page
from compressor.report.reading import read_leniently
from compressor.result import Result
from tests.report.results import full_result

ODD = (None, math.nan, math.inf, -1, "text", [], {}, [None], {"a": None}, True)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the megabytes of Plotly."""
    monkeypatch.setattr("compressor.report.html._plotly", lambda: "")


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(full_result().to_json()))
    values["variants"] = [values["variants"][3]]
    values["frontier"] = ["aaaa04"]
    for name in ("damages", "layers", "frozen"):
        values[name] = values[name][:1]
    for plan in (values["plan"], values["variants"][0]["plan"]):
        del plan[1:]
    return values


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in `values`."""
    items = values.items() if isinstance(values, dict) else ()
    for key, value in (*items, *(enumerate(values) if isinstance(values, list) else ())):
        yield (*path, key)
        yield from places(value, (*path, key))


def parent(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values


def test_what_is_whole_is_read_as_a_run_reads_it(whole: dict[str, Any]) -> None:
    whole = {**whole, "variants": full_result().to_json()["variants"]}
    assert read_leniently(whole) == Result.from_json(whole)


def test_the_page_is_made_whatever_is_missing(whole: dict[str, Any]) -> None:
    for path in places(whole):
        values = copy.deepcopy(whole)
        del parent(values, path)[path[-1]]
        assert "</html>" in render_page(values), path
    assert "</html>" in render_page({})


@pytest.mark.slow
def test_the_page_is_made_whatever_stands_there(whole: dict[str, Any]) -> None:
    for number, path in enumerate(places(whole)):
        if path == ("schema_version",):
            continue
        for odd in (ODD[number % len(ODD)], ODD[(number + 3) % len(ODD)]):  # the next has others
            values = copy.deepcopy(whole)
            parent(values, path)[path[-1]] = odd
            try:
                text = render_page(values)
            except Exception as error:
                raise AssertionError(f"{path} is {odd!r}") from error
            assert "</html>" in text


def test_a_variant_that_went_on_from_itself_is_no_circle(whole: dict[str, Any]) -> None:
    values = copy.deepcopy(whole)
    values["variants"][0]["start"] = values["variants"][0]["id"]
    assert "</html>" in render_page(values)


def test_half_a_claim_is_none(whole: dict[str, Any]) -> None:
    values = copy.deepcopy(whole)
    values["certificate"]["interval"]["high"] = None
    assert read_leniently(values).certificate.interval is None


def test_a_newer_schema_is_refused_as_ever() -> None:
    with pytest.raises(StudyError, match="schema version 99"):
        read_leniently({"schema_version": 99})
