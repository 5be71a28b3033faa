from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError, MetricError
from compressor.training.recipes import (
    EpochMetricAvg,
    LRByFraction,
    LRSched,
    Optimizer,
    Polyak,
    Recipe,
    recipe,
)
from tests.training.helpers import are_equal, make_loader, make_model, weights_of
from tests.training.recipes.helpers import After, make_step


def make(model: nn.Module, *callbacks: Any) -> Recipe:
    loop = recipe(make_step(model), make_loader())
    loop.callbacks.add_callbacks(callbacks)
    return loop


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def gradients_of(model: nn.Module, batch: Any) -> list[torch.Tensor]:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_accumulated_gradients_are_averaged_with_a_rest_at_the_end_of_the_epoch() -> None:
    model, by_hand = make_model(), make_model()
    make(model, Optimizer(sgd(model), accumulation=3)).run(2)
    opt = sgd(by_hand)
    for _ in range(2):
        batches = list(make_loader())
        for part in (batches[:3], batches[3:]):
            sums = [torch.zeros_like(p) for p in by_hand.parameters()]
            for batch in part:
                for total, gradient in zip(sums, gradients_of(by_hand, batch), strict=True):
                    total += gradient
            for parameter, total in zip(by_hand.parameters(), sums, strict=True):
                parameter.grad = total / len(part)
            opt.step()
    for name, value in weights_of(by_hand).items():
        torch.testing.assert_close(weights_of(model)[name], value)


def test_gradients_are_clipped_as_torch_does() -> None:
    model, by_hand = make_model(), make_model()
    make(model, Optimizer(sgd(model), clip_norm=0.05)).run(1)
    opt = sgd(by_hand)
    for x, y in make_loader():
        opt.zero_grad()
        nn.functional.cross_entropy(by_hand(x), y).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
        opt.step()
    assert are_equal(weights_of(model), weights_of(by_hand))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_rate_and_momentum_are_posted_on_demand(kind: str) -> None:
    model = make_model()
    opt = sgd(model) if kind == "SGD" else torch.optim.Adam(model.parameters(), lr=0.1)
    state = make(model, Optimizer(opt, log_lr=True, log_momentum=True)).run(1)
    assert state["metrics"] == {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("options", [{"accumulation": 0}, {"clip_norm": 0.0}])
def test_an_optimizer_that_could_not_step_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"accumulation=0|clip_norm=0\.0"):
        Optimizer(sgd(make_model()), **options)


@pytest.mark.parametrize(
    ("interval", "accumulation", "steps"), [("step", 1, 8), ("step", 3, 4), ("epoch", 1, 2)]
)
def test_a_scheduler_steps_with_the_optimizer_or_the_epoch(
    interval: Any, accumulation: int, steps: int
) -> None:
    model = make_model()
    opt = sgd(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    make(model, Optimizer(opt, accumulation), LRSched(scheduler, interval)).run(2)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**steps)


def test_plateau_listens_to_a_metric() -> None:
    model = make_model()
    opt = sgd(model, lr=0.0)  # so that the loss stays as it is
    opt.param_groups[0]["lr"] = 1e-30
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, eps=0)
    make(model.eval(), Optimizer(opt), EpochMetricAvg("loss"), LRSched(plateau, metric="loss")).run(
        3
    )
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-30 * 0.25)


def test_plateau_without_its_metric_is_an_error() -> None:
    model = make_model()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd(model))
    with pytest.raises(ConfigError, match="Give its name"):
        LRSched(plateau)
    with pytest.raises(MetricError, match="no metric 'loss'"):
        make(model, LRSched(plateau, metric="loss")).run(1)


def test_an_unknown_interval_is_refused() -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(sgd(make_model()), 0.5)
    with pytest.raises(ConfigError, match="interval='batch' is none"):
        LRSched(scheduler, "batch")  # type: ignore[arg-type]


def test_the_rate_follows_the_fraction_of_the_run() -> None:
    model, rates = make_model(), []
    opt = sgd(model)
    note = After(lambda state: rates.append(opt.param_groups[0]["lr"]))
    loop = make(model, LRByFraction(opt, lambda fraction: 1 - fraction), Optimizer(opt), note)
    loop.run(2)
    assert rates == pytest.approx([0.1 * (1 - batch / 8) for batch in range(8)])


def test_moving_takes_the_state_of_the_optimizer_along() -> None:
    model = make_model()
    opt = sgd(model)
    loop = make(model, Optimizer(opt))
    loop.register("model", model)
    loop.run(1)
    before = copy.deepcopy(opt.state_dict())
    loop.to("cpu")
    after = opt.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], state["momentum_buffer"])
    loop.run(2)
    straight = make_model()
    make(straight, Optimizer(sgd(straight))).run(2)
    assert are_equal(weights_of(model), weights_of(straight))


def test_polyak_is_the_exponential_average_of_weights_and_statistics() -> None:
    model = make_model()
    average, expected = copy.deepcopy(model), weights_of(model)

    def follow(state: dict[str, Any]) -> None:
        for name, value in weights_of(model).items():
            is_float = value.is_floating_point()
            expected[name] = 0.75 * expected[name] + 0.25 * value if is_float else value

    make(model, Optimizer(sgd(model)), Polyak(model, average, 0.75), After(follow)).run(2)
    for name, value in weights_of(average).items():
        torch.testing.assert_close(value, expected[name])


def test_polyak_needs_a_copy() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="no copy of the model"):
        Polyak(model, model)
    with pytest.raises(ConfigError, match="no copy of the model"):
        Polyak(model, nn.Linear(2, 2))
