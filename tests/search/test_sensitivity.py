"""The damage map is measured once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compressor.progress import SILENT
from compressor.result import Choice
from compressor.search.sensitivity import HOPELESS, sense

CHOICES = [Choice("block_removal", f"layer{i}", {"removed": True}) for i in range(30)]


def test_what_is_on_disk_is_not_measured_again(tmp_path: Path) -> None:
    measured: list[str] = []

    def damage_of(choice: Choice) -> float:
        measured.append(choice.site)
        return float(len(measured))

    path = tmp_path / "damage.json"
    first = sense(CHOICES[:2], damage_of, path=path, key="k", progress=SILENT)
    second = sense(CHOICES[:3], damage_of, path=path, key="k", progress=SILENT)
    assert measured == ["layer0", "layer1", "layer2"]
    assert {key: second[key] for key in first} == first
    sense(CHOICES[:1], damage_of, path=path, key="another reference", progress=SILENT)
    assert measured[-1] == "layer0"
    assert len(measured) == 4


def test_what_was_measured_before_a_crash_is_kept(tmp_path: Path) -> None:
    measured = 0

    def damage_of(choice: Choice) -> float:
        nonlocal measured
        del choice
        measured += 1
        if measured == 25:
            raise KeyboardInterrupt
        return 1.0

    path = tmp_path / "damage.json"
    with pytest.raises(KeyboardInterrupt):
        sense(CHOICES, damage_of, path=path, key="k", progress=SILENT)
    sense(CHOICES, damage_of, path=path, key="k", progress=SILENT)
    assert measured <= 25 + len(CHOICES) - 20


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_hopeless(value: float, tmp_path: Path) -> None:
    found = sense(
        CHOICES[:1], lambda _: value, path=tmp_path / "damage.json", key="k", progress=SILENT
    )
    assert found == {CHOICES[0].key: HOPELESS}
