"""The engine: `Engine.run` is the whole story, one named step a line."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.config import BudgetConfig, Config
from compressor.distributed.launch import join
from compressor.errors import CheckpointError
from compressor.evidence import Sensed
from compressor.files import write_text
from compressor.frameworks.base import Exported, Framework, Job, Judged, Workbench
from compressor.frameworks.leading import Leader, follow, lead
from compressor.hardware import describe_machine
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import (
    Certificate,
    Cost,
    Plan,
    Result,
    VariantRecord,
    digest,
    from_mapping,
)
from compressor.search.attempts import Attempts
from compressor.search.budget import Spending
from compressor.search.certificate import broken_limits, make_certificate
from compressor.search.choosing import choose
from compressor.search.damage_map import DamageMap
from compressor.search.deepsearch import require_optuna
from compressor.search.effort import (
    choose_effort,
    configured_tuning,
    count_passes,
    count_trials,
    expected_epochs,
    trials_limit,
)
from compressor.search.eta import Eta
from compressor.search.finished import REPORT, read_finished, write_page
from compressor.search.goal import Goal, frontier, make_goal
from compressor.search.levels import Depth, Levels
from compressor.search.making import InlineMaker, Maker
from compressor.search.phases import Phases
from compressor.search.run_dir import RunDir, open_run_dir
from compressor.search.variants import Variants
from compressor.seeding import isolated_rng

logger = get_logger(__name__)


class Engine:
    """Compresses one model for one target within one budget."""

    def __init__(
        self,
        framework: Framework,
        data: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        model: Any,
        config: Mapping[str, Any] | Config | str | Path,
        forward_pass: Any = None,
        eval_func: Any = None,
        loss_function_cls: Any = None,
        loss_function_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the job; `run` does it. The configuration is read and checked here.

        Args:
            framework: `TorchFramework()`.
            data: split name to any iterable of batches; "train" and the evaluated split are needed.
                Or a function that returns this: it is called once in every process that works on
                the job, such as a worker of Ray, to which loaders that hold files cannot be sent.
            model: trained; never modified.
            config: a mapping, a `Config`, or the path of a YAML file.
            forward_pass: how a batch becomes a call of the model; default: the batch's first
                element is the input.
            eval_func: `(model, loader)` to a dict of metrics; default by the task type.
            loss_function_cls: instantiated by the engine with `loss_function_kwargs`; default by
                the task type.
            loss_function_kwargs: its keywords.

        Raises:
            ConfigError: if the configuration cannot be meant.
        """
        self.framework = framework
        self.config = _read(config)
        self.result: Result | None = None
        self._job = Job(
            data=data,
            model=model,
            config=self.config,
            forward_pass=forward_pass,
            eval_func=eval_func,
            loss_function_cls=loss_function_cls,
            loss_function_kwargs=loss_function_kwargs,
        )

    def run(self, dryrun: bool = False) -> Any:
        """The smallest or fastest model that keeps the metric within delta; `result` has the rest.

        A run directory that holds an interrupted run is gone on with; one that holds this finished
        run is read. Processes that torchrun or horovodrun has started train together; all else is
        done, and written, by rank 0, and all of them return the same.

        Args:
            dryrun: every step on two batches, in a temporary folder: shows what would fail.

        Raises:
            CompressorError: bad input, before any work; each says the way out.
        """
        job = self.job
        with ExitStack() as stack:
            if dryrun:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                job = replace(job, is_dryrun=True, config=_dry(self.config))
            else:
                folder = self._folder()
            processes = join(job.config.device, use_horovod=job.config.use_horovod)
            team = stack.enter_context(processes)
            if team.context.is_main:
                self.result = self._run(folder, job, stack.enter_context(lead(team)))
            else:
                self.result = follow(self.framework, job, team)
            return self.result.model

    def sense(self) -> tuple[Sensed, ...]:
        """The damage map alone: what each choice would cost in quality, and what it would save.

        Nothing is trained. What was measured stays in the run directory, and `run` reuses it.

        Raises:
            CompressorError: bad input; as `run`.
        """
        config, folder = self.config, self._folder()
        with (
            open_run_dir(folder) as run,
            Progress(config.progress) as progress,
            isolated_rng(config.seed),
        ):
            bench = self.framework.open(self.job, folder, progress)
            bench.check()
            reference = _profile(bench, run)
            goal = make_goal(config, reference.metrics, reference.cost)
            spending = Spending(config.budget.minutes, trials=0)
            damages = DamageMap(bench, bench.propose(), run.damage, run.study, spending, progress)
            damages.sense()
            return damages.sensed(goal)

    @property
    def job(self) -> Job:
        """What was handed in, with the configuration as it is now."""
        return replace(self._job, config=self.config)

    def _folder(self) -> Path:
        """Where the run is kept, whatever the working directory becomes."""
        return Path(self.config.run_dir or "compressor_run").absolute()

    def _run(self, folder: Path, job: Job, leader: Leader) -> Result:
        with open_run_dir(folder) as run, Progress(job.config.progress) as progress:
            try:
                with isolated_rng(job.config.seed):
                    bench = leader.open(self.framework, job, folder, progress)
                    return leader.end(bench, self._compress(bench, job.config, run, progress))
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Interrupted. What is done is saved: run again with run_dir={str(folder)!r} "
                    "to go on from it."
                ) from None

    def _compress(
        self, bench: Workbench[Any], config: Config, run: RunDir, progress: Progress
    ) -> Result:
        key = digest([bench.job_digest(), _job_json(config)])
        finished = _finished(bench, run, key)
        if finished is not None:
            return finished
        if config.deepsearch:
            require_optuna()
        spending = Spending(
            config.budget.minutes, count_trials(config), already_seconds=run.seconds(key)
        )
        with run.ticking(key, spending):
            return self._compress_in(bench, config, run, key, spending, progress)

    def _compress_in(
        self,
        bench: Workbench[Any],
        config: Config,
        run: RunDir,
        key: str,
        spending: Spending,
        progress: Progress,
    ) -> Result:
        phases = Phases(spending, progress)
        progress.tell(most_trials=trials_limit(config))
        phases.begin("check", "the run begins")
        with progress.task("check and profile the reference", total=None):
            bench.check()
            reference = _profile(bench, run)
        goal = make_goal(config, reference.metrics, reference.cost)

        phases.begin("sense", "the reference is known")
        choices = bench.propose()
        damages = DamageMap(bench, choices, run.damage, run.study, spending, progress)
        damages.sense()

        phases.begin("search", f"{len(choices)} choices are known")
        decide = run.decide(key)
        recipe = {**config.recipe(), "job": bench.job_digest(), "metric": goal.key}
        with _maker(bench, config, run) as maker:
            variants = Variants(bench, run.study, run.variants, recipe, maker)
            attempts = Attempts(
                goal, variants, decide, progress, known=run.known(key, variants, damages.holds)
            )
            effort = choose_effort(config, spending, decide, bench.epoch_seconds)
            eta = Eta(spending, expected_epochs(config, effort), progress)
            attempts.on_record = eta.tell
            depth = _depth(config, run, bench)
            levels = Levels(attempts, damages, spending, effort, depth, is_number=bench.is_number)
            best = levels.run()
        eta.end()
        records = attempts.records

        phases.begin("certify", "the search ended")
        with progress.task("export and certify", total=None):
            best, reason, (model, exported) = choose(
                goal,
                best,
                reference.cost,
                records,
                choices=len(choices),
                deploy=lambda record: _deploy(bench, variants, record, run.exports),
                cost=lambda deployed: deployed[1].judged.cost,
                say=attempts.say,
            )
        plan = best.plan if best else Plan()
        looks = run.count_looks(key, config.holdout or config.eval_split, config.holdout is None)
        certificate = _certify(bench, goal, reference, exported, config, looks)
        phases.end()
        result = Result(
            model=model,
            certificate=certificate,
            variants=records,
            frontier=frontier(goal, records),
            decisions=tuple(attempts.decisions),
            artifacts=_absolute({**exported.artifacts, REPORT: run.report}),
            plan=plan,
            lost=tuple(bench.lost()),
            info={
                "seconds": spending.seconds,
                "phases": phases.seconds,
                "eta_seconds": eta.seconds,
                "config": config.to_json(),
                "seed": config.seed,
                **describe_machine(),
            },
            reason=reason,
            damages=damages.sensed(goal),
            layers=tuple(bench.layer_rows(model, plan)),
            frozen=tuple(bench.frozen()),
            chosen=best.id if best else "",
            open_runtime=lambda: bench.runtime_model(exported.artifacts),
        )
        values = {**result.to_json(), "key": key}
        run.report.unlink(missing_ok=True)  # of an earlier run: a crash now must not leave it here
        write_text(run.result, json.dumps(values, indent=1))
        write_page(values, run.report)
        return result


def _dry(config: Config) -> Config:
    """One trial of one epoch for each pass of the search."""
    trials = count_passes(config) + config.deepsearch
    return replace(
        config,
        budget=BudgetConfig(trials=trials),
        export=replace(config.export, root_path=None),
        full_trainer=replace(config.full_trainer, epochs=1),
        fine_tuner=replace(config.fine_tuner, epochs=1),
    )


def _read(config: Mapping[str, Any] | Config | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, (str, Path)):
        return Config.from_yaml(config)
    return Config.from_dict(config)


def _job_json(config: Config) -> dict[str, Any]:
    """What makes a run another one: all but where it is kept, how it is shown, and who works."""
    values = config.to_json()
    decisive = {
        name: value
        for name, value in values.items()
        if name not in {"run_dir", "progress", "executor"}
    }
    return {**decisive, "workers": config.executor.workers}


def _finished(bench: Workbench[Any], run: RunDir, key: str) -> Result | None:
    """The result with its model, if this very run ended here and its files are still there."""
    if not run.result.exists():
        return None
    try:
        result, values = read_finished(run.result)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None
    files = {kind: path for kind, path in result.artifacts.items() if kind != REPORT}
    if values.get("key") != key or not all(path.exists() for path in files.values()):
        return None
    logger.info("run_dir %s holds this run, finished: nothing is done again", run.path)
    if not run.report.exists():  # it is made of what was read
        write_page(values, run.report)
    result.model = bench.load(files["model_dir"])
    result.open_runtime = lambda: bench.runtime_model(files)
    return result


def _absolute(artifacts: Mapping[str, Path]) -> dict[str, Path]:
    """The same files, wherever they are asked for from."""
    return {kind: path.absolute() for kind, path in artifacts.items()}


@contextmanager
def _maker(bench: Workbench[Any], config: Config, run: RunDir) -> Iterator[Maker]:
    """Who makes the variants: the workers that the configuration asks for, or this process."""
    with bench.workers(config.executor, run.variants) as workers:
        yield workers or InlineMaker(bench, run.variants, config.executor.workers)


def _profile(bench: Workbench[Any], run: RunDir) -> Judged:
    """The reference on the target; measured once a study."""
    question = f"reference {digest([bench.job_digest(), dict(bench.target())])}"
    known = run.study.fact(question)
    if known is None:
        judged = bench.baseline()
        known = {"metrics": dict(judged.metrics), "cost": judged.cost.to_json()}
        run.study.set_fact(question, known)
    reference = Judged(known["metrics"], from_mapping(Cost, known["cost"]))
    bench.use_baseline(reference)
    logger.info("reference: %s; %s", dict(reference.metrics), reference.cost.describe())
    return reference


def _deploy(
    bench: Workbench[Any], variants: Variants, record: VariantRecord | None, folder: Path
) -> tuple[Any, Exported]:
    """A variant, or the reference, and its files in place of those of another."""
    shutil.rmtree(folder, ignore_errors=True)
    model = variants.load(record) if record else bench.build(Plan())
    return model, bench.export(model, record.plan if record else Plan(), folder)


def _certify(
    bench: Workbench[Any],
    goal: Goal,
    reference: Judged,
    exported: Exported,
    config: Config,
    looks: int,
) -> Certificate:
    """What is claimed of the file to deploy."""
    return make_certificate(
        goal,
        reference.cost,
        exported.reference_metrics[goal.key],
        exported.judged,
        parity=exported.parity,
        agreement=exported.agreement,
        paired=exported.paired,
        target=bench.target(),
        looks=looks,
        split=config.holdout or config.eval_split,
        notes=(*exported.notes, *broken_limits(goal, exported.judged.cost)),
    )


def _depth(config: Config, run: RunDir, bench: Workbench[Any]) -> Depth:
    """How far the search goes."""
    return Depth(
        config.level,
        run.study.path if config.deepsearch else None,
        config.seed,
        config.importance,
        bench.reranked,
        configured_tuning(config),
    )
