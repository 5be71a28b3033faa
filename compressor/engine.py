"""The engine: `Engine.run` is the whole story, one named step a line."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.config import Config
from compressor.errors import StudyError
from compressor.files import write_text
from compressor.frameworks.base import Exported, Framework, Job, Judged, Workbench
from compressor.hardware import describe_machine
from compressor.interfaces.metrics import check_delta
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.result import (
    Certificate,
    Choice,
    Cost,
    Plan,
    Result,
    VariantRecord,
    digest,
    from_mapping,
)
from compressor.search.budget import Spending
from compressor.search.certificate import broken_limits, explain, make_certificate
from compressor.search.run_dir import RunDir, open_run_dir
from compressor.search.search import SEARCH_SHARE, Decide, Effort, Goal, Search, frontier
from compressor.search.sensitivity import sense
from compressor.search.space import Space
from compressor.search.strategy import DamageSearch
from compressor.search.variants import Variants
from compressor.seeding import isolated_rng

logger = get_logger(__name__)

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # a full or read-only disk
RESOURCES = {
    "compression": "size_bytes",
    "quantization": "size_bytes",
    "latency": "latency_ms",
    "macs": "macs",
}
TRIALS = {1: 4, 2: 8, 3: 12}  # by level
DEEPSEARCH_TRIALS = 4  # on top
MOST_TRIALS = 100
TRIAL_EPOCHS = 2  # where neither epochs nor minutes are given
FINAL_EPOCHS = 10
SENSE_UNTIL = 0.6  # fraction of the minutes that is left for the search
NUMBERS_SECONDS = 20.0  # at least, for what changes numbers alone
FINALISTS = 3  # where trials and not minutes end the search


class Engine:
    """Compresses one model for one target within one budget."""

    def __init__(
        self,
        framework: Framework,
        data: Mapping[str, Any],
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
        run is read.

        Args:
            dryrun: every step on two batches, in a temporary folder: shows what would fail.

        Raises:
            CompressorError: bad input, before any work; each says the way out.
        """
        if dryrun:
            with tempfile.TemporaryDirectory() as folder:
                return self._run(
                    Path(folder), replace(self._job, is_dryrun=True, config=_dry(self.config))
                )
        return self._run(Path(self.config.run_dir or "compressor_run"), self._job)

    def _run(self, folder: Path, job: Job) -> Any:
        with open_run_dir(folder) as run, Progress(job.config.progress) as progress:
            try:
                with isolated_rng(job.config.seed):
                    bench = self.framework.open(job, folder, progress)
                    self.result = self._compress(bench, job.config, run, progress)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Interrupted. What is done is saved: run again with run_dir={str(folder)!r} "
                    "to go on from it."
                ) from None
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise StudyError(
                    f"Writing to {str(folder)!r} failed: {error}. What was saved before is "
                    "intact; free space and start again with the same run_dir to go on."
                ) from error
        return self.result.model

    def _compress(
        self, bench: Workbench[Any], config: Config, run: RunDir, progress: Progress
    ) -> Result:
        key = digest([bench.job_digest(), _job_json(config)])
        if _is_finished(run, key):
            return _reload(bench, run)
        spending = Spending(
            config.budget.minutes, _trials(config), already_seconds=run.seconds(key)
        )
        with progress.task("check and profile the reference", total=None):
            bench.check()
            reference = _profile(bench, run)
        goal = _goal(config, reference)
        choices = bench.propose()
        strategy = _sense(bench, choices, goal, run, spending, progress)
        logger.info("%d choices are known after %.0f s", len(choices), spending.seconds)
        decide = run.decide(key, spending)
        recipe = {**config.recipe(), "job": bench.job_digest(), "metric": goal.key}
        variants = Variants(bench, run.study, run.variants, recipe)
        effort = _effort(config, bench, spending, decide)
        search = Search(
            goal,
            strategy,
            variants,
            spending,
            effort,
            is_number=bench.is_number,
            decide=decide,
            progress=progress,
        )
        best = search.run(Plan(tuple(c for c in choices if bench.is_number(c.technique))))
        logger.info("the search ended after %.0f s", spending.seconds)
        reason = explain(goal, best, reference.cost, search.records, choices=len(choices))
        best = None if reason else best
        plan = best.plan if best else Plan()
        model = variants.load(best) if best else bench.build(plan)
        with progress.task("export and certify", total=None):
            exported = bench.export(model, plan, run.exports)
        result = Result(
            model=model,
            certificate=_certify(bench, goal, reference, exported, config, search.records),
            variants=search.records,
            frontier=frontier(goal, search.records),
            artifacts=exported.artifacts,
            plan=plan,
            lost=tuple(bench.lost()),
            info={"seconds": spending.seconds, "config": config.to_json(), **describe_machine()},
            reason=reason,
            open_runtime=lambda: bench.runtime_model(exported.artifacts),
        )
        write_text(run.result, json.dumps({**result.to_json(), "key": key}, indent=1))
        return result


def _dry(config: Config) -> Config:
    """One trial of one epoch."""
    return replace(
        config,
        budget=replace(config.budget, trials=1, minutes=None),
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
    """What makes a run another one: all but where it is kept and how it is shown."""
    values = config.to_json()
    return {name: value for name, value in values.items() if name not in {"run_dir", "progress"}}


def _is_finished(run: RunDir, key: str) -> bool:
    """Whether this very run ended here, and its files are still there."""
    if not run.result.exists():
        return False
    values = json.loads(run.result.read_text())
    return values.get("key") == key and all(
        Path(path).exists() for path in values["artifacts"].values()
    )


def _reload(bench: Workbench[Any], run: RunDir) -> Result:
    """The finished result of this very job, with its model."""
    logger.info("run_dir %s holds this run, finished: nothing is done again", run.path)
    values = json.loads(run.result.read_text())
    artifacts = {name: Path(path) for name, path in values["artifacts"].items()}
    model = bench.load(artifacts["model_dir"])
    return Result.from_json(values, model, lambda: bench.runtime_model(artifacts))


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


def _goal(config: Config, reference: Judged) -> Goal:
    key = config.eval_key or next(iter(reference.metrics))
    is_larger_better = config.metric_mode == "max"
    check_delta(config.delta, key, reference.metrics[key], is_larger_better=is_larger_better)
    budget = config.budget
    limits = {"latency_ms": budget.latency_ms, "size_bytes": budget.size_bytes, "macs": budget.macs}
    return Goal(
        key=key,
        reference=reference.metrics[key],
        delta=config.delta,
        is_larger_better=is_larger_better,
        resource=RESOURCES[config.optimization],
        limits=tuple((name, bound) for name, bound in limits.items() if bound is not None),
    )


def _sense(
    bench: Workbench[Any],
    choices: Sequence[Choice],
    goal: Goal,
    run: RunDir,
    spending: Spending,
    progress: Progress,
) -> DamageSearch:
    """Damage and cost of every choice, as a problem to be searched."""
    # What changes numbers alone comes first: it must not be what the minutes do not suffice for.
    numbers = [choice for choice in choices if bench.is_number(choice.technique)]
    others = [choice for choice in choices if not bench.is_number(choice.technique)]
    until = spending.seconds + NUMBERS_SECONDS

    def damages(some: Sequence[Choice], has_time: Callable[[], bool]) -> dict[str, float]:
        return sense(
            some,
            bench.damage_of,
            path=run.damage,
            key=bench.digest(),
            has_time=has_time,
            progress=progress,
        )

    def is_early() -> bool:
        return spending.fraction_left > SENSE_UNTIL

    damage = damages(numbers, lambda: is_early() or spending.seconds < until)
    damage |= damages(others, is_early)
    choices = [choice for choice in choices if choice.key in damage]
    space = Space(choices, bench.effects(choices), bench.layers())
    limits = [(bench.layer_cost(name), bound) for name, bound in goal.limits]
    with progress.task(f"{goal.resource} of each layer", total=None):
        problem = space.problem(damage, bench.layer_cost(goal.resource), limits)
    return DamageSearch(problem, space, allowed_fraction=goal.delta_fraction)


def _certify(
    bench: Workbench[Any],
    goal: Goal,
    reference: Judged,
    exported: Exported,
    config: Config,
    records: Sequence[VariantRecord],
) -> Certificate:
    """What is claimed of the file to deploy."""
    # The judged split was looked at for the reference, for every variant, and for this file.
    looks = 1 if config.holdout else 2 + sum(record.looks for record in records)
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


def _trials(config: Config) -> int:
    """As many as are asked for; where the minutes decide, more than they allow."""
    if config.budget.trials is not None:
        return config.budget.trials
    if config.budget.minutes is not None:
        return MOST_TRIALS
    return TRIALS[config.level] + (DEEPSEARCH_TRIALS if config.deepsearch else 0)


def _effort(config: Config, bench: Workbench[Any], spending: Spending, decide: Decide) -> Effort:
    """Epochs as configured; where only minutes are given, as many as fit."""
    trial, final = config.fine_tuner.epochs, config.full_trainer.epochs
    if config.budget.minutes is None:
        return Effort(trial or TRIAL_EPOCHS, final or FINAL_EPOCHS, FINALISTS)
    fitting = decide("trial epochs", lambda: _fitting_epochs(config, bench, spending))
    return Effort(min(trial or fitting, fitting), final, MOST_TRIALS)


def _fitting_epochs(config: Config, bench: Workbench[Any], spending: Spending) -> int:
    seconds = spending.seconds_left * SEARCH_SHARE / TRIALS[config.level]
    return max(int(seconds / bench.epoch_seconds()), 1)
