"""Fits that will not come to what is wanted of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from compressor.errors import MetricError
from compressor.training import Trainer
from compressor.training.callbacks import LearningCurveStopping
from compressor.training.callbacks.learning_curve import reachable_value
from tests.training.helpers import are_equal, cross_entropy, make_trainer, weights_of

# Accuracy (%) before and after each epoch: recoveries of CIFAR-10's ResNet-20 on 5,085 images,
# SGD, warm-up and cosine; `n` blocks removed or all widths cut, and the highest rate.
RECORDED = {
    "1 block, 0.02": [60.08, 75.12, 81.12, 83.68, 83.28, 85.55, 86.04, 86.04, 86.04],
    "3 blocks, 0.02": [48.97, 68.73, 77.38, 80.33, 81.51, 82.99, 83.19, 83.09, 83.68],
    "4 blocks, 0.02": [38.25, 66.18, 74.24, 77.38, 79.74, 81.02, 81.02],
    "width 0.6, 0.02": [49.56, 72.96, 81.12, 80.33, 83.48, 84.56, 85.05, 85.35, 85.74],
    "width 0.4, 0.02": [11.01, 38.35, 52.02, 61.46, 67.85, 71.29, 71.09],
    "1 block and width 0.75, 0.05": [
        *(50.93, 65.29, 74.34, 72.76, 76.2, 78.76, 82.4, 85.05, 85.94, 86.53, 86.43),
    ],
}


def points(values: list[float]) -> list[tuple[float, float]]:
    return [(number / (len(values) - 1), value) for number, value in enumerate(values)]


@pytest.mark.parametrize("values", RECORDED.values(), ids=RECORDED)
def test_no_recorded_curve_went_past_what_was_thought_reachable(values: list[float]) -> None:
    curve = points(values)
    guesses = [reachable_value(curve[: seen + 1]) for seen in range(len(curve) - 1)]
    known = [guess for guess in guesses if guess is not None]
    assert len(known) == len(values) - 1 - (len(values)) // 2
    assert min(known) >= max(values)
    assert known[-1] < 92  # not so generous as to tell nothing


def test_the_guess_is_the_best_and_twice_what_was_won_and_lost_of_late() -> None:
    curve = points([10.0, 40.0, 50.0, 55.0, 54.0, 56.0, 57.0, 57.0, 57.0])
    assert reachable_value(curve[:4]) is None
    assert reachable_value(curve[:5]) == 55 + 2 * (55 - 10 + 1)  # half of the fit: all of it
    assert reachable_value(curve[:7]) == 57 + 2 * (3 + 1)  # epochs 3 to 6, as three are the least
    assert reachable_value(curve[:8]) == 57 + 2 * 2  # one step is left, as good as the best
    doubled = [(at / 2 + 0.5, value) for at, value in curve[:3]]
    assert reachable_value(doubled) is None  # too few to tell


def test_less_is_better_for_some_metrics() -> None:
    curve = points([9.0, 5.0, 4.0, 4.1, 3.0, 2.9])
    mirrored = [(at, -value) for at, value in curve]
    assert reachable_value(curve[:5], "min") == -reachable_value(mirrored[:5])  # type: ignore[operator]


def trainer_of(
    values: list[float], stopping: LearningCurveStopping, epochs: int = 8, **options: object
) -> Trainer:
    """A fit whose evaluations give `values`, one before it and one after each epoch."""
    given = iter(values)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": next(given)}

    return make_trainer(
        evaluate=evaluate, callbacks=[stopping], max_duration=f"{epochs}ep", **options
    )


FLAT = [50.0, 80.0, 85.0, 87.0, 88.0, 88.1, 88.2, 88.3, 88.4]


def fitted(wanted: float, values: list[float] = FLAT) -> Trainer:
    trainer = trainer_of(values, LearningCurveStopping("accuracy", wanted))
    trainer.eval()
    trainer.fit()
    return trainer


def test_a_hopeless_fit_is_stopped_with_a_sentence() -> None:
    trainer = fitted(wanted=91.6)
    assert trainer.state.clock.epoch == 6
    assert trainer.state.stop_reason == (
        "accuracy 88.2 rises by 0.4 an epoch, 91.6 is out of reach"
    )


def test_a_fit_that_may_come_there_goes_on() -> None:
    assert fitted(wanted=88.4).state.clock.epoch == 8
    assert fitted(wanted=88.4).state.stop_reason == ""


def test_a_metric_that_falls_again_is_said_to() -> None:
    trainer = fitted(wanted=85.0, values=[80.0, 81.0, 82.0, 82.5, 82.0, 81.9, 81.8, 81.7, 81.6])
    assert "81.9 has stayed or fallen of late" in trainer.state.stop_reason


def test_nan_is_no_point_of_the_curve() -> None:
    nan = float("nan")
    trainer = fitted(wanted=91.6, values=[50.0, 80.0, nan, 87.0, nan, 88.1, 88.2, 88.3, 88.4])
    assert trainer.state.clock.epoch == 7


def test_a_loss_has_to_come_down() -> None:
    values = [5.0, 2.0, 1.5, 1.3, 1.2, 1.19, 1.18, 1.17, 1.16]
    trainer = trainer_of(values, LearningCurveStopping("accuracy", 0.6, mode="min"))
    trainer.eval()
    trainer.fit()
    assert trainer.state.clock.epoch == 6
    assert "1.18 falls by 0.04 an epoch, 0.6 is out of reach" in trainer.state.stop_reason


def test_a_metric_that_no_evaluation_gives_is_an_error() -> None:
    trainer = trainer_of(FLAT, LearningCurveStopping("acuracy", 99.0))
    with pytest.raises(MetricError, match="'acuracy'"):
        trainer.eval()


class Killed(Exception):
    """As by a signal."""


@pytest.mark.parametrize("killed_in", [3, 5, 6])
def test_a_resumed_fit_ends_at_the_same_epoch_with_the_same_weights(
    tmp_path: Path, killed_in: int
) -> None:
    whole = fitted(wanted=91.6)
    steps = itertools.count()

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        if next(steps) == 4 * killed_in - 2:  # four batches an epoch
            raise Killed
        return cross_entropy(model, batch)

    def stopping() -> LearningCurveStopping:
        return LearningCurveStopping("accuracy", 91.6)

    interrupted = trainer_of(FLAT, stopping(), step=step, save_dir=tmp_path)
    interrupted.eval()
    with pytest.raises(Killed):
        interrupted.fit()
    resumed = trainer_of(FLAT[killed_in:], stopping(), save_dir=tmp_path)
    assert resumed.resume()
    resumed.fit()
    assert resumed.state.clock.epoch == whole.state.clock.epoch == 6
    assert resumed.state.stop_reason == whole.state.stop_reason
    assert are_equal(weights_of(resumed.model), weights_of(whole.model))


def test_a_fit_that_was_stopped_stays_so_when_it_is_run_again(tmp_path: Path) -> None:
    first = trainer_of(FLAT, LearningCurveStopping("accuracy", 91.6), save_dir=tmp_path)
    first.eval()
    first.fit()
    again = trainer_of([], LearningCurveStopping("accuracy", 91.6), save_dir=tmp_path)
    assert again.resume()
    again.fit()
    assert again.state.stop_reason == first.state.stop_reason != ""
    assert again.state.clock.epoch == 6
