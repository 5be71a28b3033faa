"""Variants in rounds: recorded in order, each once, whoever makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from compressor.config import Config
from compressor.frameworks.base import Job
from compressor.result import Choice, Plan
from compressor.search.making import InlineMaker, Made, Work
from compressor.search.study import Study
from compressor.search.variants import Variants, Wish
from tests.fakes import FakeBench


class Backwards(InlineMaker):
    """Makes the last of a round first, as a quick worker might."""

    def make(self, works: Sequence[Work]) -> Iterator[Made]:
        made = [next(super(Backwards, self).make([work])) for work in reversed(works)]
        return reversed(made)


def wish(layer: int, epochs: int = 2) -> Wish:
    return Wish(Plan((Choice("block_removal", f"layer{layer}", {"removed": True}),)), epochs)


@pytest.fixture
def bench() -> FakeBench:
    return FakeBench(Job({}, None, Config()))


def variants(bench: FakeBench, folder: Path, kind: type[InlineMaker]) -> Variants:
    made = folder / "variants"
    return Variants(bench, Study(folder / "study.db"), made, {"seed": 0}, kind(bench, made, 3))


def test_records_do_not_depend_on_who_of_a_round_is_done_first(
    bench: FakeBench, tmp_path: Path
) -> None:
    wishes = [wish(0), wish(3), wish(1, epochs=5)]
    inline = variants(bench, tmp_path / "inline", InlineMaker)
    backwards = variants(bench, tmp_path / "backwards", Backwards)
    records = [
        [replace(record, seconds=0.0) for record in each.make(wishes)]
        for each in (inline, backwards)
    ]
    assert records[0] == records[1]
    assert [r.plan for r in records[0]] == [w.plan for w in wishes]
    assert [r.id for r in inline.known()] == [r.id for r in backwards.known()]


def test_what_a_round_asks_for_twice_is_made_once(bench: FakeBench, tmp_path: Path) -> None:
    first, second, third = variants(bench, tmp_path, InlineMaker).make([wish(0), wish(1), wish(0)])
    assert first == third != second
    assert bench.calls.count("build") == 2


def test_what_is_known_of_a_round_is_not_made_again(bench: FakeBench, tmp_path: Path) -> None:
    before = variants(bench, tmp_path, InlineMaker).make([wish(1)])
    again = variants(bench, tmp_path, InlineMaker).make([wish(0), wish(1)])
    assert again[1] == before[0]
    assert bench.calls.count("build") == 2


def test_one_that_fails_leaves_the_others_of_its_round(tmp_path: Path) -> None:
    bench = FakeBench(Job({}, None, Config()), fails_to_build=frozenset({"layer1"}))
    records = variants(bench, tmp_path, InlineMaker).make([wish(0), wish(1), wish(2)])
    assert [record.status for record in records] == ["done", "failed", "done"]
    assert "cannot be built" in records[1].reason
    assert records[1].metrics == {}


def test_a_variant_goes_on_from_another(bench: FakeBench, tmp_path: Path) -> None:
    made = variants(bench, tmp_path, InlineMaker)
    (first,) = made.make([wish(2)])
    (on,) = made.make([replace(wish(2), start=first)])
    assert (on.start, on.epochs) == (first.id, 4)
    assert made.load(on).epochs == 4
    (larger,) = made.make([replace(wish(3), base=first)])
    assert larger.base == first.id
