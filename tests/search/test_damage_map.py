"""Which damages a search begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from compressor.progress import Progress
from compressor.result import Choice, Plan
from compressor.search.budget import Spending
from compressor.search.damage_map import DamageMap
from compressor.search.goal import Goal
from compressor.search.making import Base
from tests.fakes import LAYERS, FakeBench, FakeModel

GOAL = Goal("accuracy", reference=90.0, delta=1.0, is_larger_better=True, resource="size_bytes")
SECONDS = 15.0  # for one choice, of a minute


class SlowBench(FakeBench):
    """Takes its time."""

    now = 0.0

    def damage_of(self, plan: Plan, base: Base[FakeModel] | None = None) -> float:
        self.now += SECONDS
        return 0.001 if self.now == SECONDS else 0.003


def test_no_layer_stays_in_float_because_the_time_to_sense_was_short(tmp_path: Path) -> None:
    bench = SlowBench(cast(Any, None))
    numbers = [Choice("quantization", name, {"format": "static_int8"}) for name in LAYERS]
    removals = [Choice("block_removal", name, {"removed": True}) for name in LAYERS]
    spending = Spending(1.0, trials=1, clock=lambda: bench.now)
    progress = Progress(enabled=False)
    path = tmp_path / "damage.json"
    damages = DamageMap(
        cast(Any, bench), [*removals, *numbers], path, cast(Any, None), spending, progress
    )
    damages.sense()
    assert list(damages.choices) == numbers
    assert bench.now == 2 * SECONDS
    all_of_them = damages.strategy(GOAL).describe(Plan(tuple(numbers)))
    assert all_of_them.damage == pytest.approx(0.001 + 0.003 + 4 * 0.002)
    assert [sensed.damage for sensed in damages.sensed(GOAL)] == [0.001, 0.003], "not assumed"
