from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.describe import diff, rebuild
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms import GyroDropout
from compressor.training.algorithms.gyro_dropout import (
    GyroDropoutLayer,
    advance_gyro_dropout,
    apply_gyro_dropout,
    gyro_dropout,
    gyro_phase,
)
from tests.training.helpers import make_model, make_trainer


def masks_of(layer: GyroDropoutLayer, samples: int = 8) -> Tensor:
    return layer(torch.ones(samples, 64))  # type: ignore[no-any-return]


def test_a_batch_is_divided_among_the_masks() -> None:
    x = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    dropped = gyro_dropout(x, p=0.25, tau=3, seed=1)
    factor = dropped / x
    assert bool(((factor == 0) | ((factor - 4 / 3).abs() < 1e-5)).all())
    for first in (0, 2, 4):
        torch.testing.assert_close(factor[first], factor[first + 1])
    assert not torch.equal(factor[0], factor[2])
    assert torch.equal(gyro_dropout(x, 0.25, 3, seed=1), dropped)
    assert not torch.equal(gyro_dropout(x, 0.25, 3, seed=2), dropped)
    assert gyro_dropout(x[:0], 0.25, 3, seed=1).shape == (0, 5, 7)


def test_entries_are_dropped_as_often_as_asked_and_the_mean_is_kept() -> None:
    dropped = gyro_dropout(torch.ones(16, 10_000), p=0.3, tau=16, seed=0)
    # 4 standard deviations of a mean of 160,000 draws
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.007)
    assert not gyro_dropout(torch.ones(2, 9), p=1.0, tau=1, seed=0).any()


def test_batches_smaller_than_the_masks_take_some_of_them() -> None:
    whole = gyro_dropout(torch.ones(4, 64), p=0.5, tau=4, seed=0)
    assert torch.equal(gyro_dropout(torch.ones(2, 64), p=0.5, tau=4, seed=0), whole[::2])


def test_masks_stay_for_a_phase_and_are_others_in_the_next() -> None:
    layer = GyroDropoutLayer(sigma=8, tau=2)
    model, seen = nn.Sequential(layer), []
    for batch in range(16):
        advance_gyro_dropout(model, batch / 16)
        seen.append(masks_of(layer))
    for batch in range(15):
        is_within_a_phase = batch // 4 == (batch + 1) // 4
        assert torch.equal(seen[batch], seen[batch + 1]) is is_within_a_phase
    subnetworks = {tuple(mask.tolist()) for masks in seen for mask in masks}
    assert len(subnetworks) == 8  # sigma


def test_each_subnetwork_is_trained_as_long_as_any() -> None:
    phases = [gyro_phase(batch / 100, sigma=20, tau=4) for batch in range(100)]
    assert [phases.count(phase) for phase in range(5)] == [20] * 5
    assert gyro_phase(0.5, sigma=3, tau=2) == 0


def test_layers_differ_and_in_evaluation_the_model_is_the_one_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.25))
    x = torch.randn(8, 4)
    expected = model.eval()(x)
    assert apply_gyro_dropout(model, sigma=8, tau=2) == surgery.Edit()
    assert not model[1].training
    assert torch.equal(model(x), expected)
    first, second = model.train()[1], model[3]
    assert (first.p, second.p) == (0.5, 0.25)
    assert not torch.equal(masks_of(first) == 0, masks_of(second) == 0)


def test_done_twice_is_done_once_and_other_dropouts_stay() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5))
    apply_gyro_dropout(model, p=0.1)
    layers = list(model)
    apply_gyro_dropout(model, p=0.2)
    assert [type(layer).__name__ for layer in model] == [
        "GyroDropoutLayer",
        "Dropout2d",
        "AlphaDropout",
    ]
    assert all(a is b for a, b in zip(layers, model, strict=True))
    assert model[0].p == 0.1


def test_the_structure_is_rebuilt_from_a_file_with_its_masks() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    apply_gyro_dropout(model, sigma=8, tau=2, seed=3)
    advance_gyro_dropout(model, 0.6)
    new = rebuild(nn.Sequential(nn.Dropout(0.5)), diff(nn.Sequential(nn.Dropout(0.5)), model))
    assert torch.equal(masks_of(new.train()[0]), masks_of(model[0]))


class Noting(Algorithm):
    """Writes down the phase of a layer."""

    events = frozenset({Event.AFTER_LOSS})

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.phases: list[int] = []

    def on(self, event: Event, state: State) -> None:
        self.phases.append(state.model[self.layer].phase)  # type: ignore[index]


def test_a_training_goes_through_all_phases_by_the_clock() -> None:
    noting = Noting(3)
    gyro = GyroDropout(sigma=8, tau=2)
    trainer = make_trainer(make_model(dropout=0.5), algorithms=[gyro, noting], max_duration="2ep")
    trainer.fit()
    assert noting.phases == [0, 0, 1, 1, 2, 2, 3, 3]
    trainer.fit("2ep")  # half of the longer whole has passed
    assert noting.phases[8:] == [2, 2, 2, 2, 3, 3, 3, 3]


def test_the_seed_decides() -> None:
    def seeds(seed: int) -> int:
        trainer = make_trainer(make_model(dropout=0.5), algorithms=[GyroDropout()], seed=seed)
        value: int = trainer.model[3].seed
        return value

    assert seeds(0) == seeds(0) != seeds(1)


@pytest.mark.parametrize(
    "options", [{"p": 1.0}, {"p": -0.1}, {"sigma": 4, "tau": 5}, {"sigma": 4, "tau": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    named = f"{list(options)[-1]}={list(options.values())[-1]}"
    with pytest.raises(ConfigError, match=named):
        GyroDropout(**options)
    with pytest.raises(ConfigError, match=named):
        apply_gyro_dropout(nn.Dropout(), **options)


def test_nothing_to_replace_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"has no nn\.Dropout"):
        apply_gyro_dropout(nn.Sequential(nn.Linear(2, 2)))
