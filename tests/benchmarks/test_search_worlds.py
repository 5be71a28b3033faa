"""The worlds of `benchmarks.search_worlds`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search_worlds import BLOCKS, CHOICES, GOAL, World, main, simulate
from compressor.result import Plan


@pytest.mark.parametrize("seed", range(4))
def test_one_block_more_than_the_most_does_not_hold(seed: int) -> None:
    world = replace(World.drawn(np.random.default_rng(seed)), luck=0.0)
    most = world.most_removed(epochs=10)
    damages = sorted(world.damages.values())
    assert world.drop(Plan(), sum(damages[:most]), 10) <= GOAL.delta
    assert most == BLOCKS or world.drop(Plan(), sum(damages[: most + 1]), 10) > GOAL.delta


def test_the_same_seed_is_the_same_search() -> None:
    assert simulate(3, 10, 2) == simulate(3, 10, 2)
    assert simulate(3, 10, 2) != simulate(4, 10, 2)


def test_it_says_how_much_of_the_ideal_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "worlds.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--minutes", "10", "--json", str(path)])
    main()
    document = json.loads(path.read_text())
    assert 0.5 < document["summary"]["saving_10_minutes"] <= 1.3
    assert 0 < document["rows"][0]["minutes used"] <= 11


def test_a_plan_has_the_same_luck_whenever_it_is_trained() -> None:
    world = replace(World.drawn(np.random.default_rng(0)), luck=1.0)
    plans = [Plan(tuple(CHOICES[:count])) for count in (1, 2, 3)]
    drops = [world.drop(plan, 0.2, 5) for plan in plans]
    assert drops == [world.drop(plan, 0.2, 5) for plan in plans]
    assert len(set(drops)) == 3
