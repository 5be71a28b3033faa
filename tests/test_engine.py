"""The engine and its search without networks: what is done, in which order, how often."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from compressor.engine import Engine
from compressor.errors import ConfigError, StudyError
from compressor.progress import Progress, Standing
from compressor.result import Result
from compressor.search import finished
from compressor.search.run_dir import open_run_dir
from tests.fakes import LAYERS, REFERENCE_ACCURACY, FakeBench, FakeFramework


def run(
    folder: Path, options: dict[str, Any] | None = None, **config: Any
) -> tuple[Result, FakeBench]:
    """One run of the engine on fakes."""
    framework = FakeFramework(**(options or {}))
    settings = {"optimization": "macs", "run_dir": str(folder), "progress": False, **config}
    engine = Engine(framework, {"train": [0]}, model=None, config=settings)
    engine.run()
    assert engine.result is not None
    assert framework.bench is not None
    return engine.result, framework.bench


def test_the_result_is_the_cheapest_variant_within_delta(tmp_path: Path) -> None:
    result, _ = run(tmp_path, delta=1.0, full_trainer={"epochs": 8})
    certificate = result.certificate
    assert certificate.within_delta
    assert certificate.metric >= REFERENCE_ACCURACY - 1.0
    within = [r for r in result.variants if r.metrics["accuracy"] >= REFERENCE_ACCURACY - 1.0]
    assert certificate.macs == min(r.cost.macs for r in within if r.cost)
    assert certificate.macs_ratio > 1


def test_a_larger_delta_never_gives_a_dearer_model(tmp_path: Path) -> None:
    macs = [
        run(tmp_path / str(delta), delta=delta, full_trainer={"epochs": 8})[0].certificate.macs
        for delta in (0.5, 2.0, 8.0)
    ]
    assert macs == sorted(macs, reverse=True)
    assert macs[0] > macs[-1]


@pytest.mark.parametrize("optimization", ["macs", "compression", "latency"])
def test_when_nothing_holds_the_reference_is_the_answer_and_the_reason_is_said(
    tmp_path: Path, optimization: str
) -> None:
    options = {"int8_points": 3.0}
    result, _ = run(
        tmp_path,
        options,
        optimization=optimization,
        delta=0.001,
        fine_tuner={"epochs": 0},
        full_trainer={"epochs": 0},
    )
    assert len(result.plan) == 0
    assert "none of" in result.reason
    assert result.certificate.metric == REFERENCE_ACCURACY


def test_int8_outside_delta_leaves_as_few_layers_in_float_as_suffice(tmp_path: Path) -> None:
    options = {"int8_points": 0.3}
    result, _ = run(
        tmp_path,
        options,
        optimization="compression",
        delta=1.0,
        techniques=["quantization"],
        budget={"trials": 1},
    )
    in_int8 = len(result.plan.of("quantization"))
    assert in_int8 == 3  # 3 layers cost 0.9 points, 4 would cost 1.2
    assert result.certificate.within_delta


def test_int8_outside_delta_is_trained_before_layers_are_left_in_float(tmp_path: Path) -> None:
    result, bench = run(
        tmp_path,
        {"int8_points": 0.3, "trained_share": 0.5},
        optimization="compression",
        delta=1.0,
        techniques=["quantization"],
        budget={"trials": 1},
    )
    numbers = result.plan.of("quantization")
    assert len(numbers) == len(LAYERS)
    assert all(choice.setting["trained"] for choice in numbers)
    assert bench.calls.count("recover") == 1, "as short as suffices"
    assert result.certificate.within_delta


def test_numbers_that_hold_are_not_trained(tmp_path: Path) -> None:
    options = {"int8_points": 0.01, "trained_share": 0.0}
    result, _ = run(tmp_path, options, optimization="compression", techniques=["quantization"])
    assert not any(choice.setting.get("trained") for choice in result.plan)


def test_no_more_trials_than_the_budget_says(tmp_path: Path) -> None:
    _, bench = run(tmp_path, budget={"trials": 2}, full_trainer={"epochs": 5})
    assert bench.calls.count("build") <= 1 + 2  # the plan of numbers alone, and two trials


def test_numbers_are_sensed_and_tried_also_where_the_minutes_are_used_up(tmp_path: Path) -> None:
    result, bench = run(tmp_path, optimization="quantization", budget={"minutes": 1e-9})
    sensed = {call.split()[1] for call in bench.calls if call.startswith("sense")}
    assert sensed == {"quantization"}
    assert {choice.technique for choice in result.plan} == {"quantization"}


def test_no_minutes_left_means_no_fine_tuning_but_still_a_result(tmp_path: Path) -> None:
    result, bench = run(tmp_path, budget={"minutes": 1e-9})
    assert "recover" not in bench.calls
    assert result.certificate.within_delta


def test_a_second_run_does_nothing_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    second, bench = run(tmp_path)
    assert not set(bench.calls) & {"baseline", "build", "recover", "judge", "export"}
    assert second.to_json() == first.to_json()


def test_another_delta_reuses_damage_and_variants(tmp_path: Path) -> None:
    run(tmp_path, delta=1.0)
    _, bench = run(tmp_path, delta=2.0)
    counts = Counter(call.split()[0] for call in bench.calls)
    assert not any(call.startswith("sense") and "," not in call for call in bench.calls)
    assert counts["baseline"] == 0
    assert counts["build"] < 5


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("after", range(1, 4))
def test_a_run_that_dies_goes_on_to_the_same_result(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path / "whole", delta=5.0)
    count = 0
    judge = FakeBench.judge

    def dying(self: FakeBench, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == after:
            raise Killed
        return judge(self, *args)

    monkeypatch.setattr(FakeBench, "judge", dying)
    with pytest.raises(Killed):
        run(tmp_path / "killed", delta=5.0)
    monkeypatch.setattr(FakeBench, "judge", judge)
    resumed, _ = run(tmp_path / "killed", delta=5.0)
    assert resumed.plan == whole.plan
    assert resumed.certificate.metric == whole.certificate.metric
    assert [r.id for r in resumed.variants] == [r.id for r in whole.variants]


def test_a_finished_run_is_read_from_any_directory_and_in_a_moved_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was certified anew: relative paths in `result.json` began in another directory."""
    monkeypatch.chdir(tmp_path)
    first, _ = run(Path("here"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in (Path("../here"), tmp_path / "moved"):
        if folder.is_absolute():
            shutil.move(tmp_path / "here", folder)
        again, bench = run(folder)
        assert not set(bench.calls) & {"baseline", "build", "recover", "judge", "export"}
        assert again.certificate == first.certificate
        assert again.runtime_model().plan == first.plan
    assert all(path.is_relative_to(tmp_path / "moved") for path in again.artifacts.values())


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"key": "KEY", "artifacts": {}}'])
def test_a_result_that_is_none_is_made_anew(tmp_path: Path, text: str) -> None:
    first, _ = run(tmp_path)
    path = tmp_path / "result.json"
    path.write_text(text.replace("KEY", json.loads(path.read_text())["key"]))
    second, bench = run(tmp_path)
    assert "export" in bench.calls
    assert second.certificate == first.certificate
    assert "result.json is damaged" in (tmp_path / "engine.log").read_text()


def test_a_fault_of_the_page_does_not_cost_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no chart")

    monkeypatch.setattr(finished, "write_report", fail)
    first, _ = run(tmp_path)
    assert first.certificate.within_delta
    assert not (tmp_path / "report.html").exists()
    log = (tmp_path / "engine.log").read_text()
    assert "ZeroDivisionError: no chart. The result is whole" in log
    assert f"`compressor report {tmp_path}`" in log
    again, bench = run(tmp_path)
    assert "export" not in bench.calls
    assert again.certificate == first.certificate
    monkeypatch.undo()
    run(tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["damage.json", "result.json"])
def test_a_file_that_a_bad_disk_left_half_is_made_anew(tmp_path: Path, name: str) -> None:
    first, _ = run(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text[: len(text) // 2])
    if name == "damage.json":
        (tmp_path / "result.json").unlink()  # a finished run asks for no damages
    second, _ = run(tmp_path)
    assert second.plan == first.plan
    assert second.certificate.metric == first.certificate.metric


def test_another_model_in_the_same_folder_is_not_given_the_first_ones_variants(
    tmp_path: Path,
) -> None:
    run(tmp_path)
    _, bench = run(tmp_path, {"name": "another"})
    assert {"baseline", "build", "judge"} <= set(bench.calls)


def test_a_full_fine_tune_shorter_than_a_trial_is_still_made(tmp_path: Path) -> None:
    result, _ = run(tmp_path, fine_tuner={"epochs": 2}, full_trainer={"epochs": 1}, delta=2.0)
    assert any(record.is_final for record in result.variants)


def test_files_that_were_deleted_are_made_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    shutil.rmtree(tmp_path / "exports")
    again, bench = run(tmp_path)
    assert "export" in bench.calls
    assert "recover" not in bench.calls
    assert again.certificate == first.certificate


def test_an_error_of_the_users_own_files_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: FakeBench) -> None:
        raise FileNotFoundError(2, "No such file", "image_17.jpg")

    monkeypatch.setattr(FakeBench, "check", missing)
    with pytest.raises(FileNotFoundError, match=r"image_17\.jpg"):
        run(tmp_path)


def test_a_full_disk_stops_the_run_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FakeBench, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeBench, "save", full)
    with pytest.raises(StudyError, match="free space and start again"):
        run(tmp_path)
    monkeypatch.undo()
    assert run(tmp_path)[0].certificate.within_delta


def test_a_full_disk_is_named_also_where_nothing_but_damage_is_sensed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FakeBench) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeBench, "propose", full)
    config = {"optimization": "macs", "run_dir": str(tmp_path), "progress": False}
    with pytest.raises(StudyError, match="free space and start again"):
        Engine(FakeFramework(), {"train": [0]}, model=None, config=config).sense()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: FakeBench, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeBench, "judge", interrupt)
    with pytest.raises(KeyboardInterrupt, match="run again with run_dir="):
        run(tmp_path)
    monkeypatch.undo()
    assert run(tmp_path)[0].certificate.within_delta


def test_a_failed_variant_is_recorded_with_its_reason_and_the_search_goes_on(
    tmp_path: Path,
) -> None:
    result, _ = run(tmp_path, {"fails_to_build": frozenset({list(LAYERS)[1]})}, delta=5.0)
    failed = [record for record in result.variants if record.status == "failed"]
    assert failed
    assert "cannot be built" in failed[0].reason
    assert result.certificate.macs_ratio > 1


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Standing]:
    """How runs stood, each time that they said so."""
    standings = []
    tell = Progress.tell

    def remember(self: Progress, **facts: Any) -> None:
        tell(self, **facts)
        standings.append(self.standing)

    monkeypatch.setattr(Progress, "tell", remember)
    return standings


def test_the_best_variant_is_shown_beside_one_that_failed(
    tmp_path: Path, told: list[Standing]
) -> None:
    run(tmp_path, {"fails_to_build": frozenset({list(LAYERS)[4]})}, delta=5.0)
    failed = [each for each in told if each.best is not None and each.last is None]
    assert failed
    assert all(f"best {each.best:.4g} and " in each.quality() for each in failed)


def test_no_time_is_said_to_be_left_once_the_search_has_ended(
    tmp_path: Path, told: list[Standing]
) -> None:
    """The export was said to take longer than was expected, and nothing was expected of it."""
    run(tmp_path, full_trainer={"epochs": 8})
    assert any(each.ends_at is not None for each in told if each.phase == "search")
    assert [each.place() for each in told if each.phase == "certify"]
    assert all(each.ends_at is None for each in told if each.phase == "certify")


def test_a_limit_of_the_budget_is_met(tmp_path: Path) -> None:
    result, _ = run(
        tmp_path,
        optimization="compression",
        delta=20.0,
        budget={"macs": 300},
        full_trainer={"epochs": 8},
    )
    assert result.certificate.macs <= 300


def test_a_delta_that_accepts_every_model_is_refused_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accepts every model: the reference's 'accuracy' is 90"):
        run(tmp_path, delta=95.0)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        open_run_dir(tmp_path),
        pytest.raises(StudyError, match="Another process works in run_dir"),
    ):
        run(tmp_path)


def test_result_json_holds_what_the_result_says(tmp_path: Path) -> None:
    result, _ = run(tmp_path)
    written = json.loads((tmp_path / "result.json").read_text())
    written.pop("key")
    assert written == json.loads(json.dumps(result.to_json()))
    assert written["certificate"]["within_delta"] is True
    assert {"machine", "versions", "config", "seconds"} <= set(written["info"])


def test_a_dryrun_leaves_no_trace_in_the_run_directory(tmp_path: Path) -> None:
    framework = FakeFramework()
    config = {"optimization": "macs", "run_dir": str(tmp_path / "run"), "progress": False}
    Engine(framework, {"train": [0]}, model=None, config=config).run(dryrun=True)
    assert not (tmp_path / "run").exists()
    assert framework.bench is not None
    assert framework.bench.job.is_dryrun
