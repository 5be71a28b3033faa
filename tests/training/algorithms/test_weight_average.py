from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressor.training import Algorithm, Event, State
from compressor.training.algorithms import WeightAverage
from compressor.training.callbacks import KeepBest
from tests.training.helpers import accuracy, are_equal, make_trainer, weights_of


class Noting(Algorithm):
    events = frozenset({Event.AFTER_STEP})

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.weights.append(weights_of(state.model))


def test_the_average_is_the_recursion_written_out_and_is_kept() -> None:
    noting = Noting()
    trainer = make_trainer(algorithms=[noting, WeightAverage(0.8, period=2)])
    average = weights_of(trainer.model)
    trainer.fit()
    for step, weights in enumerate(noting.weights, start=1):
        decay = 0.8 * (1 - math.exp(-step / 2))
        for name, value in weights.items():
            if value.is_floating_point():
                average[name] = decay * average[name] + (1 - decay) * value
            else:
                average[name] = value
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value, average[name])


def test_it_is_evaluated_and_training_goes_on_with_the_other_weights() -> None:
    evaluated: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(weights_of(model))
        return accuracy(model)

    def train(with_average: bool) -> tuple[Noting, KeepBest]:
        noting, best = Noting(), KeepBest("accuracy")
        algorithms = [noting, *([WeightAverage(0.5, period=1)] if with_average else [])]
        make_trainer(
            algorithms=algorithms, callbacks=[best], evaluate=evaluate, max_duration="3ep"
        ).fit()
        return noting, best

    plain, _ = train(with_average=False)
    evaluated.clear()
    averaged, best = train(with_average=True)
    assert all(are_equal(a, b) for a, b in zip(plain.weights, averaged.weights, strict=True))
    assert not are_equal(evaluated[0], averaged.weights[3])
    restored = make_trainer().model
    best.restore(restored)
    assert any(are_equal(weights_of(restored), weights) for weights in evaluated)
