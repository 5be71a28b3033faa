from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.targets.layer_latencies import LayerLatencies


class Measurements:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return 1.5


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_layer_is_measured_once(on_disk: bool, tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "run" / "latencies.json"
    table = LayerLatencies(path if on_disk else None)
    assert [table.get("a", measure), table.get("a", measure), table.get("b", measure)] == [1.5] * 3
    assert measure.count == 2
    assert path.exists() == on_disk


def test_another_process_reads_what_one_has_measured(tmp_path: Path) -> None:
    measure, path = Measurements(), tmp_path / "latencies.json"
    LayerLatencies(path).get("a", measure)
    assert LayerLatencies(path).get("a", measure) == 1.5
    assert measure.count == 1


@pytest.mark.parametrize("spoil", ["machine", "truncated", "other"])
def test_a_file_of_another_machine_or_a_broken_one_is_not_believed(
    spoil: str, tmp_path: Path
) -> None:
    measure, path = Measurements(), tmp_path / "latencies.json"
    LayerLatencies(path).get("a", measure)
    text = path.read_text()
    values = {**json.loads(text), "measured_on": {"cpu": "another"}}
    path.write_text({"machine": json.dumps(values), "truncated": text[:30], "other": "[]"}[spoil])
    LayerLatencies(path).get("a", measure)
    assert measure.count == 2
