"""Deepsearch: plans of other shapes and fine-tunes of other settings, one at a time, by Optuna.

What settings are worth is the damage that they reach: at which their drop would be just what is
allowed, if drop were proportional to damage. That is one number for trials at different damages,
and Optuna's Gaussian process models it over all settings together. Damage follows by rule: the best
settings are tried at the damage that they reach, and then others there, where they show at once
whether they are better. Of a dozen trials this makes more than twice of what random ones at random
damages do (docs/search.md).

A question is a function of the seed and of what was told before it. The samplers of Optuna have a
state, so each question has a sampler of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compressor.result import VariantRecord, digest
from compressor.search.goal import Goal
from compressor.search.trials import Trials, failure, quiet, require_optuna
from compressor.search.tuning import Tuning
from compressor.seeding import derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["IN_TWO_STEPS", "ORDERS", "DeepSearch", "Question", "require_optuna"]

ORDERS = ("at_once", "in_two_steps")
IN_TWO_STEPS = ORDERS[1]
IMPORTANCES = ("taylor", "l2", "fpgm", "activation")  # unlike each other
SCHEDULERS = ("cosine", "linear")
CONFIGURED = Tuning(1.0, 0.9, 2.0, "cosine")  # the defaults of `config.DistillationConfig`
DAMAGES = (0.5, 4.0)  # times the center: what other settings could make of it
LR_FACTORS = (0.2, 3.0)
DISTILLATION_WEIGHTS = (0.5, 1.0)
TEMPERATURES = (1.0, 8.0)
STARTUP = 5  # trials before the model is asked; drawn at random, but for the first
MARGIN = 0.97  # of the damage that settings reach, where they are tried
GAIN = 1.05  # times the damage that held: settings that reach less are not worth a trial
STEP = 1.02  # times the damage that the best reach: there others are tried
LARGEST_STEP = 1.3  # but not further than this from the damage that held
STEPS = (0.25, 2.0)  # proportionality is not believed further than this
SAME = 1.03  # a ratio of damages below this is none


@dataclass(frozen=True)
class Question:
    """What to try.

    Attributes:
        number: of Optuna's trial; the first search's variants count as well.
        damage: limit of the allocation.
        importance: criterion that ranks channels.
        order: "at_once"; or "in_two_steps", half of the damage first, recovered, then the rest.
        tuning: how the fine-tune differs from what is configured.
    """

    number: int
    damage: float
    importance: str
    order: str
    tuning: Tuning


class _Told(NamedTuple):
    """Parameters, and the drop as a fraction of what is allowed; None if it failed."""

    params: Mapping[str, Any]
    drop_fraction: float | None

    @property
    def damage(self) -> float:
        return float(self.params["damage"])

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.params.items() if name != "damage"}

    @property
    def reached(self) -> float:
        """The damage at which the drop would be what is allowed; the least, if it failed."""
        drop = math.inf if self.drop_fraction is None else self.drop_fraction
        least, most = STEPS
        return self.damage * (min(max(1 / drop, least), most) if drop > 0 else most)


class DeepSearch:
    """Ask for settings, tell the variant that they made; `close` at the end.

    All variants, those of the first search included, become trials of a study of Optuna in the
    file; a process that starts again asks the same questions in the same order, whatever came of
    the last one.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        goal: Goal,
        *,
        seed: int,
        center: float,
        importance: str,
        known: Sequence[VariantRecord],
        allowed: float | None = None,
        configured: Tuning = CONFIGURED,
    ) -> None:
        """Record what is known.

        Args:
            path: file of the run's study.
            name: begins the name of Optuna's study; goes on with what it is about.
            goal: what counts as good.
            seed: of what is drawn.
            center: damage that held, above 0.
            importance: criterion that is configured.
            known: variants of the first search, in their order.
            allowed: drop that a trial may have, above 0; None is `goal.delta`. A short fine-tune
                that promises to hold after a full one may drop further.
            configured: what a field of `Tuning` that says nothing stands for.

        Raises:
            MissingDependencyError: without the extra "deepsearch".
            StudyError: if the file cannot be written.
        """
        require_optuna()
        self._goal, self._seed = goal, seed
        self._allowed = goal.delta if allowed is None else allowed
        self._range = (DAMAGES[0] * center, DAMAGES[1] * center)
        self._space = _space(self._range, importance, configured)
        self._first: dict[str, Any] = {
            "damage": center,
            "importance": importance,
            "order": ORDERS[0],
            "lr_factor": configured.lr_factor,
            "distillation_weight": _clamp(configured.distillation_weight, DISTILLATION_WEIGHTS),
            "temperature": _clamp(configured.temperature, TEMPERATURES),
            "scheduler": configured.scheduler,
        }
        ids = [record.id for record in known]
        about = [goal.resources, goal.delta, self._allowed, seed, self._first, ids]
        self._trials = Trials(path, f"{name}, delta {goal.delta:g} ({digest(about)[:6]})", goal)
        for number, record in enumerate(known):
            self._add(number, record)
        self._number = len(known)
        low, high = self._range
        self._told = [
            self._learn({**self._first, "damage": record.predicted["damage"]}, record)
            for record in known
            if _is_like_the_first(record) and low <= record.predicted["damage"] <= high
        ]

    def close(self) -> None:
        """Let go of the file."""
        self._trials.close()

    def __enter__(self) -> DeepSearch:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the file."""
        self.close()

    def ask(self) -> Question:
        """The next question; the same one until it is answered.

        The first is the configured settings at the center, unless the first search had tried that.
        """
        params = self._trials.params(self._number)
        if params is None:
            params = self._next()
            self._trials.begin(self._number, params, self._space)
        return self._question(params)

    def tell(self, question: Question, record: VariantRecord) -> None:
        """Say which variant the last question made; a failed one teaches to keep away from it."""
        assert question.number == self._number, "answer the last question"
        params = self._trials.params(self._number)
        assert params is not None, "ask before you tell"
        self._trials.finish(self._number, record)
        self._told.append(self._learn(params, record))
        self._number += 1

    def _next(self) -> dict[str, Any]:
        if not self._is_told(self._first):
            return self._first
        best = max(self._told, key=lambda told: told.reached)
        reached = self._in_range(MARGIN * best.reached)
        held = max((t.damage for t in self._told if _holds(t)), default=0.0)
        promising = {**best.settings, "damage": reached}
        if reached > GAIN * held and not self._is_told(promising):
            return promising
        if held:
            reached = STEP * max(held, min(reached, LARGEST_STEP * held))
        return {**self._sample(), "damage": self._in_range(reached)}

    def _in_range(self, damage: float) -> float:
        return _clamp(damage, self._range)

    def _is_told(self, params: Mapping[str, Any]) -> bool:
        asked = _Told(params, None)
        return any(
            told.settings == asked.settings
            and abs(math.log(told.damage / asked.damage)) < math.log(SAME)
            for told in self._told
        )

    def _question(self, params: dict[str, Any]) -> Question:
        """A field of the tuning that is as configured is left to the configuration."""
        changed = {
            name: value
            for name, value in params.items()
            if name in Tuning.__dataclass_fields__ and value != self._first[name]
        }
        return Question(
            self._number,
            params["damage"],
            params["importance"],
            params["order"],
            Tuning(**changed),
        )

    def _sample(self) -> dict[str, Any]:
        """Settings that may reach further than those that were told."""
        import optuna

        seed = derive_seed(self._seed, "deepsearch", self._number) % 2**32
        sampler = optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False
        )
        space = {name: values for name, values in self._space.items() if name != "damage"}
        with quiet():
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for told in self._told:
                study.add_trial(
                    optuna.trial.create_trial(
                        params=told.settings, distributions=space, value=math.log(told.reached)
                    )
                )
            return dict(study.ask(space).params)

    def _learn(self, params: Mapping[str, Any], record: VariantRecord) -> _Told:
        if failure(self._goal, record):
            return _Told(params, None)
        return _Told(params, self._goal.drop(record) / self._allowed)

    def _add(self, number: int, record: VariantRecord) -> None:
        """A variant of the first search, with the parameters that it had."""
        from optuna.distributions import FloatDistribution

        params: dict[str, Any] = {}
        space: dict[str, BaseDistribution] = {}
        damage = record.predicted.get("damage", 0.0)
        if damage > 0:  # on a logarithmic scale
            if _is_like_the_first(record):
                params, space = dict(self._first), dict(self._space)
            low, high = (min(self._range[0], damage), max(self._range[1], damage))
            params["damage"] = damage
            space["damage"] = FloatDistribution(low, high, log=True)
        self._trials.add(number, record, params, space)


def _space(
    damages: tuple[float, float], importance: str, configured: Tuning
) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    importances = dict.fromkeys((importance, *IMPORTANCES))
    schedulers = dict.fromkeys((configured.scheduler, *SCHEDULERS))
    return {
        "damage": FloatDistribution(*damages, log=True),
        "importance": CategoricalDistribution(tuple(importances)),
        "order": CategoricalDistribution(ORDERS),
        "lr_factor": FloatDistribution(*LR_FACTORS, log=True),
        "distillation_weight": FloatDistribution(*DISTILLATION_WEIGHTS),
        "temperature": FloatDistribution(*TEMPERATURES, log=True),
        "scheduler": CategoricalDistribution(tuple(schedulers)),
    }


def _clamp(value: float | None, bounds: tuple[float, float]) -> float:
    assert value is not None, "what is configured is known"
    return min(max(value, bounds[0]), bounds[1])


def _holds(told: _Told) -> bool:
    return told.drop_fraction is not None and told.drop_fraction <= 1


def _is_like_the_first(record: VariantRecord) -> bool:
    """Cut at once from the reference and trained for a short time as configured."""
    return (
        record.epochs > 0
        and record.predicted.get("damage", 0.0) > 0
        and not (record.is_final or record.start or record.base or record.tuning)
    )
