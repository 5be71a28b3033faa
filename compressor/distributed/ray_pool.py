"""Ray: processes, here or on a cluster, that each hold a worker and do tasks with it.

A process that dies has its task done again by a new one.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from compressor.distributed.shipping import unship
from compressor.errors import CompressorError, ConfigError, first_line
from compressor.logs import get_logger
from compressor.optional import require

logger = get_logger(__name__)

Task = TypeVar("Task", contravariant=True)
Outcome = TypeVar("Outcome", covariant=True)

MOST_DEATHS = 2  # after which a task is done again, and processes are started again in a row
PATIENCE_SECONDS = 120.0  # for processes that do not come up, as where Ray has no room for them
CLOSE_SECONDS = 5.0
CPU, GPU, MEMORY = "CPU", "GPU", "memory"


class NeedsRoom(CompressorError):
    """A worker's memory did not suffice for a task beside others; it is tried again alone."""


class WorkerError(CompressorError, RuntimeError):
    """Processes that cannot be started, or keep dying."""


class Failed(str):
    """Why a task has no outcome, though it was tried again; everything else is an outcome."""


class Worker(Protocol[Task, Outcome]):
    """What is shipped to every process, and made there once."""

    def __call__(self, task: Task, *, is_alone: bool) -> Outcome:
        """Do `task`; while `is_alone`, all other workers are idle.

        Raises:
            NeedsRoom: to be asked again when the others are idle.
        """

    def release(self) -> None:
        """Give memory back that is not needed while this one is idle."""

    def close(self) -> None:
        """Leave nothing behind."""


@contextmanager
def ray_pool(
    shipped: bytes, count: int, resources: Mapping[str, float]
) -> Iterator[RayPool[Any, Any]]:
    """A pool in the Ray that runs, or that RAY_ADDRESS names; else in one of its own, on this host.

    Args:
        shipped: what `ship` made of a function without arguments that makes a `Worker`.
        count: of processes.
        resources: of one of them, by Ray's names: "CPU", "GPU", "memory", and those of the cluster.

    Raises:
        ConfigError: if this machine alone does not have the resources, CPUs aside, which workers
            may share, or the worker cannot be made there.
        MissingDependencyError: without Ray.
        WorkerError: if no process comes up.
    """
    with _running_ray(count, resources) as ray:
        pool: RayPool[Any, Any] = RayPool(ray, shipped, count, resources)
        try:
            pool.start()
            yield pool
        finally:
            pool.close()


class RayPool(Generic[Task, Outcome]):
    """So many processes, each with a worker of its own."""

    def __init__(
        self, ray: ModuleType, shipped: bytes, count: int, resources: Mapping[str, float]
    ) -> None:
        """Remember what to start; see `ray_pool`."""
        self._ray = ray
        self._shipped = ray.put(shipped)
        self._count = count
        self._resources = dict(resources)
        self._process = ray.remote(_Process).options(**_options(resources))
        self._starting: dict[Any, Any] = {}  # what their opening returns, and the processes
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}  # what their tasks return, and the tasks
        self._deaths = 0  # of processes in a row before they were open
        self._patient_until = 0.0

    def start(self) -> None:
        """Start the processes, and wait until they are there; for all but the first not too long.

        Raises:
            WorkerError: if they die.
            Exception: what making the worker raised.
        """
        self._fill()
        while not self._idle:
            self._await_start(PATIENCE_SECONDS)
            if not self._idle:
                logger.warning(
                    "Ray has no room yet for a worker of %s: it has %s in all. It is waited for.",
                    self._resources,
                    self._ray.cluster_resources(),
                )
        self.settle()
        if self._starting:
            logger.warning(
                "Ray has room for %d of %d workers of %s so far; work begins with these.",
                len(self._idle),
                self._count,
                self._resources,
            )

    def map(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome | Failed]]:
        """Number and outcome of each task, as they come in.

        Those that want room come last, one by one.

        Raises:
            WorkerError: if processes die before they are open.
            Exception: what a worker raised.
        """
        crowded = []
        for number, outcome in self._run(dict(enumerate(tasks)), is_alone=False):
            if isinstance(outcome, NeedsRoom):
                crowded.append(number)
                logger.warning("A worker's memory did not suffice; tried again alone. %s", outcome)
            else:
                yield number, outcome
        for number in crowded:
            self._ask_idle("release", PATIENCE_SECONDS)
            for _, outcome in self._run({number: tasks[number]}, is_alone=True):
                if isinstance(outcome, NeedsRoom):
                    yield number, Failed(f"alone, too, memory did not suffice: {outcome}")
                else:
                    yield number, outcome

    def settle(self) -> None:
        """Wait, though not for ever, until no process is starting: this machine is quiet then."""
        while self._starting and (left := self._patient_until - time.monotonic()) > 0:
            self._await_start(left)

    def close(self) -> None:
        """End the processes."""
        self._ask_idle("close", CLOSE_SECONDS)
        for process in [*self._idle, *self._starting.values()]:
            self._ray.kill(process)
        self._idle, self._starting = [], {}

    def _run(
        self, tasks: Mapping[int, Task], *, is_alone: bool
    ) -> Iterator[tuple[int, Outcome | Failed | NeedsRoom]]:
        waiting, deaths = deque(tasks), Counter[int]()
        self._leave_dead()
        self._fill()
        try:
            while waiting or self._busy:
                while waiting and self._idle:
                    process, number = self._idle.pop(), waiting.popleft()
                    self._busy[process.do.remote(tasks[number], is_alone)] = process, number
                for done in self._await([*self._busy, *self._starting]):
                    if done in self._starting:
                        self._open(done)
                        continue
                    process, number = self._busy.pop(done)
                    outcome = self._collect(done, process)
                    self._fill()
                    if not isinstance(outcome, _Died):
                        yield number, outcome
                        continue
                    deaths[number] += 1
                    if deaths[number] > MOST_DEATHS:
                        yield number, Failed(f"{deaths[number]} workers died of it: {outcome}")
                    else:
                        logger.warning("A worker died; its work is done again. %s", outcome)
                        waiting.appendleft(number)
        finally:
            for process, _ in self._busy.values():  # of a round that is given up
                self._ray.kill(process)
            self._busy = {}

    def _collect(self, done: Any, process: Any) -> Any:
        """What a task came to: its outcome, `NeedsRoom`, or that its process died."""
        errors = self._ray.exceptions
        try:
            outcome = self._ray.get(done)
        except errors.RayTaskError as error:
            if not isinstance(error.cause, NeedsRoom):
                self._idle.append(process)
                raise error.cause from error
            outcome = error.cause
        except errors.OutOfMemoryError as error:  # the machine's: Ray has ended the process
            return NeedsRoom(first_line(error))
        except _deaths(self._ray) as error:
            self._ray.kill(process)  # it may only be out of reach
            return _Died(first_line(error))
        self._idle.append(process)
        return outcome

    def _fill(self) -> None:
        """Start as many processes as are missing."""
        paths = [os.path.abspath(path) for path in sys.path]  # "" is where the script was started
        there = len(self._busy) + len(self._idle) + len(self._starting)
        for _ in range(self._count - there):
            process = self._process.remote()
            self._starting[process.open.remote(paths, self._shipped)] = process
            self._patient_until = time.monotonic() + PATIENCE_SECONDS

    def _await_start(self, seconds: float) -> None:
        for done in self._await([*self._starting], seconds):
            self._open(done)

    def _open(self, done: Any) -> None:
        """A process is there, or not."""
        process = self._starting.pop(done)
        try:
            self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            self._ray.kill(process)
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            self._ray.kill(process)
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                raise WorkerError(
                    f"{self._deaths} workers of Ray died while they opened the job: "
                    f"{first_line(error)} Look into Ray's logs, and at the memory of its nodes."
                ) from error
            self._fill()
        else:
            self._deaths = 0
            self._idle.append(process)

    def _await(self, refs: list[Any], seconds: float | None = None) -> list[Any]:
        done: list[Any] = self._ray.wait(refs, num_returns=1, timeout=seconds)[0]
        return done

    def _leave_dead(self) -> None:
        """Forget idle processes that are no more, as after the end of a node: no task is theirs."""
        asked = self._ask_idle("live", PATIENCE_SECONDS)
        for process, answer in asked:
            try:
                self._ray.get(answer, timeout=0)
            except self._ray.exceptions.RayError as error:
                logger.warning("A worker died while it was idle. %s", first_line(error))
                self._idle.remove(process)
                self._ray.kill(process)

    def _ask_idle(self, method: str, seconds: float) -> list[tuple[Any, Any]]:
        """Call a method of the idle processes, and wait; with what each returns."""
        asked = [(process, getattr(process, method).remote()) for process in self._idle]
        if asked:
            answers = [answer for _, answer in asked]
            self._ray.wait(answers, num_returns=len(answers), timeout=seconds)
        return asked


class _Died(str):
    """Why a process is no more."""


class _Process:
    """In a process of Ray: the worker that was shipped there."""

    def open(self, paths: Sequence[str], shipped: bytes) -> None:
        """Make the worker."""
        sys.path[:0] = [path for path in paths if path not in sys.path]
        self._worker: Worker[Any, Any] = unship(shipped)()

    def live(self) -> None:
        """Nothing: one that is no more does not."""

    def do(self, task: Any, is_alone: bool) -> Any:
        """Hand `task` on."""
        return self._worker(task, is_alone=is_alone)

    def release(self) -> None:
        """Hand it on."""
        self._worker.release()

    def close(self) -> None:
        """Hand it on."""
        self._worker.close()


@contextmanager
def _running_ray(count: int, resources: Mapping[str, float]) -> Iterator[ModuleType]:
    """Ray as it runs; one that is not running yet is started, and ended again."""
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        yield ray
        return
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        cpus = math.ceil(count * resources.get(CPU, 1))
        options.update(address="local", num_cpus=cpus, include_dashboard=False)
    with _environment(RAY_USAGE_STATS_ENABLED="0"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what will change in Ray
        try:
            ray.init(**options)
        except ConnectionError as error:
            raise ConfigError(
                f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')!r} cannot be reached: "
                f"{first_line(error)} Start Ray there, or unset RAY_ADDRESS to work on this "
                "machine alone."
            ) from error
    try:
        if "address" in options:
            _check_machine(ray, count, resources)
        yield ray
    finally:
        ray.shutdown()
        if is_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _check_machine(ray: ModuleType, count: int, resources: Mapping[str, float]) -> None:
    """Refuse workers that will never have what they want; CPUs they may share, if slowly."""
    there = ray.cluster_resources()
    cpus, own = count * resources.get(CPU, 1), os.cpu_count() or 1
    if cpus > own:
        logger.warning(
            "executor: %d workers want %g CPUs, and this machine has %d, which they will share. "
            "Ask for less or for fewer workers, or name a cluster by RAY_ADDRESS in the "
            "environment.",
            count,
            cpus,
            own,
        )
    for name, wanted in resources.items():
        if name != CPU and count * wanted > there.get(name, 0):  # Ray is told of CPUs enough
            raise ConfigError(
                f"executor: {count} workers want {count * wanted:g} {name}, and this machine has "
                f"{there.get(name, 0):g}. Ask for less or for fewer workers, or name a cluster by "
                "RAY_ADDRESS in the environment."
            )


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Of a process, in Ray's words."""
    others = {k: v for k, v in resources.items() if k not in (CPU, GPU, MEMORY)}
    options: dict[str, Any] = {
        "num_cpus": resources.get(CPU, 1),
        "num_gpus": resources.get(GPU, 0),
        "resources": others,
    }
    return options | ({MEMORY: resources[MEMORY]} if MEMORY in resources else {})


def _deaths(ray: ModuleType) -> tuple[type[Exception], ...]:
    """How Ray says that a process, its machine, or what it returned is no more."""
    e = ray.exceptions
    return e.RayActorError, e.WorkerCrashedError, e.NodeDiedError, e.ObjectLostError


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """With these variables set where they are not."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
