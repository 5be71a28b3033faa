"""One job on several processes: rank 0 leads and runs the engine, the others train with it.

The leader senses, times, exports and writes alone; what it trains it orders all to train. The
followers have opened the same job and wait for orders.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from compressor.config import Config
from compressor.distributed.alone import alone
from compressor.distributed.failures import Failure, in_common
from compressor.distributed.launch import Team, Told
from compressor.errors import CompressorError, ConfigError, StudyError
from compressor.frameworks.base import Framework, Job, Judged, Workbench
from compressor.logs import ROOT, get_logger
from compressor.progress import Progress
from compressor.result import Cost, Plan, Result, from_mapping
from compressor.search.tuning import Recovered, Tuning
from compressor.seeding import isolated_rng

logger = get_logger(__name__)

Value = TypeVar("Value")

# Orders: what a follower is to do.
OPEN, BASELINE, TIME, RECOVER, END, FAIL = "open", "baseline", "time", "recover", "end", "fail"


class Leader:
    """Rank 0, or the only process.

    Args:
        team: of the processes.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._works = 0
        self._are_waiting = self.has_followers  # for an order

    @property
    def has_followers(self) -> bool:
        """Whether this is not the only process."""
        return self._team.context.world_size > 1

    def open(
        self, framework: Framework, job: Job, folder: Path, progress: Progress
    ) -> Workbench[Any]:
        """The job, opened here and by all followers.

        Raises:
            CompressorError: if a process cannot open it.
        """
        if not self.has_followers:
            return framework.open(job, folder, progress)
        _check_executor(job.config, self._team.context.world_size)
        trains_itself = job.config.external_training_loop is not None
        if trains_itself:
            logger.info(
                "The external training loop trains in the process of rank 0 alone: it is not known "
                "whether it is made for several."
            )
        self._order(OPEN, recipe=job.config.recipe())
        bench = _open(self._team, job, lambda opened: framework.open(opened, folder, progress))
        self._are_waiting = True
        return cast("Workbench[Any]", LeadingBench(bench, self, trains_itself=trains_itself))

    def end(self, bench: Workbench[Any], result: Result) -> Result:
        """`result`, which the followers return as well."""
        if self.has_followers:
            model = bench.pack(result.model)
            self._order(END, result=json.dumps(result.to_json()), model=model)
        return result

    def fail(self, error: BaseException) -> None:
        """End the followers with `error`, if they wait for an order."""
        if self._are_waiting:
            with suppress(RuntimeError):  # they have gone
                self._order(FAIL, failure=asdict(Failure.of(error, self._team.context.rank)))

    def together(self, order: str, work: Callable[[], Value], **arguments: Any) -> Value:
        """What `work` returns here, while the followers do as they are ordered.

        Raises:
            CompressorError: that of `work`, if it failed in all processes: they can go on.
            StudyError: if it failed in some, or ends the run.
        """
        self._works += 1
        self._order(order, number=self._works, **arguments)
        try:
            value = in_common(self._team.board, self._works, work)
        except StudyError:
            raise
        except CompressorError:
            self._are_waiting = True
            raise
        self._are_waiting = True
        return value

    def _order(self, order: str, **arguments: Any) -> None:
        self._are_waiting = False
        self._team.context.share({"do": order, **arguments})


@contextmanager
def lead(team: Team) -> Iterator[Leader]:
    """A leader, whose followers end with the error that leaves the block."""
    leader = Leader(team)
    try:
        yield leader
    except BaseException as error:
        leader.fail(error)
        raise


class LeadingBench:
    """A bench of which the followers know what they need, and that trains with them.

    All else it does alone: what the user's functions ask of `torch.distributed` is answered as in
    one process, since the others do not take part.

    Args:
        bench: the leader's own.
        leader: gives the orders.
        trains_itself: a loop of the user's own trains, here.
    """

    def __init__(self, bench: Workbench[Any], leader: Leader, *, trains_itself: bool) -> None:
        self._bench = bench
        self._leader = leader
        self._trains_itself = trains_itself

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._bench, name)
        if not callable(value):
            return value

        def call_alone(*args: Any, **kwargs: Any) -> Any:
            with alone():
                return value(*args, **kwargs)

        return call_alone

    def use_baseline(self, baseline: Judged) -> None:
        """Take what was measured of the reference; it names the metric, where the user did not."""
        self._leader.together(
            BASELINE,
            lambda: self._bench.use_baseline(baseline),
            metrics=dict(baseline.metrics),
            cost=baseline.cost.to_json(),
            can_export=self._bench.can_export,
        )

    def epoch_seconds(self) -> float:
        """A measured guess at one fine-tuning epoch, by all processes together."""
        if self._trains_itself:
            with alone():
                return self._bench.epoch_seconds()
        return self._leader.together(TIME, self._bench.epoch_seconds)

    def recover(
        self,
        model: Any,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None = None,
    ) -> Recovered:
        """Fine-tune `model` in place, with the followers."""
        how: dict[str, Any] = {"is_final": is_final, "wanted": wanted}
        work = partial(self._bench.recover, model, plan, epochs, folder, tuning=tuning, **how)
        if self._trains_itself:
            with alone():
                return work()
        return self._leader.together(
            RECOVER,
            work,
            model=self._bench.pack(model),
            plan=plan.to_json(),
            epochs=epochs,
            folder=(folder.parent.name, folder.name),
            tuning=tuning.to_json(),
            **how,
        )


def follow(framework: Framework, job: Job, team: Team) -> Result:
    """Do as the leader orders, and return its result.

    Nothing is written but to a temporary folder, and nothing below an error is said.

    Raises:
        CompressorError: that of the leader.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(isolated_rng(job.config.seed))
        stack.enter_context(_quiet())
        order = _wait(team)
        recipe = order["recipe"]
        bench = _open(team, job, lambda opened: _open_same(framework, opened, folder, recipe))
        while (order := _wait(team))["do"] != END:
            try:
                in_common(team.board, order["number"], partial(_obey, bench, order, folder))
            except StudyError:
                raise
            except CompressorError as error:  # the leader has the same, and knows what to do
                logger.info("%s", error)
        values = json.loads(order["result"])
        artifacts = {name: Path(path) for name, path in values["artifacts"].items()}
        model = bench.unpack(order["model"])
        return Result.from_json(values, model, lambda: bench.runtime_model(artifacts))


def _wait(team: Team) -> dict[str, Any]:
    """The next order."""
    order: dict[str, Any] = team.context.share({})
    if order["do"] == FAIL:
        raise Told(Failure(**order["failure"]))
    return order


def _obey(bench: Workbench[Any], order: Mapping[str, Any], folder: Path) -> None:
    if order["do"] == BASELINE:
        if not order["can_export"]:
            bench.leave_export()
        bench.use_baseline(Judged(order["metrics"], from_mapping(Cost, order["cost"])))
    elif order["do"] == TIME:
        bench.epoch_seconds()
    else:
        assert order["do"] == RECOVER
        bench.recover(
            bench.unpack(order["model"]),
            Plan.from_json(order["plan"]),
            order["epochs"],
            folder.joinpath(*order["folder"]),
            is_final=order["is_final"],
            tuning=Tuning.from_json(order["tuning"]),
            wanted=order["wanted"],
        )


def _open(team: Team, job: Job, open_job: Callable[[Job], Workbench[Any]]) -> Workbench[Any]:
    """What `open_job` makes of `job` with its data, with the reference of rank 0.

    Raises:
        Told: if it fails in another process; an error of this one's own comes as it is.
    """
    failure = None
    try:
        job = replace(job, data=job.open_data())  # not alone: it may ask which shard is its own
        with alone():
            bench = open_job(job)
    except Exception as error:
        failure = error
    rank = team.context.rank
    told = team.context.gather(None if failure is None else asdict(Failure.of(failure, rank)))
    if failure is not None:
        raise failure
    for each in told:
        if each is not None:
            raise Told(Failure(**each))
    bench.meet(team.context)
    return bench


def _open_same(
    framework: Framework, job: Job, folder: Path, recipe: Mapping[str, Any]
) -> Workbench[Any]:
    """The job, opened to be trained with."""
    own = job.config.recipe()
    differing = [name for name in own if own[name] != recipe[name]]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"The configuration differs from that of rank 0: {name} is {own[name]!r} here and "
            f"{recipe[name]!r} there. Give all processes the same."
        )
    return framework.open(job, folder, Progress(enabled=False))


def _check_executor(config: Config, world_size: int) -> None:
    if config.executor.kind != "inline":
        raise ConfigError(
            f"executor={config.executor.kind!r} makes each variant in one process, and this script "
            f"was started in {world_size}. Start it with `python`, or write executor='inline'."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Log lines of rank 0 are enough."""
    package = logging.getLogger(ROOT)
    before = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(before)
