"""What a worker does with an order, and what becomes of its delivery; without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.config import Config, ExecutorConfig
from compressor.distributed.ray_pool import Failed, NeedsRoom
from compressor.errors import ModelError
from compressor.frameworks.base import Job, Judged
from compressor.frameworks.job_worker import (
    Delivery,
    JobWorker,
    Opening,
    Order,
    Room,
    lacks_memory,
)
from compressor.frameworks.workers import ARRIVED, RayMaker, read_files, worker_resources
from compressor.interfaces.device import Device
from compressor.logs import get_logger
from compressor.progress import SILENT
from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.making import DEPLOYED, FIT, InlineMaker, Work
from compressor.search.tuning import Recovered, Tuning
from tests.fakes import FakeBench, FakeModel

BASELINE = Judged({"accuracy": 90.0}, Cost(1, 1, 1, 1.0))


@dataclass
class Bench(FakeBench):
    """Judges in two steps, and remembers what it was told."""

    told: dict[str, Any] = field(default_factory=dict)
    raises: Exception | None = None
    reference_judged = BASELINE
    can_export = True

    def use_baseline(self, baseline: Judged) -> None:
        self.told["baseline"] = baseline

    def leave_export(self) -> None:
        self.told["leaves export"] = True

    def recover(
        self,
        model: FakeModel,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None = None,
    ) -> Recovered:
        self.told["fit"] = folder
        get_logger("fit").info("%d epochs", epochs)
        if self.raises is not None:
            raise self.raises
        return super().recover(
            model, plan, epochs, folder, is_final=is_final, tuning=tuning, wanted=wanted
        )

    def evaluate(self, model: FakeModel, plan: Plan, folder: Path) -> Mapping[str, float]:
        return self.judge(model, plan, folder).metrics

    def pack(self, model: FakeModel) -> dict[str, bytes]:
        text = json.dumps({"plan": model.plan.to_json(), "epochs": model.epochs})
        return {"model.json": text.encode()}

    def unpack(self, files: Mapping[str, bytes]) -> FakeModel:
        values = json.loads(files["model.json"])
        return FakeModel(Plan.from_json(values["plan"]), values["epochs"])

    def measure(self, model: FakeModel, plan: Plan, folder: Path) -> Cost:
        self.calls.append("measure")
        return self._judged(model, plan).cost


class Pool:
    """Hands the orders to one worker, the last first."""

    def __init__(self, worker: JobWorker, calls: list[str]) -> None:
        self.worker, self.calls = worker, calls
        self.orders: list[Order] = []

    def map(self, orders: Sequence[Order]) -> Iterator[tuple[int, Delivery | Failed]]:
        self.orders = list(orders)
        for number in reversed(range(len(orders))):
            self.calls.append("received")
            yield number, self.worker(orders[number])

    def settle(self) -> None:
        self.calls.append("settled")


def work(name: str, *layers: int, **changes: Any) -> Work:
    choices = (Choice("block_removal", f"layer{i}", {"removed": True}) for i in layers)
    how = {key: changes.pop(key) for key in ("start", "base") if key in changes}
    record = VariantRecord(name, Plan(tuple(choices)), "failed", **changes)
    return Work(record, epochs=2, **how)


@pytest.fixture
def bench() -> Bench:
    return Bench(Job({}, None, Config()))


def worker(bench: Bench, scratch: Path, shared: Path | None = None) -> JobWorker:
    return JobWorker(bench, scratch, shared, Room(0.0), seed=0)


def order(one: Work) -> Order:
    return Order(one, None, None, BASELINE, can_export=True)


def test_what_is_delivered_is_what_is_made_inline(bench: Bench, tmp_path: Path) -> None:
    works = [work("a", 0), work("b", 3), work("c", 1, 2)]
    inline, made = tmp_path / "inline", tmp_path / "made"
    expected = list(InlineMaker(bench, inline).make(works))
    pool: Any = Pool(worker(bench, tmp_path / "scratch"), bench.calls)
    found = list(RayMaker(bench, pool, made, 2, SILENT).make(works))
    for one, other in zip(found, expected, strict=True):
        assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    for each in works:
        assert read_files(made / each.record.id) == read_files(inline / each.record.id)
        paths = [folder / each.record.id / "plan.json" for folder in (made, inline)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_costs_are_measured_when_all_is_there(bench: Bench, tmp_path: Path) -> None:
    pool: Any = Pool(worker(bench, tmp_path / "scratch"), bench.calls)
    list(RayMaker(bench, pool, tmp_path / "made", 2, SILENT).make([work("a", 0), work("b", 1)]))
    calls = [call for call in bench.calls if call in {"received", "settled", "measure"}]
    assert calls == ["received", "received", "settled", "measure", "measure"]


def test_a_variant_goes_on_from_the_files_of_another(bench: Bench, tmp_path: Path) -> None:
    pool: Any = Pool(worker(bench, tmp_path / "scratch"), bench.calls)
    maker = RayMaker(bench, pool, tmp_path / "made", 2, SILENT)
    first = work("first", 0)
    (made,) = maker.make([first])
    assert made.judged is not None
    bench.calls.clear()
    (longer, larger) = maker.make(
        [work("longer", 0, start=first.record), work("larger", 0, 1, base=first.record)]
    )
    assert bench.load(tmp_path / "made" / "longer").epochs == 4
    assert bench.load(tmp_path / "made" / "larger").epochs == 1 + 2  # half of the base's are left
    assert bench.calls.count("build") == 1
    assert longer.judged is not None
    assert larger.judged is not None
    assert longer.judged.metrics["accuracy"] > made.judged.metrics["accuracy"]


def test_what_arrived_before_a_crash_is_not_made_again(bench: Bench, tmp_path: Path) -> None:
    pool: Any = Pool(worker(bench, tmp_path / "scratch"), bench.calls)
    maker = RayMaker(bench, pool, tmp_path / "made", 2, SILENT)
    works = [work("a", 0, wanted=80.0), work("b", 1)]
    crashed = maker.make(works)
    expected = next(crashed)  # and no further
    bench.calls.clear()
    again = list(maker.make(works))
    assert "recover" not in bench.calls
    assert replace(again[0], seconds=0.0) == replace(expected, seconds=0.0)
    other_aim = [replace(works[0], record=replace(works[0].record, wanted=85.0))]
    list(maker.make(other_aim))
    assert "recover" in bench.calls
    note = json.loads((tmp_path / "made" / "a" / DEPLOYED / ARRIVED).read_text())
    assert note["wanted"] == 85.0


def test_a_fit_lies_in_the_folder_of_the_run_where_the_worker_has_it_too(
    bench: Bench, tmp_path: Path
) -> None:
    worker(bench, tmp_path / "scratch")(order(work("a", 0)))
    assert bench.told["fit"] == tmp_path / "scratch" / "a" / FIT
    worker(bench, tmp_path / "scratch", tmp_path / "shared")(order(work("a", 0)))
    assert bench.told["fit"] == tmp_path / "shared" / "a" / FIT


def opened(folder: Path, mark: Path, token: str) -> JobWorker:
    def open_bench(job: Job, scratch: Path, progress: Any) -> Any:
        return Bench(job, told={"scratch": scratch})

    before = torch.get_num_threads()
    job = Job({}, None, Config.from_dict({"device": "CPU"}))
    try:
        return Opening(open_bench, job, folder, mark, token)()
    finally:
        torch.set_num_threads(before)


def test_a_worker_sees_whether_it_shares_the_folder_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "mark").mkdir()
    (tmp_path / "mark" / "token").write_text("right")
    for token, is_shared in (("right", True), ("of another run", False)):
        one = opened(tmp_path / "variants", tmp_path / "mark", token)
        assert (one._shared is not None) == is_shared
        assert (one._scratch.parent == tmp_path / "mark") == is_shared
        assert one._scratch.is_dir()
        one.close()
        assert not one._scratch.exists()


def test_an_error_of_ours_fails_the_variant_and_others_stop_the_run(
    bench: Bench, tmp_path: Path
) -> None:
    one = worker(bench, tmp_path / "scratch")
    bench.raises = ModelError("This layer cannot be pruned. Choose another.")
    delivery = one(order(work("a", 0)))
    assert delivery.metrics is None
    assert delivery.reason == "This layer cannot be pruned. Choose another."
    bench.raises = KeyError("labels")
    with pytest.raises(KeyError, match="labels"):
        one(order(work("a", 0)))


def wrapped(error: Exception) -> ModelError:
    outer = ModelError("The forward pass failed. Check the inputs.")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        wrapped(torch.OutOfMemoryError("CUDA out of memory.")),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "wrapped", "python"],
)
def test_a_lack_of_memory_asks_for_room(error: Exception, bench: Bench, tmp_path: Path) -> None:
    assert lacks_memory(error)
    bench.raises = error
    with pytest.raises(NeedsRoom):
        worker(bench, tmp_path / "scratch")(order(work("a", 0)))


def test_a_worker_that_shares_a_gpu_has_all_of_it_while_it_is_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", allowed.append)
    one = JobWorker(bench, tmp_path, None, Room(0.5), seed=0)
    one(order(work("a", 0)))
    assert allowed == [0.5]
    bench.raises = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(NeedsRoom):
        one(order(work("b", 1)), is_alone=True)
    assert allowed == [0.5, 1.0, 0.5]


def test_other_errors_do_not_lack_memory() -> None:
    assert not lacks_memory(RuntimeError("shapes (3, 4) and (5, 6)"))
    assert not lacks_memory(wrapped(ValueError("labels")))


def test_a_worker_is_told_of_the_reference_and_sends_its_log(bench: Bench, tmp_path: Path) -> None:
    told = replace(order(work("a", 0)), can_export=False)
    delivery = worker(bench, tmp_path / "scratch")(told)
    assert bench.told["baseline"] == BASELINE
    assert bench.told["leaves export"]
    assert [text for _, _, text in delivery.lines] == ["2 epochs"]
    assert delivery.looks == 1
    assert not (tmp_path / "scratch" / "a").exists()


def test_a_work_that_was_given_up_fails_with_the_reason(bench: Bench, tmp_path: Path) -> None:
    class Deadly(Pool):
        def map(self, orders: Sequence[Order]) -> Iterator[tuple[int, Delivery | Failed]]:
            yield 0, Failed("3 workers died of it.")

    pool: Any = Deadly(worker(bench, tmp_path / "scratch"), bench.calls)
    (made,) = RayMaker(bench, pool, tmp_path / "made", 1, SILENT).make([work("a", 0)])
    assert made.judged is None
    assert made.reason == "The variant could not be made: 3 workers died of it."


@pytest.mark.parametrize(
    ("said", "device", "gpus", "expected"),
    [
        ({}, Device.CPU, 0, {"CPU": 1.0}),
        ({"CPU": 4}, Device.CPU, 1, {"CPU": 4}),
        ({}, Device.GPU, 1, {"CPU": 1.0, "GPU": 0.3333}),
        ({}, Device.GPU, 3, {"CPU": 1.0, "GPU": 1.0}),
        ({"GPU": 1}, Device.GPU, 1, {"CPU": 1.0, "GPU": 1}),
        ({}, Device.GPU, 0, {"CPU": 1.0, "GPU": 0.3333}),
    ],
)
def test_a_worker_has_a_cpu_and_a_share_of_a_gpu_unless_told(
    said: dict[str, float], device: Device, gpus: int, expected: dict[str, float]
) -> None:
    executor = ExecutorConfig("ray", workers=3, resources=said)
    assert worker_resources(executor, device, gpus) == pytest.approx(expected)
