"""What `benchmarks.kill_test` calls equal, and where it says that a kill hit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_test import phase
from benchmarks.killed_job import differences, outcome
from compressor.search.study import Study

BEGAN = 1_000_000.0
RESULT: dict[str, Any] = {
    "certificate": {"delta": 1.0},
    "plan": [{"site": "layer1", "setting": {"kept": 8}}],
    "variants": [{"id": "a", "seconds": 1.0, "cost": {"latency_ms": 1.0, "macs": 5}}],
}


def make_run(folder: Path, result: dict[str, Any], weights: bytes = b"w") -> dict[str, Any]:
    (folder / "variants" / "a").mkdir(parents=True)
    (folder / "variants" / "a" / "model.safetensors").write_bytes(weights)
    (folder / "variants" / "a" / "metrics.json").write_text(json.dumps(result["variants"][0]))
    artifacts = {"onnx": str(folder / "exports" / "model.onnx")}
    (folder / "result.json").write_text(json.dumps({**result, "artifacts": artifacts}))
    with Study(folder / "study.db") as study:
        study.set_fact("k finish a", 3)
        study.set_fact("k seconds", folder.name)
    return outcome(folder)


def test_what_a_clock_says_and_where_a_run_lies_make_no_difference(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", RESULT)
    record = {"id": "a", "seconds": 9.0, "cost": {"latency_ms": 3.0, "macs": 5}}
    second = make_run(tmp_path / "second", {**RESULT, "variants": [record]})
    assert differences(first, second) == []


@pytest.mark.parametrize(
    ("result", "weights", "line"),
    [
        ({**RESULT, "plan": [{"site": "layer1", "setting": {"kept": 9}}]}, b"w", "kept: 8 and 9"),
        ({**RESULT, "certificate": {"delta": 2.0}}, b"w", "certificate.delta: 1.0 and 2.0"),
        ({**RESULT, "lost": ["low_rank"]}, b"w", "lost.0: absent and low_rank"),
        (RESULT, b"x", "model.safetensors"),
    ],
)
def test_anything_else_that_differs_is_named(
    result: dict[str, Any], weights: bytes, line: str, tmp_path: Path
) -> None:
    first = make_run(tmp_path / "first", RESULT)
    (found,) = differences(first, make_run(tmp_path / "second", result, weights))
    assert line in found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "start"),
        (["variants/a/plan.json"], "building"),
        (["variants/a/fit/log"], "fine-tune"),
        (["variants/a/fit/latest.ckpt"], "fine-tune, with a checkpoint"),
        (["variants/a/fit/latest.ckpt", "variants/a/deployed/model.onnx"], "judging"),
        (["variants/a/model.safetensors"], "saving a variant"),
        (["variants/a/metrics.json"], "between variants"),
        (["variants/a/.model.safetensors.7.part"], "writing model"),
        (["variants/a/metrics.json", "exports/model.onnx"], "export"),
        (["variants/a/metrics.json", "exports/model.onnx", "result.json"], "after the result"),
    ],
)
def test_the_files_tell_where_a_kill_hit(files: list[str], expected: str, tmp_path: Path) -> None:
    write_at(BEGAN + 1, tmp_path, files)
    assert phase(tmp_path, BEGAN, "") == expected


def test_what_an_earlier_start_left_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    write_at(BEGAN - 1, tmp_path, ["variants/a/.plan.json.7.part", "exports/model.onnx"])
    assert phase(tmp_path, BEGAN, "reference: 98 %") == "start"
    assert phase(tmp_path, BEGAN, "variant a is known") == "building"


def write_at(moment: float, folder: Path, names: list[str]) -> None:
    """Empty files, changed at that moment, as their folders were."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        for changed in (path, path.parent):
            os.utime(changed, (moment, moment))
