from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau, StepLR

from compressor.errors import ConfigError, ModelError
from compressor.interfaces.optimizers import (
    AdjustedOptimizerFactory,
    DefaultTorchNativeSchedulerFactory,
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    SchedulerConfig,
    check_optimizer,
    check_scheduler,
    make_optimizer,
    make_scheduler,
)


class AdamFactory(NativeOptimizerFactory):
    def make(self, native_model: nn.Module) -> Optimizer:
        return Adam(native_model.parameters(), lr=1e-4, betas=(0.9, 0.9))


class PlateauFactory(NativeSchedulerFactory):
    def make(self, native_optimizer: Optimizer) -> LRScheduler:
        return ReduceLROnPlateau(native_optimizer, mode="max", patience=0, factor=0.1)


def make_sgd() -> Optimizer:
    return SGD(nn.Linear(1, 1).parameters(), lr=1.0)


def test_a_name_and_its_arguments() -> None:
    optimizer = make_optimizer({"name": "SGD", "lr": 0.3, "momentum": 0.5}, nn.Linear(1, 1), 9)
    assert isinstance(optimizer, SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.3, 0.5)


def test_the_default_learning_rate_is_for_the_default_optimizer() -> None:
    for spec, lr in ((None, 9), ({"momentum": 0.1}, 9), ({"lr": 2}, 2), ({"name": "SGD"}, 1e-3)):
        optimizer = make_optimizer(spec, nn.Linear(1, 1), default_lr=9)
        assert isinstance(optimizer, SGD)
        assert optimizer.defaults["lr"] == lr
    assert make_optimizer(None, nn.Linear(1, 1), default_lr=9).defaults["momentum"] == 0.9


def test_a_factory_makes_its_own() -> None:
    assert make_optimizer(AdamFactory(), nn.Linear(1, 1), 9).defaults["lr"] == 1e-4


def test_frozen_parameters_are_not_optimized() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = make_optimizer(None, model, 0.1).param_groups
    assert [parameter is model.weight for parameter in group["params"]] == [True]
    with pytest.raises(ModelError, match="No parameter of the model requires grad"):
        make_optimizer(None, model.requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "Adm"}, "no optimizer 'Adm'. Did you mean 'Adam'"),
        ({"name": "Optimizer"}, "no optimizer 'Optimizer'"),
        ({"name": "SGD", "lrr": 1}, "SGD takes no 'lrr'. Did you mean 'lr'"),
        ({"lrr": 1}, "SGD takes no 'lrr'"),
        ({"name": "SGD", "params": []}, "SGD takes no 'params'"),
        ({"name": "SGD", "lr": -1}, "SGD refuses {'lr': -1}: Invalid learning rate"),
    ],
)
def test_an_optimizer_that_torch_does_not_have_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(spec, nn.Linear(1, 1), 0.1)


def test_the_case_and_the_module_of_a_name_do_not_matter() -> None:
    assert check_optimizer({"name": "adamw"}) == {"name": "AdamW"}
    assert check_optimizer({"name": "torch.optim.AdamW"}) == {"name": "AdamW"}
    assert check_scheduler({"name": "cosineannealinglr", "T_max": 3})["name"] == "CosineAnnealingLR"


def test_options_are_put_into_what_a_factory_makes() -> None:
    optimizer = AdjustedOptimizerFactory(AdamFactory(), {"lr": 0.5}).make(nn.Linear(1, 1))
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigError, match="Adam has no option 'momentum'"):
        AdjustedOptimizerFactory(AdamFactory(), {"momentum": 0.5}).make(nn.Linear(1, 1))


def test_a_factory_that_makes_something_else_is_refused() -> None:
    class Wrong(NativeOptimizerFactory, NativeSchedulerFactory):
        def make(self, native_model: Any) -> Any:
            return "SGD"

    with pytest.raises(ConfigError, match=r"Wrong.make returned a str. Return a torch.optim.Opt"):
        make_optimizer(Wrong(), nn.Linear(1, 1), 0.1)
    with pytest.raises(ConfigError, match=r"Wrong.make returned a str. Return a scheduler"):
        make_scheduler(Wrong(), make_sgd())


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "StepLR", "step_size": 1, "gamma": 0.5},
        SchedulerConfig({"name": "StepLR", "step_size": 1, "gamma": 0.5}),
        DefaultTorchNativeSchedulerFactory("StepLR", step_size=1, gamma=0.5),
    ],
)
def test_a_scheduler_steps_after_every_epoch_unless_said(spec: Any) -> None:
    optimizer = make_sgd()
    schedule = make_scheduler(spec, optimizer)
    assert schedule is not None
    assert isinstance(schedule.scheduler, StepLR)
    assert schedule.interval == "epoch"
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_no_scheduler_is_none() -> None:
    assert make_scheduler(None, make_sgd()) is None


def test_the_interval_is_kept() -> None:
    schedule = make_scheduler(
        SchedulerConfig({"name": "ExponentialLR", "gamma": 0.5}, "iteration"), make_sgd()
    )
    assert schedule is not None
    assert isinstance(schedule.scheduler, ExponentialLR)
    assert schedule.interval == "iteration"


@pytest.mark.parametrize("spec", [PlateauFactory(), {"name": "ReduceLROnPlateau", "patience": 0}])
def test_a_scheduler_of_the_metric_steps_after_evaluation_with_it(spec: Any) -> None:
    optimizer = make_sgd()
    schedule = make_scheduler(spec, optimizer)
    assert schedule is not None
    assert schedule.interval == "eval"
    for metric in (1.0, 1.0):
        schedule.step(metric)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="needs a metric"):
        schedule.step()
    with pytest.raises(ConfigError, match="cannot step per epoch"):
        make_scheduler(SchedulerConfig(spec, "epoch"), optimizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"step_size": 1}, "has no 'name'"),
        ({"name": "StpLR"}, "no scheduler 'StpLR'. Did you mean 'StepLR'"),
        ({"name": "StepLR", "stepsize": 1}, "StepLR takes no 'stepsize'. Did you mean 'step_size'"),
        ({"name": "StepLR"}, "StepLR refuses {}: .*missing .*'step_size'"),
    ],
)
def test_a_scheduler_that_torch_does_not_have_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(spec, make_sgd())


def test_every_optimizer_of_torch_can_be_named() -> None:
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            assert check_optimizer({"name": name, "lr": 1}) == {"name": name, "lr": 1}
