"""What runs in a worker of Ray: the job, opened again, and the making of one variant of it.

Models come and go as files, structure and weights; nothing that is trained is pickled.
"""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from compressor.distributed.ray_pool import NeedsRoom
from compressor.errors import CompressorError, StudyError, first_line
from compressor.frameworks.base import Job, Judged
from compressor.interfaces.device import Device
from compressor.logs import ROOT
from compressor.progress import SILENT, Progress
from compressor.result import Plan
from compressor.search import making
from compressor.search.making import FIT, NOTHING, Base, Work, build_and_recover
from compressor.search.tuning import Recovered
from compressor.seeding import isolated_rng
from compressor.training.gradients import is_out_of_memory

TOKEN = "token"  # a file of `Opening.mark`

Files = Mapping[str, bytes]


class WorkerBench(making.Bench, Protocol):
    """The part of a workbench that a worker needs."""

    def use_baseline(self, baseline: Judged) -> None:
        """Take what was measured of the reference."""

    def leave_export(self) -> None:
        """Take note that the model cannot be exported."""

    def evaluate(self, model: Any, plan: Plan, folder: Path) -> Mapping[str, float]:
        """Metrics of the model as deployed."""

    def pack(self, model: Any) -> Files:
        """What `save` writes, by the name of the file."""

    def unpack(self, files: Files) -> Any:
        """What `load` reads."""


@dataclass(frozen=True)
class Order:
    """What a worker is told.

    Attributes:
        work: what is to be done.
        start: files of the variant that it goes on from.
        base: files of the variant that has a part of its structure.
        baseline: of the reference.
        can_export: whether the model can be exported.
    """

    work: Work
    start: Files | None
    base: Files | None
    baseline: Judged
    can_export: bool


@dataclass(frozen=True)
class Delivery:
    """What a worker sends back.

    Attributes:
        metrics: of the variant as deployed; None: it failed.
        files: of the variant.
        recovered: what training did.
        reason: why it failed.
        seconds: that it took.
        looks: at the judged split.
        lines: of the log: logger, level, text.
    """

    metrics: Mapping[str, float] | None
    files: Files = field(default_factory=dict)
    recovered: Recovered = NOTHING
    reason: str = ""
    seconds: float = 0.0
    looks: int = 0
    lines: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True)
class Opening:
    """Makes a worker, in another process.

    Attributes:
        open_bench: opens the job.
        job: the user's, on the CPU.
        folder: of the variants, on the engine's machine.
        mark: a folder there that ends with the workers.
        token: in its file `TOKEN`, by which a worker sees that it shares the file system.
        threads: of torch.
        gpu_fraction: of a GPU's memory; 0 or 1 is all.
    """

    open_bench: Callable[[Job, Path, Progress], WorkerBench]
    job: Job
    folder: Path
    mark: Path
    token: str
    threads: int = 1
    gpu_fraction: float = 0.0

    def __call__(self) -> JobWorker:
        """The worker, with the job open."""
        torch.set_num_threads(self.threads)
        is_shared = False
        with suppress(OSError):
            is_shared = (self.mark / TOKEN).read_text() == self.token
        # What a killed worker leaves beside the mark, the engine removes.
        place = self.mark if is_shared else None
        scratch = Path(tempfile.mkdtemp(prefix="compressor-", dir=place))
        seed = self.job.config.seed
        room = Room(self.gpu_fraction if self.job.config.device is Device.GPU else 0.0)
        with isolated_rng(seed):
            bench = self.open_bench(self.job, scratch, SILENT)
        return JobWorker(bench, scratch, self.folder if is_shared else None, room, seed)


class JobWorker:
    """Makes variants of one job, one after the other."""

    def __init__(
        self, bench: WorkerBench, scratch: Path, shared: Path | None, room: Room, seed: int
    ) -> None:
        """Make nothing yet.

        Args:
            bench: the job.
            scratch: a folder of this worker's own.
            shared: the engine's folder of variants, where this machine has it too: a fit that was
                interrupted goes on there.
            room: memory of the GPU.
            seed: of the run.
        """
        self._bench = bench
        self._scratch = scratch
        self._shared = shared
        self._room = room
        self._seed = seed

    def __call__(self, order: Order, *, is_alone: bool = False) -> Delivery:
        """The variant of `order`.

        Raises:
            NeedsRoom: if memory runs out.
        """
        own = self._scratch / order.work.record.id
        fit = (self._shared or self._scratch) / order.work.record.id / FIT
        began, looks = time.monotonic(), self._bench.looks()
        try:
            with recorded() as lines, isolated_rng(self._seed), self._room.taken(is_alone):
                delivery = self._make(order, own, fit)
        except Exception as error:
            if not lacks_memory(error):
                raise
            wants = first_line(error)
        else:
            seconds, looks = time.monotonic() - began, self._bench.looks() - looks
            return replace(delivery, seconds=seconds, looks=looks, lines=tuple(lines))
        finally:
            shutil.rmtree(own, ignore_errors=True)
        self.release()  # behind `except`, whose error holds the frames that hold the tensors
        raise NeedsRoom(wants)

    def release(self) -> None:
        """Give memory back."""
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Remove the folder of this worker."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _make(self, order: Order, own: Path, fit: Path) -> Delivery:
        bench, work = self._bench, order.work
        bench.use_baseline(order.baseline)
        if not order.can_export:
            bench.leave_export()
        try:
            start = bench.unpack(order.start) if order.start is not None else None
            base = None
            if work.base is not None and order.base is not None:
                base = Base(work.base.plan, bench.unpack(order.base))
            model, recovered = build_and_recover(bench, work, start, base, fit)
            metrics = bench.evaluate(model, work.record.plan, own)
            files = bench.pack(model)
        except StudyError:
            raise
        except CompressorError as error:
            if lacks_memory(error):
                raise
            return Delivery(None, reason=str(error))
        return Delivery(dict(metrics), files, recovered)


class Room:
    """How much of a GPU's memory this process may take.

    Args:
        fraction: of it; 0 or 1 is all.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction if 0 < fraction < 1 else 1.0
        if self._fraction < 1:
            torch.cuda.set_per_process_memory_fraction(self._fraction)

    @contextmanager
    def taken(self, is_alone: bool) -> Iterator[None]:
        """All of it while `is_alone`."""
        if self._fraction == 1 or not is_alone:
            yield
            return
        torch.cuda.set_per_process_memory_fraction(1.0)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(self._fraction)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what led to it, is that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def recorded() -> Iterator[list[tuple[str, int, str]]]:
    """This package's log lines from "info" on, for another process to log: logger, level, text."""
    handler = _Lines(logging.INFO)
    log = logging.getLogger(ROOT)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it as text: its arguments may not travel."""
        self.lines.append((record.name, record.levelno, record.getMessage()))
