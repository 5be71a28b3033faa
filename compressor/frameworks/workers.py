"""Variants made by workers of Ray: what they are told, and what becomes of what they send back.

A worker opens the job as the engine has opened it, and builds, trains and evaluates variants. The
engine's process measures what they cost, when no worker is at work: a latency that is measured
beside others is none.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.config import ExecutorConfig
from compressor.distributed.ray_pool import CPU, GPU, Failed, RayPool, ray_pool
from compressor.distributed.shipping import check_shipping, ship
from compressor.errors import CompressorError, StudyError
from compressor.files import write_bytes, write_text
from compressor.frameworks.base import Job, Judged
from compressor.frameworks.job_worker import (
    TOKEN,
    Delivery,
    Files,
    Opening,
    Order,
    WorkerBench,
)
from compressor.interfaces.device import Device
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import Cost, Plan, VariantRecord, canonical_json
from compressor.search.making import DEPLOYED, Made, Work
from compressor.search.tuning import Recovered
from compressor.structure.trace import copy_model

ARRIVED = "arrived.json"  # in the folder `DEPLOYED`, which ends with the making of the variant
MARK = ".workers"  # a folder of the run
NOT_OF_THE_MODEL = ("plan.json", "metrics.json")
GPU_STEP = 0.0001  # of what Ray can share


class DriverBench(Protocol):
    """The part of a workbench that the engine's process needs beside workers."""

    @property
    def reference_judged(self) -> Judged:
        """The reference's metrics and cost."""

    @property
    def can_export(self) -> bool:
        """Whether the model can be exported, as far as is known."""

    def load(self, folder: Path) -> Any:
        """Read a variant back."""

    def measure(self, model: Any, plan: Plan, folder: Path) -> Cost:
        """Cost of the model as deployed."""


@contextmanager
def ray_workers(
    bench: DriverBench,
    open_bench: Callable[[Job, Path, Progress], WorkerBench],
    job: Job,
    executor: ExecutorConfig,
    folder: Path,
    progress: Progress,
) -> Iterator[RayMaker]:
    """What makes the variants of `job` by workers of Ray.

    Args:
        bench: of this process.
        open_bench: opens the job in a worker.
        job: the user's.
        executor: how many workers, and what each may have.
        folder: of the variants, in the folder of the run.
        progress: shows the rounds.

    Raises:
        ConfigError: if there is no room for the workers.
        CompressorError: what opening the job in a worker raises.
    """
    resources = worker_resources(executor, job.config.device, torch.cuda.device_count())
    opening = Opening(
        open_bench,
        _portable(job),
        folder.absolute(),
        mark=folder.absolute().parent / MARK,
        token=secrets.token_hex(),
        threads=max(int(resources[CPU]), 1),
        gpu_fraction=resources.get(GPU, 0.0),
    )
    shipped = ship(opening)
    shutil.rmtree(opening.mark, ignore_errors=True)  # of a process that was killed
    write_text(opening.mark / TOKEN, opening.token)
    try:
        with ray_pool(shipped, executor.workers, resources) as pool:
            yield RayMaker(bench, pool, folder, executor.workers, progress)
    finally:
        shutil.rmtree(opening.mark, ignore_errors=True)


def check_sendable(job: Job) -> None:
    """Refuse a job that cannot be sent to workers.

    Raises:
        ConfigError: naming the part, and the way out.
        MissingDependencyError: without Ray.
    """
    check_shipping(_parts(_portable(job)))


def worker_resources(executor: ExecutorConfig, device: Device, gpus: int) -> dict[str, float]:
    """Of one worker: one CPU, and where the job is on the GPU an equal share, if nothing is said.

    Args:
        executor: what is said.
        device: of the job.
        gpus: of this machine.

    >>> worker_resources(ExecutorConfig("ray", workers=3), Device.GPU, gpus=2)
    {'CPU': 1.0, 'GPU': 0.5}
    """
    resources = {CPU: 1.0, **executor.resources}
    if device is Device.GPU:
        share = 1 / math.ceil(executor.workers / max(gpus, 1))
        resources.setdefault(GPU, math.floor(share / GPU_STEP) * GPU_STEP)
    return resources


class RayMaker:
    """Has variants made by workers, and measures them when all of a round are there."""

    def __init__(
        self,
        bench: DriverBench,
        pool: RayPool[Order, Delivery],
        folder: Path,
        width: int,
        progress: Progress,
    ) -> None:
        """Make nothing yet; see `ray_workers`."""
        self.width = self.at_once = width
        self._bench = bench
        self._pool = pool
        self._folder = folder
        self._progress = progress

    def make(self, works: Sequence[Work]) -> Iterator[Made]:
        """What came of each, in their order.

        What has arrived is kept, and not made again after a crash.
        """
        there = {number: self._arrived(work) for number, work in enumerate(works)}
        wanted = [number for number, delivery in there.items() if delivery is None]
        orders = [self._order(works[number]) for number in wanted]
        with self._progress.task("variants", total=len(wanted)) as advance:
            for index, outcome in self._pool.map(orders):
                number = wanted[index]
                there[number] = self._receive(works[number], outcome)
                advance()
        self._pool.settle()
        for number, work in enumerate(works):
            delivery = there[number]
            assert delivery is not None
            yield self._measured(work, delivery)

    def _order(self, work: Work) -> Order:
        return Order(
            work,
            self._files(work.start),
            self._files(work.base),
            self._bench.reference_judged,
            self._bench.can_export,
        )

    def _files(self, record: VariantRecord | None) -> Files | None:
        return None if record is None else read_files(self._folder / record.id)

    def _receive(self, work: Work, outcome: Delivery | Failed) -> Delivery:
        """Write the variant down as it arrives."""
        if isinstance(outcome, Failed):
            return Delivery(None, reason=f"The variant could not be made: {outcome}")
        for name, level, text in outcome.lines:
            get_logger(name).log(level, "%s", text)
        if outcome.metrics is None:
            return outcome
        folder = self._folder / work.record.id
        write_text(folder / "plan.json", canonical_json(work.record.plan.to_json()))
        for name, content in outcome.files.items():
            write_bytes(folder / name, content)
        note = {
            "wanted": work.record.wanted,
            "metrics": dict(outcome.metrics),
            "recovered": list(outcome.recovered),
            "seconds": outcome.seconds,
            "looks": outcome.looks,
        }
        write_text(folder / DEPLOYED / ARRIVED, json.dumps(note))
        return outcome

    def _arrived(self, work: Work) -> Delivery | None:
        """What arrived of `work` in a process that was killed before the round had ended."""
        try:
            note = json.loads((self._folder / work.record.id / DEPLOYED / ARRIVED).read_text())
        except (OSError, ValueError):
            return None
        if note["wanted"] != work.record.wanted:  # its training may have been stopped for that
            return None
        recovered = Recovered(*note["recovered"])
        return Delivery(
            note["metrics"],
            recovered=recovered._replace(curve=tuple(recovered.curve)),
            seconds=note["seconds"],
            looks=note["looks"],
        )

    def _measured(self, work: Work, delivery: Delivery) -> Made:
        failed = Made(None, reason=delivery.reason, seconds=delivery.seconds, looks=delivery.looks)
        if delivery.metrics is None:
            return failed
        began, folder = time.monotonic(), self._folder / work.record.id
        try:
            model = self._bench.load(folder)
            cost = self._bench.measure(model, work.record.plan, folder / DEPLOYED)
        except StudyError:
            raise
        except CompressorError as error:
            return replace(failed, reason=str(error))
        return replace(
            failed,
            judged=Judged(delivery.metrics, cost),
            recovered=delivery.recovered,
            seconds=delivery.seconds + time.monotonic() - began,
        )


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a variant's model, by name."""
    paths = (path for path in sorted(folder.glob("*")) if path.is_file())
    return {
        path.name: path.read_bytes()
        for path in paths
        if path.name not in NOT_OF_THE_MODEL and not path.name.startswith(".")
    }


def _portable(job: Job) -> Job:
    """`job` for a process that has no GPU of this one's, and no workers of its own."""
    config = replace(job.config, executor=ExecutorConfig())
    return replace(job, model=copy_model(job.model).cpu(), config=config)


def _parts(job: Job) -> dict[str, object]:
    """What a job is made of, by the words of the engine."""
    data = job.data
    splits: dict[str, object] = {"data": data}
    if isinstance(data, Mapping):
        splits = {f"data[{name!r}]": loader for name, loader in data.items()}
    loop = {"config['external_training_loop']": job.config.external_training_loop}
    names = ("model", "forward_pass", "eval_func", "loss_function_cls", "loss_function_kwargs")
    functions = {name: getattr(job, name) for name in names}
    return {**splits, **functions, **loop, "config": job.config}
