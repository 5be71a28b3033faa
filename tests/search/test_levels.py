"""Passes after the first: from what held, for other objectives, in a study that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.engine import Engine
from compressor.errors import ModelError
from compressor.result import Plan
from compressor.search.tuning import Recovered, Tuning
from tests.fakes import REFERENCE_ACCURACY, FakeBench, FakeFramework
from tests.test_engine import run


def test_a_second_level_goes_on_from_what_was_recovered(tmp_path: Path) -> None:
    short = {"epochs": 2}  # one fine-tune does not win back what two do
    one, _ = run(tmp_path / "1", level=1, delta=4.0, full_trainer=short)
    two, bench = run(tmp_path / "2", level=2, delta=4.0, full_trainer=short)
    assert two.certificate.macs < one.certificate.macs
    assert two.certificate.within_delta
    by_id = {record.id: record for record in two.variants}
    further = [record for record in two.variants if record.base]
    assert further
    for record in further:
        base = by_id[record.base]
        assert base.metrics["accuracy"] >= REFERENCE_ACCURACY - 4.0
        assert {c.key for c in base.plan} < {c.key for c in record.plan}
        assert record.epochs > base.epochs
    assert any("is pruned further" in sentence for sentence in two.decisions)
    assert any(call.startswith("sense") for call in bench.calls[bench.calls.index("recover") :])


def test_a_second_delta_in_the_same_folder_trains_no_more_than_is_left_of_the_trials(
    tmp_path: Path,
) -> None:
    trials = {"trials": 3}
    run(tmp_path, delta=2.0, budget=trials, full_trainer={"epochs": 8})
    again, bench = run(tmp_path, delta=3.0, budget=trials, full_trainer={"epochs": 8})
    trial_count = sum(not (r.is_final or r.start) for r in again.variants)
    assert trial_count <= 3
    assert bench.calls.count("build") == 0
    assert any("are known and count" in sentence for sentence in again.decisions)
    fresh, _ = run(tmp_path / "fresh", delta=3.0, budget=trials, full_trainer={"epochs": 8})
    assert again.certificate.within_delta == fresh.certificate.within_delta


def test_several_objectives_give_a_frontier(tmp_path: Path) -> None:
    result, _ = run(tmp_path, delta=3.0, also_optimize=["compression"], budget={"trials": 8})
    costs = [
        (r.cost.macs, r.cost.size_bytes, -r.metrics["accuracy"]) for r in result.frontier if r.cost
    ]
    for mine in costs:
        assert not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in costs
        )
    assert len({size for _, size, _ in costs}) > 1
    assert len({macs for macs, _, _ in costs}) > 1


@pytest.mark.parametrize("level", [1, 2])
def test_decisions_are_the_same_each_time_and_are_written(tmp_path: Path, level: int) -> None:
    first, _ = run(tmp_path / "a", level=level, delta=4.0)
    second, _ = run(tmp_path / "b", level=level, delta=4.0)
    assert first.decisions == second.decisions
    written = json.loads((tmp_path / "a" / "result.json").read_text())["decisions"]
    assert written == list(first.decisions)
    assert "is taken" in written[-1]


def test_the_phases_and_the_expected_end_are_in_the_result(tmp_path: Path) -> None:
    result, _ = run(tmp_path)
    assert set(result.info["phases"]) == {"check", "sense", "search", "certify"}
    assert sum(result.info["phases"].values()) <= result.info["seconds"]
    assert result.info["eta_seconds"] > 0


def test_deepsearch_varies_how_variants_are_trained_and_goes_on_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"deepsearch": True, "delta": 2.0, "budget": {"trials": 10}}
    whole, _ = run(tmp_path / "whole", **settings)
    assert any(record.tuning for record in whole.variants)
    assert any(sentence.startswith("Deepsearch") for sentence in whole.decisions)
    recover = FakeBench.recover

    def dying(self: FakeBench, *args: Any, tuning: Tuning, **options: Any) -> Recovered:
        if tuning != Tuning():
            raise KeyboardInterrupt
        return recover(self, *args, tuning=tuning, **options)

    monkeypatch.setattr(FakeBench, "recover", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", **settings)
    monkeypatch.setattr(FakeBench, "recover", recover)
    resumed, _ = run(tmp_path / "killed", **settings)
    assert resumed.decisions == whole.decisions
    assert [r.id for r in resumed.variants] == [r.id for r in whole.variants]


def test_a_folder_of_other_techniques_gives_none_of_them(tmp_path: Path) -> None:
    run(tmp_path, optimization="compression", delta=2.0, full_trainer={"epochs": 8})
    only, _ = run(
        tmp_path, optimization="compression", delta=3.0, techniques=["quantization"], level=2
    )
    assert {choice.technique for record in only.variants for choice in record.plan} == {
        "quantization"
    }


def test_a_choice_that_cannot_be_made_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage_of = FakeBench.damage_of

    def refusing(self: FakeBench, plan: Plan, base: Any = None) -> float:
        if len(plan) > 1 or any(choice.site == "layer0" for choice in plan):
            raise ModelError("This cannot be built. Choose another.")
        return damage_of(self, plan, base)

    monkeypatch.setattr(FakeBench, "damage_of", refusing)
    result, _ = run(tmp_path, delta=3.0, full_trainer={"epochs": 8})
    assert result.certificate.within_delta
    assert len(result.plan)
    assert "layer0" not in {choice.site for choice in result.plan}


def test_each_pass_has_a_trial_in_a_dryrun(tmp_path: Path) -> None:
    framework = FakeFramework()
    config = {"optimization": "macs", "run_dir": str(tmp_path), "progress": False, "level": 2}
    engine = Engine(framework, {"train": [0]}, None, {**config, "deepsearch": True, "delta": 3.0})
    engine.run(dryrun=True)
    assert engine.result is not None
    told = " ".join(engine.result.decisions)
    assert "Deepsearch" in told


def test_a_variant_that_breaks_a_limit_does_not_stand_in_the_way(tmp_path: Path) -> None:
    result, _ = run(
        tmp_path, delta=3.0, budget={"trials": 4, "size_bytes": 700}, full_trainer={"epochs": 8}
    )
    assert result.certificate.size_bytes <= 700
    assert result.certificate.within_delta


def test_looks_of_other_runs_in_the_folder_count(tmp_path: Path) -> None:
    first, _ = run(tmp_path, delta=1.0)
    second, _ = run(tmp_path, delta=2.0)
    alone, _ = run(tmp_path / "alone", delta=2.0)
    assert second.certificate.looks > first.certificate.looks
    assert second.certificate.looks > alone.certificate.looks
