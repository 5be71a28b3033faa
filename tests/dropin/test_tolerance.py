"""What users' classes leave out, or do in a way of their own, and is understood all the same."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.config import Config
from compressor.errors import ConfigError, MetricError
from compressor.frameworks.checks import answers_alike
from compressor.interfaces import (
    Device,
    ExternalTrainingLoop,
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    Task,
    TorchForwardPass,
    evaluate,
    make_optimizer,
    make_scheduler,
)
from compressor.testing.models import TinyMLP, TinyResNet
from compressor.training import Trainer

INPUTS = torch.zeros(4, 8)


class PlainOptimizerFactory:
    """Of no class of ours."""

    def make(self, native_model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(native_model.parameters(), lr=0.125)


class PlainSchedulerFactory:
    def make(self, native_optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(native_optimizer, gamma=0.5)


@pytest.mark.parametrize("as_class", [True, False])
def test_a_factory_is_what_has_a_make(as_class: bool) -> None:
    makers = (PlainOptimizerFactory, PlainSchedulerFactory)
    optimizer_maker, scheduler_maker = makers if as_class else (make() for make in makers)
    scheduler = {"factory": scheduler_maker, "triggers": {"after_epoch": True}}
    full = {"optimizer": optimizer_maker, "scheduler": scheduler}
    small = {"loop_params": {"optimizer": {"lr": 0.5}}}
    config = Config.from_dict({"full_trainer": full, "fine_tuner": small})
    optimizer = make_optimizer(config.full_trainer.optimizer, TinyMLP(), default_lr=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.125
    schedule = make_scheduler(config.full_trainer.scheduler, optimizer)
    assert schedule is not None
    assert schedule.interval == "epoch"
    assert isinstance(schedule.scheduler, torch.optim.lr_scheduler.ExponentialLR)
    fine = make_optimizer(config.fine_tuner.optimizer, TinyMLP(), default_lr=1.0)
    assert fine.param_groups[0]["lr"] == 0.5


def test_the_trainer_takes_such_factories() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    batches = [(torch.zeros(2, 8), torch.tensor([0, 1]))]
    maker: Any = PlainOptimizerFactory()
    model = TinyMLP(8)
    trainer = Trainer(
        model, loss, train_dataloader=batches, optimizers=maker, max_duration="1ep", device="cpu"
    )
    trainer.fit()
    assert trainer.state.clock.batch == 1


def test_what_has_no_make_is_no_factory() -> None:
    assert not isinstance(TinyMLP(), NativeOptimizerFactory)
    assert not isinstance(object(), NativeSchedulerFactory)
    assert isinstance(PlainOptimizerFactory(), NativeOptimizerFactory)
    with pytest.raises(ConfigError, match="without a make method"):
        Config.from_dict({"full_trainer": {"optimizer": object()}})


class SilentLoop(ExternalTrainingLoop):
    """Changes its arguments and returns nothing."""

    def modify_args_for_validation(self, args: Any, validation: bool) -> Any:
        args.noval = not validation

    def modify_args_for_epochs(self, args: Any, epochs: int) -> Any:
        args.num_epochs = epochs

    def modify_args_for_finetuning(self, args: Any) -> Any:
        args.num_epochs = 1


@pytest.mark.parametrize(("finetuning", "epochs"), [(False, 3), (True, 1)])
def test_a_loop_may_change_its_arguments_in_place(finetuning: bool, epochs: int) -> None:
    seen: list[Namespace] = []

    def train(model: nn.Module, args: Namespace) -> nn.Module:
        seen.append(args)
        return model

    given = Namespace(num_epochs=50, noval=False)
    loop = SilentLoop(train, given)
    loop.train(TinyMLP(), epochs=3, validation=False, finetuning=finetuning)
    assert seen == [Namespace(num_epochs=epochs, noval=True)]
    assert given == Namespace(num_epochs=50, noval=False)


@pytest.mark.parametrize("key", ["mAP", "map", "mIoU", "miou"])
def test_the_usual_metric_counts_where_no_key_is_given(key: str) -> None:
    def eval_func(model: nn.Module, data_splits: Any, device: Any = None) -> dict[str, float]:
        return {"recall": 0.5, key: 0.25, "loss": float("nan")}

    metrics = evaluate(eval_func, TinyMLP(8), [INPUTS], Device.CPU, key=None)
    assert list(metrics.items()) == [(key, 0.25), ("recall", 0.5)], "it is the first"


def test_two_metrics_without_a_key_are_refused() -> None:
    def eval_func(model: nn.Module, data_splits: Any) -> dict[str, float]:
        return {"mAP": 0.5, "mIoU": 0.25}

    with pytest.raises(MetricError, match="no eval_key says which counts"):
        evaluate(eval_func, TinyMLP(8), [INPUTS], Device.CPU, key=None)


class Raw(TinyMLP):
    """Returns a list in training and a tuple in evaluation."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return [scores] if self.training else (scores.softmax(1).max(1).values, [scores])


class WantsTargets(TinyMLP):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets are missing")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "is_alike"),
    [
        (TinyMLP(8), True),
        (TinyResNet(), True),
        (nn.Sequential(TinyMLP(8), nn.Dropout(0.5)), True),
        (Raw(8), False),
        (WantsTargets(8), False),
    ],
)
def test_outputs_of_another_form_in_training_are_noticed(model: nn.Module, is_alike: bool) -> None:
    inputs = torch.zeros(4, 1, 8, 8) if isinstance(model, TinyResNet) else INPUTS
    task = Task(TorchForwardPass(), lambda *_: torch.zeros(()), lambda *_: {}, None)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    answer = answers_alike(task, model, (inputs, inputs), torch.device("cpu"), seed=0)
    assert answer is is_alike
    assert not model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(state)
