"""The damage map is measured once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compressor.evidence import HOPELESS
from compressor.progress import SILENT
from compressor.result import Choice
from compressor.search.sensitivity import sense

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


WIDTHS = [Choice("channel_pruning", site, {"kept": kept}) for site in "ab" for kept in (48, 32, 16)]


def test_what_is_more_severe_than_a_hopeless_width_is_not_measured(tmp_path: Path) -> None:
    measured: list[Choice] = []

    def damage_of(choice: Choice) -> float:
        measured.append(choice)
        return 0.1 if choice.site == "b" else 384 / choice.setting["kept"] / 2

    found = sense(WIDTHS, damage_of, path=tmp_path / "damage.json", key="k", progress=SILENT)
    assert measured == [*WIDTHS[:2], *WIDTHS[3:]]
    assert list(found.values()) == [4.0, 6.0, 6.0, 0.1, 0.1, 0.1]


def test_a_hopeless_choice_that_was_known_spares_those_behind_it_as_well(tmp_path: Path) -> None:
    path = tmp_path / "damage.json"
    whole = sense(WIDTHS, lambda _: 7.0, path=path, key="whole", progress=SILENT)
    sense(WIDTHS[:1], lambda _: 7.0, path=path, key="k", progress=SILENT)
    later = sense(WIDTHS[:3], lambda _: 1.0, path=path, key="k", progress=SILENT)
    assert later == {choice.key: whole[choice.key] for choice in WIDTHS[:3]}


def test_a_hopeless_palette_says_nothing_of_others(tmp_path: Path) -> None:
    """Techniques other than pruning and low rank do not list the mild ones first."""
    choices = [Choice("clustering", "a", {"index_bits": bits}) for bits in (2, 4)]
    found = sense(
        choices,
        lambda choice: 8.0 if choice.setting["index_bits"] == 2 else 0.5,
        path=tmp_path / "damage.json",
        key="k",
        progress=SILENT,
    )
    assert list(found.values()) == [8.0, 0.5]
