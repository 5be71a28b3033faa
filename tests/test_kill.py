"""Processes that are killed, disks that are full and files that are damaged, in earnest."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.killed_job import (
    JOB,
    SGD,
    compress,
    differences,
    outcome,
    start_process,
    train_reference,
    untimed,
    wait,
)
from compressor.errors import CompressorError, StudyError
from compressor.result import Cost
from compressor.search.certificate import _slower
from compressor.search.goal import Goal
from compressor.search.run_dir import open_run_dir
from tests.brevity import be_brief

pytestmark = pytest.mark.slow

# Small: two trials, one export, and a target that costs no export for each.
SMALL: dict[str, Any] = {
    **JOB,
    "delta": 20.0,
    "seed": 0,
    "techniques": ["channel_pruning"],
    "target": {"runtime": "eager"},
    "budget": {"trials": 2},
    "fine_tuner": {"optimizer": SGD, "epochs": 3},
    "full_trainer": {"optimizer": SGD, "epochs": 3},
    "export": {"formats": ["onnx"]},
}
Moment = Callable[[Path], bool]


def is_after_a_variant(run: Path) -> bool:
    return any(run.glob("variants/*/metrics.json"))


def is_in_a_fine_tune(run: Path) -> bool:
    return any(run.glob("variants/*/fit/*.ckpt"))


def is_in_the_export(run: Path) -> bool:
    return any(run.glob("exports/*.onnx"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network about 90 % right."""
    return train_reference(tmp_path_factory.mktemp("reference") / "weights", seed=0, epochs=2)


@pytest.fixture(scope="module")
def expected(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the run that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("whole")
    finish(run_dir, reference)
    found = outcome(run_dir)
    assert any(name.startswith("exports/") for name in found)
    assert "channel_pruning" in found.values(), "nothing was cut"
    return found


def compress_briefly(run_dir: Path, reference: Path) -> None:
    """The whole job, in this process."""
    be_brief()
    compress(run_dir, reference, SMALL)


def start(run_dir: Path, reference: Path) -> BaseProcess:
    """A process that begins the run, or goes on with it."""
    return start_process(compress_briefly, run_dir, reference)


def finish(run_dir: Path, reference: Path) -> None:
    process = start(run_dir, reference)
    process.join()
    assert process.exitcode == 0


def kill_at(moment: Moment, run_dir: Path, reference: Path) -> None:
    """Start, or go on with, the run and kill it at that moment."""
    process = start(run_dir, reference)
    wait(process, lambda: moment(run_dir))
    process.kill()
    process.join()
    assert process.exitcode == -9, "the moment never came"


def test_a_run_killed_at_three_moments_ends_as_if_nobody_had_disturbed_it(
    reference: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    for moment in (is_in_a_fine_tune, is_after_a_variant, is_in_the_export):
        kill_at(moment, tmp_path, reference)
        assert not (tmp_path / "result.json").exists()
    finish(tmp_path, reference)
    assert differences(expected, outcome(tmp_path)) == []


def test_a_damaged_checkpoint_costs_its_epochs_and_not_the_variant(
    reference: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    kill_at(is_in_a_fine_tune, tmp_path, reference)
    for path in tmp_path.glob("variants/*/fit/*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    finish(tmp_path, reference)
    assert differences(expected, outcome(tmp_path)) == []


def test_a_folder_is_locked_as_long_as_its_process_lives(reference: Path, tmp_path: Path) -> None:
    process = start(tmp_path, reference)
    wait(process, lambda: (tmp_path / "engine.log").exists())  # which is opened under the lock
    with (
        pytest.raises(StudyError, match="Another process works in run_dir"),
        open_run_dir(tmp_path),
    ):
        pass
    process.kill()
    process.join()
    with open_run_dir(tmp_path) as run:
        assert run.study.variants() == []


def compress_in(limit_bytes: int, run_dir: Path, reference: Path, sender: Connection) -> None:
    """Send the error that a run ends with where no file may grow beyond the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        compress_briefly(run_dir, reference)
    except Exception as error:  # whatever it is, the test looks at it
        sender.send((isinstance(error, CompressorError), str(error)))


def test_weights_that_the_disk_does_not_take_stop_the_run_with_what_to_do(
    reference: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        start_process(compress_in, 60_000, tmp_path, reference, sender).join()
        assert receiver.poll(), "the run did not fail"
        is_ours, message = receiver.recv()
    assert is_ours, message
    assert "free space and start again with the same run_dir" in message
    finish(tmp_path, reference)
    assert differences(expected, outcome(tmp_path)) == []


def test_a_note_that_a_clock_decided_is_not_compared() -> None:
    cost = Cost(params=1, macs=1, size_bytes=1, latency_ms=1.0, peak_memory_bytes=1)
    goal = Goal("accuracy", 90.0, 1.0, is_larger_better=True, resource="size_bytes")
    note = _slower(goal, cost, replace(cost, latency_ms=2.0))
    assert untimed(["No interval.", note]) == ["No interval."]
