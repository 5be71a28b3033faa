"""A job that cannot work is refused when it is opened, with what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import Accuracy, TorchForwardPass, TorchFramework
from compressor.config import Config
from compressor.errors import ConfigError, LossError, MetricError, ModelError
from compressor.frameworks.base import Job
from compressor.progress import Progress
from compressor.testing.models import TinyMLP

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
DICTS = [{"x": X, "y": torch.zeros(8, dtype=torch.long)}]
PAIRS = [(X, torch.zeros(8, dtype=torch.long))]


class Inputs(TorchForwardPass):
    """Of dict batches."""

    def extract_model_inputs(self, batch: Any) -> Any:
        return batch["x"]


class TwoBranch(nn.Module):
    """Called with more than the first of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.layer(left) + self.layer(right)
        return out


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def check(folder: Path, batches: Any, **given: Any) -> None:
    config = Config.from_dict({"device": "CPU", "target": {"runtime": "eager"}})
    splits = {"train": batches, "test": batches}
    given = {"model": TinyMLP(64, 16), **given}
    job = Job(data=splits, config=config, **given)
    TorchFramework().open(job, folder, Progress(enabled=False)).check()


def test_a_default_evaluation_that_does_not_suit_is_not_the_users_fault(tmp_path: Path) -> None:
    """The user was told to write a TorchForwardPass, which was there."""
    with pytest.raises(MetricError, match=r"^No eval_func was given, and the default") as error:
        check(tmp_path, DICTS, forward_pass=Inputs(), loss_function_cls=loss)
    assert "split 'test', a dict with the keys ['x', 'y']. Give an eval_func" in str(error.value)
    assert "TorchForwardPass" not in str(error.value)
    check(
        tmp_path,
        DICTS,
        forward_pass=Inputs(),
        loss_function_cls=loss,
        eval_func=Accuracy(forward_pass=Inputs(), label="y"),
    )


def test_a_default_loss_that_does_not_suit_is_not_the_users_fault(tmp_path: Path) -> None:
    """It was: the loss function raised KeyError."""
    evaluation = Accuracy(forward_pass=Inputs(), label="y")
    with pytest.raises(LossError, match=r"^No loss_function_cls was given, .*KeyError: 0") as error:
        check(tmp_path, DICTS, forward_pass=Inputs(), eval_func=evaluation)
    assert "a dict with the keys ['x', 'y']" in str(error.value)


def test_defaults_want_a_model_of_one_input(tmp_path: Path) -> None:
    job: Any = {"model": TwoBranch(), "forward_pass": TorchForwardPass((0, 1, "_"))}
    batches = [(X, X, PAIRS[0][1])]
    with pytest.raises(MetricError, match=r"^No eval_func was given, .*, a tuple of 3\. Give"):
        check(tmp_path, batches, **job)
    with pytest.raises(LossError, match=r"^No loss_function_cls was given, .*missing 1 required"):
        check(tmp_path, batches, **job, eval_func=lambda model, loader: {"accuracy": 50.0})


def test_defaults_take_pairs_of_inputs_and_labels(tmp_path: Path) -> None:
    check(tmp_path, PAIRS)


def test_a_loss_of_the_users_own_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"^The loss function raised"):
        check(tmp_path, PAIRS, loss_function_cls=loss)


def test_classes_in_place_of_instances_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`model` is the class TwoBranch .* model=TwoBranch\("):
        check(tmp_path, PAIRS, model=TwoBranch)
    with pytest.raises(ConfigError, match=r"`forward_pass` is the class Inputs itself"):
        check(tmp_path, DICTS, forward_pass=Inputs)
    with pytest.raises(ModelError, match=r"`model` is of type dict, not a torch\.nn\.Module"):
        check(tmp_path, PAIRS, model=dict(TinyMLP().state_dict()))
