"""The worlds of `benchmarks.deepsearch`, the searches beside it, and the program."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import ROOT
from benchmarks.deepsearch import (
    BEYOND,
    SEARCHES,
    Settings,
    Trial,
    World,
    by_damage,
    by_deepsearch,
    by_rule_at_random,
    draw,
    main,
)
from compressor.search.deepsearch import DAMAGES, STARTUP

worlds = pytest.mark.parametrize("seed", range(8))


def make_world(seed: int) -> World:
    return World(np.random.default_rng(seed))


@worlds
def test_no_settings_that_hold_are_cheaper_than_the_best(seed: int) -> None:
    world, random = make_world(seed), np.random.default_rng(seed + 100)
    best = world.best()
    assert world.drop(best) == pytest.approx(1) or best.damage == DAMAGES[1]
    drawn = [draw(random) for _ in range(1000)]
    holding = [settings for settings in drawn if world.drop(settings) <= 1]
    assert holding
    assert world.cost(best) <= min(map(world.cost, holding)) <= world.cost(Settings())


@worlds
def test_what_is_configured_holds_at_damage_1_and_drops_more_beyond(seed: int) -> None:
    world = make_world(seed)
    drops = [world.drop(Settings(damage)) for damage in (1, 2, 4)]
    assert 0.6 <= drops[0] <= 0.98
    assert drops[2] / drops[1] == pytest.approx(drops[1] / drops[0])
    assert drops[1] > drops[0]
    assert world.cost(Settings(4)) < world.cost(Settings(2)) < world.cost(Settings(1)) == 1


def test_savings_are_of_logarithms() -> None:
    world = make_world(0)
    best = world.best()
    between = replace(best, damage=math.sqrt(best.damage))
    assert world.saving([Settings()]) == 0
    assert world.saving([Settings(), between]) == pytest.approx(0.5)
    assert world.saving([between, best, Settings()]) == 1


def test_measured_drops_lie_around_the_true_one_and_are_the_same_for_every_search() -> None:
    world, again = make_world(3), make_world(3)
    drops = [world.measure(Settings()).drop for _ in range(2000)]
    assert np.std(drops) > 0.02
    # four standard errors of the largest noise
    assert np.mean(drops) == pytest.approx(world.drop(Settings()), abs=4 * 0.15 / 2000**0.5)
    other = [again.measure(Settings(2)).drop - again.drop(Settings(2)) for _ in range(2000)]
    assert np.subtract(drops, world.drop(Settings())) == pytest.approx(np.array(other))


def test_the_search_for_damage_stays_between_what_held_and_what_did_not() -> None:
    tried = [Trial(Settings(), 0.8), Trial(Settings(1.44), 4.0)]
    by_damage(make_world(0), tried, 1, 0)
    assert tried[-1].settings == Settings(1.2)  # of 1.44 / 4 nothing new is learned


@pytest.mark.slow
def test_settings_at_random_part_from_deepsearch_where_it_asks_its_model() -> None:
    searches = []
    for search in (by_deepsearch, by_rule_at_random):
        world = make_world(1)
        searches.append([world.measure(Settings()), world.measure(Settings(BEYOND))])
        search(world, searches[-1], 6, 0)
    ours, random = searches
    assert len(ours) == len(random) == 8
    assert ours[:STARTUP] == random[:STARTUP]
    assert ours != random


@pytest.mark.slow
def test_the_program_writes_a_row_for_each_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, program = tmp_path / "out.json", ROOT / "benchmarks" / "deepsearch.py"
    monkeypatch.setattr("sys.argv", [str(program), "--quick", "--json", str(path)])
    threads = torch.get_num_threads()
    try:
        main()
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert {"summary", "rows", "machine", "versions", "seed", "command"} <= set(written)
    rows = {row["search"]: row for row in written["rows"]}
    assert list(rows) == list(SEARCHES)
    for row in rows.values():
        assert 0 <= row["true saving"] <= row["measured saving"]
        ahead = rows["deepsearch"]["true saving"] - row["true saving"]
        assert row["deepsearch is ahead by"] == pytest.approx(ahead)
