"""The variants of a run as Optuna's trials, in the file of the study: its dashboard shows them.

Optuna's tables lie beside those of `Study`. A trial is in the file before work on it begins, so
that a process that is killed asks the same again; it is finished by its record.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import StudyError
from compressor.optional import require
from compressor.result import VariantRecord
from compressor.search.goal import Goal

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

EXTRA = "deepsearch"


def require_optuna() -> None:
    """Check that what deepsearch needs is installed.

    Raises:
        MissingDependencyError: if it is not.
    """
    for module in ("optuna", "sqlalchemy"):
        require(module, extra=EXTRA)


class Trials:
    """The trials of one study of Optuna, numbered from 0; every cost and the drop are minimized."""

    def __init__(self, path: Path, name: str, goal: Goal) -> None:
        """Open or create the study `name` in the SQLite file at `path`.

        Raises:
            MissingDependencyError: without the extra "deepsearch".
            StudyError: if the file cannot be written.
        """
        require_optuna()
        import optuna

        self._path, self._goal = path, goal
        metrics = [*goal.resources, f"drop of {goal.key}"]
        with self._in_file():
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=["minimize"] * len(metrics),
                sampler=optuna.samplers.RandomSampler(seed=0),  # is never asked
                load_if_exists=True,
            )
            if self._study.metric_names != metrics:
                with warnings.catch_warnings():
                    # the method is experimental in Optuna 5; the dashboard reads what it writes
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    self._study.set_metric_names(metrics)

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def params(self, number: int) -> dict[str, Any] | None:
        """Parameters of that trial; None if it was not begun."""
        with self._in_file():
            trials = self._study.get_trials(deepcopy=False)
        return dict(trials[number].params) if number < len(trials) else None

    def begin(
        self, number: int, params: Mapping[str, Any], space: Mapping[str, BaseDistribution]
    ) -> None:
        """Add that trial, as running, unless it is there."""
        from optuna.trial import TrialState, create_trial

        if self.params(number) is None:
            trial = create_trial(
                state=TrialState.RUNNING, params=dict(params), distributions=dict(space)
            )
            with self._in_file():
                self._study.add_trial(trial)

    def finish(self, number: int, record: VariantRecord) -> None:
        """Say what came of that running trial; nothing if it is finished."""
        from optuna.trial import TrialState

        with self._in_file():
            frozen = self._study.get_trials(deepcopy=False)[number]
            if frozen.state.is_finished():
                return
            for key, value in self._attributes(record).items():
                self._storage.set_trial_user_attr(frozen._trial_id, key, value)
            for key, value in self._constraints(record).items():
                self._storage.set_trial_system_attr(frozen._trial_id, key, value)
            if failure(self._goal, record):
                self._study.tell(number, state=TrialState.FAIL)
            else:
                self._study.tell(number, self._values(record))

    def add(
        self,
        number: int,
        record: VariantRecord,
        params: Mapping[str, Any],
        space: Mapping[str, BaseDistribution],
    ) -> None:
        """Add a trial that is finished, unless it is there."""
        from optuna.trial import TrialState, create_trial

        if self.params(number) is not None:
            return
        is_failed = bool(failure(self._goal, record))
        trial = create_trial(
            state=TrialState.FAIL if is_failed else TrialState.COMPLETE,
            values=None if is_failed else self._values(record),
            params=dict(params),
            distributions=dict(space),
            user_attrs=self._attributes(record),
            system_attrs=self._constraints(record),
        )
        if trial.datetime_complete is not None:
            trial.datetime_start = trial.datetime_complete - timedelta(seconds=record.seconds)
        with self._in_file():
            self._study.add_trial(trial)

    def _values(self, record: VariantRecord) -> list[float]:
        costs = [float(getattr(record.cost, name)) for name in self._goal.resources]
        return [*costs, self._goal.drop(record)]

    def _constraints(self, record: VariantRecord) -> dict[str, Any]:
        """Above 0 where a bound is broken: delta first. Such trials are drawn pale.

        In the form of Optuna 4, which Optuna 5 reads as well, and its dashboard (0.21) alone.
        """
        if failure(self._goal, record):
            return {}
        excess = [float(getattr(record.cost, name) - bound) for name, bound in self._goal.limits]
        return {"constraints": [self._goal.drop(record) - self._goal.delta, *excess]}

    def _attributes(self, record: VariantRecord) -> dict[str, Any]:
        reason = failure(self._goal, record) or record.reason
        metrics = {key: value for key, value in record.metrics.items() if math.isfinite(value)}
        return {
            **metrics,
            "variant": record.id,
            "plan": record.plan.describe(),
            "epochs": record.epochs,
            "is_final": record.is_final,
            **({"reason": reason} if reason else {}),
        }

    @contextmanager
    def _in_file(self) -> Iterator[None]:
        """Optuna at work: quiet, and its troubles with the file as our error."""
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            with quiet():
                yield
        except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            raise StudyError(
                f"The trials of deepsearch in {self._path} could not be read or written: {error}. "
                "Free space, close other programs that write to the file, and start again with "
                "the same run_dir to go on."
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing on stderr but errors; how much it said is put back."""
    from optuna import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def failure(goal: Goal, record: VariantRecord) -> str:
    """Why there is nothing to learn from the numbers of `record`; "" if there is."""
    if record.status != "done" or record.cost is None:
        return record.reason or "failed"
    if not math.isfinite(goal.drop(record)):
        return f"{goal.key} is {record.metrics[goal.key]}"
    return ""
