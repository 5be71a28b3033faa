"""How a variant is trained: as configured, tuned, and not for longer than there is hope."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from compressor.config import Config, DistillationConfig, TrainerConfig
from compressor.errors import ConfigError
from compressor.frameworks.recovery import Recovery, tuned
from compressor.interfaces.data import DataLoaderView
from compressor.interfaces.optimizers import NativeOptimizerFactory, make_optimizer
from compressor.progress import Progress
from compressor.search.tuning import Recovered, Tuning
from compressor.training import DivergedError
from compressor.training.algorithms.distillation import distillation_loss
from tests.training.helpers import are_equal, make_dataset, make_loader, make_model, weights_of
from tests.training.test_sharding import OneOf

FLAT = [50.0, 80.0, 85.0, 87.0, 88.0, 88.1, 88.2, 88.3, 88.4]


class LinesTask:
    """Cross entropy of `make_model` on the batches of `make_loader`."""

    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


def recovery(
    values: Iterable[float] = range(1000),
    fine_tuner: Mapping[str, Any] | None = None,
    loop: Any = None,
    data: Iterable[Any] | None = None,
    task: Any = None,
) -> Recovery:
    """One whose evaluations give `values`."""
    given = iter(values)
    config = Config.from_dict({"delta": 1.0, "device": "cpu", "fine_tuner": dict(fine_tuner or {})})
    return Recovery(
        replace(config, external_training_loop=loop),
        "accuracy",
        task or LinesTask(),
        lambda: make_model(seed=1),
        {"train": DataLoaderView(make_loader() if data is None else data)},
        lambda model: {"accuracy": float(next(given))},
        Progress(enabled=False),
    )


def fitted(tmp_path: Path, epochs: int = 2, **options: Any) -> nn.Module:
    model = make_model()
    recovery().fit(model, epochs, tmp_path, is_final=False, **options)
    return model


def lr_of(settings: TrainerConfig) -> list[float]:
    model = nn.Linear(1, 1)
    return [group["lr"] for group in make_optimizer(settings.optimizer, model, 0.01).param_groups]


class TwoRates(NativeOptimizerFactory):
    def make(self, native_model: nn.Module) -> Optimizer:
        weight, bias = native_model.parameters()
        return SGD([{"params": [weight], "lr": 0.5}, {"params": [bias], "lr": 0.1}], lr=1.0)


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        (None, [0.005]),
        ({"momentum": 0.5}, [0.005]),
        ({"lr": 0.2}, [0.1]),
        ({"name": "SGD", "lr": 0.02}, [0.01]),
        ({"name": "Adam"}, [0.0005]),  # the default of torch
        (TwoRates(), [0.25, 0.05]),
    ],
)
def test_a_factor_halves_the_rate_however_it_was_given(optimizer: Any, rates: list[float]) -> None:
    settings = tuned(TrainerConfig(optimizer=optimizer), Tuning(lr_factor=0.5))
    assert lr_of(settings) == pytest.approx(rates)


def test_as_configured_is_as_configured() -> None:
    settings = TrainerConfig(optimizer={"name": "SGD", "lr": 0.02})
    assert tuned(settings, Tuning()) == settings


@pytest.mark.parametrize(
    ("configured", "tuning", "expected"),
    [
        (DistillationConfig(), Tuning(temperature=4.0), DistillationConfig(0.9, 0.1, 4.0)),
        (DistillationConfig(), Tuning(distillation_weight=0.75), DistillationConfig(0.75, 0.25)),
        (None, Tuning(distillation_weight=1.0), DistillationConfig(1.0, 0.0)),
        (None, Tuning(temperature=4.0), None),
        (DistillationConfig(), Tuning(distillation_weight=0.0), None),
    ],
)
def test_distillation_is_weighed_switched_on_and_off(
    configured: Any, tuning: Tuning, expected: Any
) -> None:
    assert tuned(TrainerConfig(distillation=configured), tuning).distillation == expected


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (Tuning(lr_factor=0.0), "lr_factor=0.0 trains nothing"),
        (Tuning(distillation_weight=1.5), "distillation_weight=1.5 is out of range"),
        (Tuning(temperature=0.0), "temperature=0.0 is out of range"),
        (Tuning(scheduler="cosin"), "no schedule 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, tuning: Tuning, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, tuning=tuning)


def test_a_fit_by_hand_gives_the_same_weights(tmp_path: Path) -> None:
    """Distillation alone at half the rate, which stays; without momentum, clipping or decay."""
    plain = {"name": "SGD", "lr": 0.2}
    config = {"optimizer": plain}
    tuning = Tuning(0.5, distillation_weight=1.0, temperature=3.0, scheduler="constant")
    model, by_hand, teacher = make_model(), make_model(), make_model(seed=1).eval()
    told = recovery(fine_tuner=config).fit(model, 10, tmp_path, is_final=False, tuning=tuning)
    assert told[:2] == (10, "")
    rates = [0.1 * min(0.1 + 0.9 * batch / 40 / 0.05, 1.0) for batch in range(40)]
    by_hand.train()
    for number, batch in enumerate(batch for _ in range(10) for batch in make_loader()):
        loss = distillation_loss(by_hand(batch[0]), teacher(batch[0]), temperature=3.0)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= rates[number] * gradient
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_schedules_by_name_differ_and_cosine_is_the_default(tmp_path: Path) -> None:
    names = (None, "cosine", "linear", "constant")
    weights = {
        name: weights_of(fitted(tmp_path / str(name), tuning=Tuning(scheduler=name)))
        for name in names
    }
    assert are_equal(weights[None], weights["cosine"])
    assert not are_equal(weights["linear"], weights["cosine"])
    assert not are_equal(weights["linear"], weights["constant"])


def test_no_epochs_are_no_fit(tmp_path: Path) -> None:
    model = make_model()
    before = weights_of(model)
    told = recovery([]).fit(model, 0, tmp_path / "fit", is_final=False, wanted=90.0)
    assert told == Recovered(0, "")
    assert are_equal(weights_of(model), before)
    assert not (tmp_path / "fit").exists()


def test_a_hopeless_fit_is_stopped_and_says_so(tmp_path: Path) -> None:
    told = recovery(FLAT).fit(make_model(), 8, tmp_path, is_final=False, wanted=91.6)
    assert told[:2] == (
        6,
        "stopped after 6 of 8 epochs: accuracy 88.2 rises by 0.4 an epoch, 91.6 is out of reach",
    )
    again = recovery([]).fit(make_model(), 8, tmp_path, is_final=False, wanted=91.6)
    assert again[:2] == told[:2]  # it was killed before anybody took note
    assert again.earlier_looks == 7  # at the beginning, and after each epoch


@pytest.mark.parametrize(
    ("wanted", "tuning", "epochs"),
    [(None, Tuning(), 8), (91.6, Tuning(), 8), (91.6, Tuning(scheduler="linear"), 6)],
)
def test_a_rate_that_may_drop_late_is_waited_for(
    tmp_path: Path, wanted: float | None, tuning: Tuning, epochs: int
) -> None:
    config = {"scheduler": {"name": "StepLR", "step_size": 6}}
    fit = recovery(FLAT, config).fit
    told = fit(make_model(), 8, tmp_path, is_final=False, wanted=wanted, tuning=tuning)
    assert told.epochs == epochs


def test_the_curve_has_every_evaluation_and_the_loss_of_every_epoch(tmp_path: Path) -> None:
    values = [10.0, float("nan"), 30.0]  # what is no number could not be kept as JSON
    told = recovery(values).fit(make_model(), 2, tmp_path, is_final=False)
    first, second, third = told.curve
    assert first == {"epoch": 0.0, "metric": 10.0}, "before any training"
    assert (second["epoch"], third["epoch"], third["metric"]) == (1, 2, 30.0)
    assert "metric" not in second
    assert 0 < third["loss"] < second["loss"]
    again = recovery([]).fit(make_model(), 2, tmp_path, is_final=False)
    assert again.curve == told.curve, "it was killed before anybody took note"


class Exploding(LinesTask):
    """A loss whose first gradients are far too large for the rate."""

    def loss(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        return {"loss": 1e12 * super().loss(model, batch)["loss"] ** 4}


def test_a_fit_that_diverges_begins_again_with_its_gradients_clipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the weights that it was given; killed in between, too."""

    def fit(folder: Path, **config: Any) -> tuple[list[float], dict[str, Tensor]]:
        model = make_model()
        fitting = recovery(fine_tuner={"distillation": False, **config}, task=Exploding())
        told = fitting.fit(model, 2, folder, is_final=False)
        return [point["loss"] for point in told.curve if "loss" in point], weights_of(model)

    losses, weights = fit(tmp_path / "clipped", gradient_clip_norm=1.0)
    assert not caplog.records
    assert losses[1] < losses[0]
    for said in ("The fit begins again, with gradients clipped", ""):
        calm = fit(tmp_path / "calm")
        assert calm[0] == losses
        assert are_equal(calm[1], weights)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text), "the second goes on with what is clipped"
        caplog.clear()
    with pytest.raises(DivergedError):
        fit(tmp_path / "given", gradient_clip_norm=1e12)


def test_early_stopping_is_told_too(tmp_path: Path) -> None:
    config = {"early_stopping_patience": 2}
    told = recovery([5.0, 6.0, 4.0, 4.0], config).fit(make_model(), 8, tmp_path, is_final=False)
    assert told[:2] == (
        3,
        "stopped after 3 of 8 epochs: accuracy has not passed 6 in 2 evaluations",
    )


class Loop:
    """A training loop of the user's own."""

    def train(self, model: nn.Module, **options: Any) -> nn.Module:
        trained = copy.deepcopy(model)
        with torch.no_grad():
            next(trained.parameters()).add_(float(options["epochs"]))
        return trained


def test_a_loop_of_the_user_s_own_trains_as_it_does(tmp_path: Path) -> None:
    model = make_model()
    told = recovery([], loop=Loop()).fit(
        model, 3, tmp_path, is_final=False, tuning=Tuning(lr_factor=0.1), wanted=1e9
    )
    assert told == Recovered(3, "")
    change = next(model.parameters()) - next(make_model().parameters())
    torch.testing.assert_close(change, torch.full_like(change, 3.0))


class NoisyLoop:
    """Adds noise of the global generators."""

    def train(self, model: nn.Module, **_: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) + random.random() + np.random.rand()


def test_a_loop_of_the_user_s_own_draws_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    """A run that goes on trains its variants after fewer others than one in a single process."""

    def trained(variant: str) -> dict[str, Tensor]:
        model = make_model()
        folder = tmp_path / variant / "fit"
        recovery([], loop=NoisyLoop()).fit(model, 1, folder, is_final=False)
        return weights_of(model)

    before = torch.get_rng_state()
    first = trained("a1")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert are_equal(trained("a1"), first)
    assert not are_equal(trained("b2"), first)


@pytest.mark.parametrize(
    ("processes", "splits", "batches", "seconds"),
    [(1, True, 21, 21.0), (8, False, 21, 4.0), (8, False, 41, 5.0), (1, True, 3, 4.0)],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_seconds_of_an_epoch_are_of_its_rounds(
    processes: int,
    splits: bool,
    batches: int,
    seconds: float,
    is_list: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Eight processes could not each take one of the four batches that were timed, and what was
    # timed counted for all batches of the loader, of which each process takes every eighth.
    context = OneOf(0, processes, splits)
    for module in ("frameworks.recovery", "training.trainer"):
        monkeypatch.setattr(f"compressor.{module}.current_context", lambda: context)
    times = iter([0.0, 4.0])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("compressor.frameworks.recovery.time", clock)
    loader = DataLoader(make_dataset(2 * batches), batch_size=2)
    made = recovery(data=list(loader) if is_list else loader)
    assert made.epoch_seconds(make_model()) == seconds
