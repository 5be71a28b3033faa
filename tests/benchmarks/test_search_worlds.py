"""The worlds of `benchmarks.search_worlds`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search_worlds import BLOCKS, GOAL, World, main, simulate


@pytest.mark.parametrize("seed", range(4))
def test_one_block_more_than_the_most_does_not_hold(seed: int) -> None:
    world = World.drawn(np.random.default_rng(seed))
    most = world.most_removed(epochs=10)
    damages = sorted(world.damages.values())
    assert world.drop(sum(damages[:most]), 10) <= GOAL.delta
    assert most == BLOCKS or world.drop(sum(damages[: most + 1]), 10) > GOAL.delta


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
