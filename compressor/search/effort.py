"""How much is spent on a run: trials, epochs, passes; as the configuration says, or as fits."""

from __future__ import annotations

from collections.abc import Callable

from compressor.config import Config
from compressor.search.attempts import Decide
from compressor.search.budget import Spending
from compressor.search.eta import usual_epochs
from compressor.search.finishing import Effort
from compressor.search.search import SEARCH_SHARE
from compressor.search.tuning import Tuning

TRIALS = {1: 4, 2: 8, 3: 12}  # by level
DEEPSEARCH_TRIALS = 8  # on top
MOST_TRIALS = 100
TRIAL_EPOCHS = 2  # where neither epochs nor minutes are given
FINAL_EPOCHS = 10
FINALISTS = 3  # where trials and not minutes end the search


def count_trials(config: Config) -> int:
    """As many as are asked for; where the minutes decide, more than they allow."""
    if config.budget.trials is not None:
        return config.budget.trials
    if config.budget.minutes is not None:
        return MOST_TRIALS
    return TRIALS[config.level] + _deep_trials(config)


def trials_limit(config: Config) -> int | None:
    """How many trials there can be; None where the minutes decide."""
    budget = config.budget
    is_timed = budget.trials is None and budget.minutes is not None
    return None if is_timed else count_trials(config)


def choose_effort(
    config: Config, spending: Spending, decide: Decide, epoch_seconds: Callable[[], float]
) -> Effort:
    """Epochs as configured; where only minutes are given, as many as fit."""
    trial, final = config.fine_tuner.epochs, config.full_trainer.epochs
    if config.budget.minutes is None:
        return Effort(
            TRIAL_EPOCHS if trial is None else trial,
            FINAL_EPOCHS if final is None else final,
            FINALISTS,
        )

    def fitting_epochs() -> int:
        seconds = spending.seconds_left * SEARCH_SHARE / TRIALS[config.level]
        return max(int(seconds / epoch_seconds()), 1)

    if trial != 0:
        fitting = decide("trial epochs", fitting_epochs)
        trial = fitting if trial is None else min(trial, fitting)
    return Effort(trial, final, MOST_TRIALS)


def expected_epochs(config: Config, effort: Effort) -> float:
    """That the search will train after its first trial."""
    passes = count_passes(config)
    is_timed = config.budget.minutes is not None
    deep_trials = _deep_trials(config)
    return usual_epochs(effort, count_trials(config), passes, deep_trials, is_timed=is_timed)


def count_passes(config: Config) -> int:
    """Of the search, without deepsearch; for all objectives together, and for each alone."""
    objectives = len(config.also_optimize)
    return config.level + (objectives + 1 if objectives else 0)


def configured_tuning(config: Config) -> Tuning:
    """How trials are trained, for deepsearch to depart from."""
    settings = config.fine_tuner
    distillation = settings.distillation
    return Tuning(
        1.0,
        distillation.weight if distillation else 0.0,
        distillation.temperature if distillation else 1.0,
        "cosine" if settings.scheduler is None else "configured",
    )


def _deep_trials(config: Config) -> int:
    return DEEPSEARCH_TRIALS if config.deepsearch else 0
