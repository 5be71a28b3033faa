"""What the benchmark draws and sums up, without timing anything."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.latency_table import KINDS, Bench, Kind, draw, summarize
from compressor.result import Choice


def row(model: str, variant: str, error: float) -> dict[str, Any]:
    return {"model": model, "variant": variant, "error": error}


def test_medians_are_of_the_error_without_its_sign() -> None:
    summary = summarize([row("a", "x", -0.3), row("a", "y", 0.1), row("b", "x", -0.1)])
    assert summary["median_error_fraction"] == pytest.approx(0.1)
    assert summary["median_error_fraction a"] == pytest.approx(0.2)
    assert summary["median_error_fraction x"] == pytest.approx(0.2)


def test_a_plan_holds_one_choice_a_site_at_most() -> None:
    sites = {f"s{i}": [Choice("t", f"s{i}", {"w": w}) for w in (1, 2)] for i in range(20)}
    bench = cast(Bench, SimpleNamespace(sites={"t": sites}, int8_layers=["a", "b"]))
    for kind in (Kind("some", ("t",)), Kind("all", ("t",), 1.0, everywhere=True)):
        plan, int8 = draw(bench, kind, random.Random(0))
        taken = [choice.site for choice in plan]
        assert len(taken) == len(set(taken))
        assert (len(taken) == len(sites)) == kind.everywhere
        assert len(int8) == (2 if kind.everywhere else 0)


def test_kinds_have_names_of_their_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
