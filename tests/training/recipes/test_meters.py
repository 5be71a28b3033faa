from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError, MetricError
from compressor.training.recipes import (
    AccAvg,
    ConfusionMatrix,
    EpochMetricAvg,
    ExponentialMetricAvg,
    Log,
    Recipe,
    Throughput,
    WindowedMetricAvg,
    recipe,
)
from tests.training.recipes.helpers import After, Spy

NUMBERS = [3.0, 1.0, 4.0, 1.0]
SIZES = [2, 2, 2, 1]
BATCHES = [torch.full((size,), number) for size, number in zip(SIZES, NUMBERS, strict=True)]


def run_number(callback: Any, epochs: int = 1) -> tuple[Recipe, list[Any]]:
    """The metric "number" after each batch, where there is one, and after each epoch."""
    loop = recipe(lambda batch: {"number": batch[0]}, BATCHES)
    spy = Spy(lambda state: state["metrics"].get("number"))
    loop.callbacks.add_callbacks([callback, spy])
    loop.run(epochs)
    ends = ("batch_end", "epoch_end")
    return loop, [value for hook, value in spy.seen if hook in ends]


def test_the_mean_of_an_epoch_weighs_by_samples() -> None:
    _, seen = run_number(EpochMetricAvg("number"), epochs=2)
    epoch = [3.0, (6 + 2) / 4, (6 + 2 + 8) / 6, (6 + 2 + 8 + 1) / 7]
    assert seen == pytest.approx([*epoch, epoch[-1], *epoch, epoch[-1]])


def test_an_average_may_be_posted_when_the_epoch_ends_only() -> None:
    _, seen = run_number(EpochMetricAvg("number", post_each_batch=False))
    assert seen == [None] * 4 + [pytest.approx(17 / 7)]


def test_the_mean_of_a_window_goes_across_epochs() -> None:
    _, seen = run_number(WindowedMetricAvg("number", 2), epochs=2)
    first, second = [3.0, 2.0, 2.5, 2.5], [2.0, 2.0, 2.5, 2.5]
    assert seen == [*first, 2.5, *second, 2.5]


def test_the_exponential_mean_is_the_weighted_mean_written_out() -> None:
    _, seen = run_number(ExponentialMetricAvg("number", beta=0.5))
    expected = [
        sum(0.5 ** (n - i) * NUMBERS[i] for i in range(n + 1)) / sum(0.5**i for i in range(n + 1))
        for n in range(4)
    ]
    assert seen == pytest.approx([*expected, expected[-1]])


def test_log_posts_the_number_as_it_is() -> None:
    loop, seen = run_number(Log("number"))
    assert seen == [*NUMBERS, NUMBERS[-1]]
    loop.callbacks.add_callbacks([Log("number", "renamed")])
    assert loop.run(2)["metrics"]["renamed"] == 1.0


@pytest.mark.parametrize("kind", [EpochMetricAvg, WindowedMetricAvg, ExponentialMetricAvg, Log])
def test_a_number_that_is_not_there_is_an_error_that_names_the_nearest(kind: Any) -> None:
    with pytest.raises(MetricError, match=r"no 'nunber'\. Did you mean 'number'"):
        run_number(kind("nunber"))


def test_a_tensor_of_several_numbers_is_an_error() -> None:
    loop = recipe(lambda batch: {"loss": torch.ones(2)}, BATCHES)
    loop.callbacks.add_callbacks([EpochMetricAvg("loss")])
    with pytest.raises(MetricError, match="'loss' is no number: Tensor"):
        loop.run(1)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="window=0"):
        WindowedMetricAvg("loss", 0)
    with pytest.raises(ConfigError, match="beta=1"):
        ExponentialMetricAvg("loss", 1)


SCORES = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0]])
LABELS = torch.tensor([0, 1, 1, 2])
PAIRS = [(SCORES[:3], LABELS[:3]), (SCORES[3:], LABELS[3:])]


def score(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"pred": batch[0]}


def test_accuracy_is_what_one_counts_by_hand() -> None:
    loop, seen = recipe(score, PAIRS), []
    loop.callbacks.add_callbacks([AccAvg(), AccAvg(2)])
    loop.callbacks.add_callbacks([After(lambda state: seen.append(dict(state["metrics"])))])
    loop.run(1)
    assert seen == [
        {"accuracy": 2 / 3, "top2_accuracy": 1.0},
        {"accuracy": 0.5, "top2_accuracy": 0.75},
    ]
    assert loop.run(2)["metrics"]["accuracy"] == 0.5  # each epoch anew


def test_accuracy_takes_mixed_targets_and_other_places() -> None:
    mixed = torch.nn.functional.one_hot(LABELS, 3).float() * 0.9
    loop = recipe(lambda batch: {"scores": batch["x"]}, [{"x": SCORES, "y": mixed}])
    loop.callbacks.add_callbacks([AccAvg(pred_key="scores", target_key="y")])
    assert loop.run(1)["metrics"]["accuracy"] == 0.5


def test_accuracy_of_pixels_counts_pixels() -> None:
    scores = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # (1, 2 classes, 1, 2 pixels)
    loop = recipe(score, [(scores, torch.tensor([[[0, 0]]]))])
    loop.callbacks.add_callbacks([AccAvg()])
    assert loop.run(1)["metrics"]["accuracy"] == 0.5


def test_accuracy_without_targets_in_the_batch_is_an_error() -> None:
    loop = recipe(lambda batch: {"pred": SCORES}, [(SCORES,)])
    loop.callbacks.add_callbacks([AccAvg()])
    with pytest.raises(DataError):
        loop.run(1)


def test_the_confusion_matrix_has_labels_in_rows() -> None:
    loop = recipe(score, PAIRS)
    loop.callbacks.add_callbacks([ConfusionMatrix(["a", "b", "c"])])
    state = loop.run(2)
    assert state["confusion"].tolist() == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    # F1 of each class: 2 / (2 + 1), 2 / (1 + 2), 0
    assert state["metrics"]["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_throughput_counts_samples_and_leaves_tests_out() -> None:
    times = iter([0.0, 1.0, 2.0, 13.0, 14.0])  # start of the epoch, then each end
    loop = recipe(lambda batch: None, BATCHES)

    def test(state: dict[str, Any]) -> None:
        if state["iters"] == 2:
            state["test_seconds"] = 10.0

    seen: list[float] = []
    loop.callbacks.add_callbacks(
        [
            Throughput(clock=lambda: next(times)),
            After(lambda state: seen.append(state["metrics"]["samples_per_second"])),
            After(test),
        ]
    )
    loop.run(1)
    assert seen == [2.0, 2.0, 2.0, 7 / 4]
