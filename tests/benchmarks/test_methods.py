"""What `benchmarks.methods` counts and keeps, on made-up data."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import methods
from benchmarks.methods import PARTS, SCHEDULES, Bench, Unit, candidates, describe
from benchmarks.methods_places import (
    FIRST,
    LENGTH,
    PADDING,
    UNKNOWN,
    Place,
    Samples,
    Schedule,
    read_sentences,
)
from benchmarks.methods_report import level_rows, method_rows
from benchmarks.methods_table import METHODS, PLAIN, Method
from benchmarks.methods_time import TimedBatches, step_time
from compressor.training import Algorithm, Event, State, algorithms
from compressor.training.algorithms import CutMix, MixUp
from docs import measured_methods
from examples.cifar_resnet_model import CifarResNet

ALONE = Method(PLAIN, lambda _: [])


def small_place(**options: Any) -> Place:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 4, 4, generator=random)
    samples = Samples(x, x.mean((1, 2, 3)).gt(0).long())
    return Place(
        "small",
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2)),
        samples,
        samples,
        Schedule(3, None, 8, {"name": "SGD", "lr": 0.1}),
        **options,
    )


class Dawdling(Algorithm):
    """Takes ten milliseconds of the processor a step, and more when a fit begins."""

    events = frozenset({Event.FIT_START, Event.AFTER_STEP})

    def on(self, event: Event, state: State) -> None:
        dawdle(0.3 if event is Event.FIT_START else 0.01)


def dawdle(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_every_method_is_tried() -> None:
    classes = {
        name
        for name, value in vars(algorithms).items()
        if inspect.isclass(value) and issubclass(value, Algorithm)
    }
    assert {each.name for each in METHODS} == classes | {"NoOpModel", PLAIN}
    timed = {method.name for _, method in candidates("time")}
    assert timed == classes | {"NoOpModel"}
    for part in PARTS:
        names = [(place, method.name) for place, method in candidates(part)]
        assert len(set(names)) == len(names)


def test_all_methods_of_a_seed_see_the_same_batches() -> None:
    seen: list[list[torch.Tensor]] = []

    def note(inputs: torch.Tensor) -> torch.Tensor:
        seen[-1].append(inputs)
        return inputs

    place = small_place(finish=note, augment=lambda x: x + torch.randn(x.shape))
    for method in (ALONE, Method("mixing", lambda _: [MixUp(), CutMix()])):
        seen.append([])
        methods.train(place, method, seed=1)
    plain, mixed = seen
    assert len(plain) == 3 * 3 + 1  # epochs of batches, and the test
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_training_raises_the_accuracy() -> None:
    place = small_place()
    assert place.judge(place.task(place.net(1))) < methods.train(place, ALONE, seed=1)


def test_the_time_of_a_step_is_without_what_is_done_once() -> None:
    place = small_place()
    slow = Method("slow", lambda _: [Dawdling()])
    found = step_time(place, slow, ALONE, steps=3, rounds=2, seed=0)
    assert found["ratio"] > 2
    assert 10 < found["ms"] < 100


def test_a_timed_epoch_ends_when_the_next_batch_is_asked_for() -> None:
    loader = TimedBatches([(torch.zeros(1), torch.zeros(1))] * 2)
    for _ in loader:
        dawdle(0.02)
        time.sleep(0.02)
    assert 0.04 <= loader.seconds < 0.07


def done(method: str, seed: int, accuracy: float, part: str = "recovery") -> Any:
    unit = Unit(part, "recovery", Method(method, lambda _: []), seed)
    settings = {"algorithms": [], "optimizer": {"lr": 0.1}}
    return unit, {"accuracy": accuracy, "seconds": 1.0, "settings": settings}


def test_gains_are_paired_by_seed() -> None:
    results = [done(PLAIN, 0, 80.0), done(PLAIN, 1, 90.0), done("A", 0, 81.0), done("A", 1, 93.0)]
    plain, row = method_rows(results)
    assert (plain["recovery accuracy %"], plain["recovery gain"]) == (85.0, None)
    assert row["recovery gain"] == 2.0
    assert row["± of recovery gain"] == pytest.approx(2**0.5)  # of 1 and 3
    assert row["± of recovery"] == pytest.approx(72**0.5)
    assert (row["scratch accuracy %"], row["step time ratio"]) == (None, None)


def test_the_best_combination_comes_first() -> None:
    results = [done(PLAIN, 0, 80.0, "levels"), done("A", 0, 82.0, "levels")]
    rows = level_rows(results)
    assert [row["combination"] for row in rows] == ["A", PLAIN]
    assert method_rows(results) == []


def test_a_second_start_does_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def do(self: Bench, unit: Unit) -> dict[str, Any]:
        made.append(unit.path)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"accuracy": 1.0, "seconds": 1.0}

    monkeypatch.setattr(Bench, "do", do)
    monkeypatch.setattr(Bench, "place", lambda self, unit: small_place())
    monkeypatch.setitem(SCHEDULES, "scratch", small_place().schedule)
    arguments = argparse.Namespace(
        data=tmp_path, quick=False, methods=["MixUp"], parts=["scratch"], seed=0, seeds=2,
        report=False, epochs=None,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        Bench(arguments, tmp_path).run()
    kept = made[:2]
    arguments.report = True
    assert [unit.path for unit, _ in Bench(arguments, tmp_path).run()] == kept
    arguments.report = False
    results = Bench(arguments, tmp_path).run()
    assert made[2:] == [made[2], *(unit.path for unit, _ in results[2:])]
    assert len(set(made)) == len(results) == 6  # plain in two places, and MixUp; two seeds


def test_what_is_trained_otherwise_is_trained_anew() -> None:
    assert describe(MixUp(alpha=0.5)) != describe(MixUp(alpha=0.6))
    assert describe(MixUp()) == describe(MixUp())


def test_sentences_are_numbers_of_words_that_training_has_twice(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("A film, a film!\t1\nBad\t0\n")
    (tmp_path / "dev.tsv").write_text(f"bad film {'a ' * LENGTH}\t0\n")
    train, dev, words = read_sentences(tmp_path, False)
    a, film = FIRST + 1, FIRST + 2  # in the order of the alphabet
    expected = [FIRST, a, film, UNKNOWN, a, film, UNKNOWN, PADDING]
    assert train.inputs[0, :8].tolist() == expected
    assert dev.inputs[0].tolist() == [FIRST, UNKNOWN, film, *[a] * (LENGTH - 3)]
    assert train.labels.tolist() == [1, 0]
    assert words == FIRST + 3


def test_the_page_tells_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = {"epochs": 1, "samples": 64, "optimizer": {"name": "SGD", "lr": 0.1}}
    rows = method_rows([done(PLAIN, 0, 80.0), done("MixUp", 0, 81.0)])
    found = {
        "summary": dict.fromkeys(["reference", "pruned", "reestimated"], 0.0),
        "rows": [{**row, "step time ratio": 1.25, "± of ratio": 0.5} for row in rows],
        "levels": level_rows([done(PLAIN, 0, 80.0, "levels"), done("teacher", 0, 82.0, "levels")]),
        "schedules": dict.fromkeys(SCHEDULES, schedule),
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2"},
        "command": "python -m benchmarks.methods",
        "seed": 0,
    }
    found["summary"] = {f"{name}_accuracy": value for name, value in found["summary"].items()}
    monkeypatch.setattr(measured_methods, "document", lambda: found)
    assert measured_methods.measured("MixUp") == (
        "ResNet-20: a step takes 1.25 times as long; +1.0 points after a short recovery."
    )
    assert measured_methods.measured("CutMix") == ""
    page = measured_methods.methods_page()
    row = "| [MixUp](algorithms/mixup.md) | ResNet-20 | defaults | 1.25 ± 0.50 |  | +1.0 |"
    assert row in page
    assert "| teacher | 0.1 | 82.0 | +2.0 | 1 |" in page


@pytest.mark.slow
def test_a_quick_run_writes_a_row_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    arrays = {
        f"{split}_{kind}": values
        for split in ("train", "test")
        for kind, values in {
            "images": random.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8),
            "labels": random.integers(0, 10, 64),
        }.items()
    }
    np.savez(tmp_path / "cifar10_exact_subset.npz", classes=np.array(["x"]), **arrays)
    torch.save(CifarResNet(20).state_dict(), tmp_path / "cifar10_resnet20.pt")
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "sst2" / f"{split}.tsv").write_text("a good film\t1\na bad film\t0\n" * 32)
    target = tmp_path / "methods.json"
    words = ["--data", str(tmp_path), "--quick", "--json", str(target), "--methods"]
    words += ["Distillation", "SeqLengthWarmup", "--parts", "recovery", "text", "time"]
    monkeypatch.setattr(sys, "argv", [methods.__file__, *words])
    threads = torch.get_num_threads()
    try:
        methods.main()
    finally:
        torch.set_num_threads(threads)
    document = json.loads(target.read_text())
    rows = {(row["method"], row["network"]): row for row in document["rows"]}
    image, text = rows["Distillation", "ResNet-20"], rows["SeqLengthWarmup", "small BERT"]
    assert image["step time ratio"] > 0
    assert None not in (image["recovery gain"], text["scratch gain"])
    assert image["scratch gain"] is text["recovery gain"] is None
    assert 0.45 < document["summary"]["pruned_macs_fraction"] <= 0.5
    assert "| Distillation | ResNet-20 |" in capsys.readouterr().out
