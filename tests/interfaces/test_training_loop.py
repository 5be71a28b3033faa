from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from torch import nn

from compressor.errors import ConfigError
from compressor.interfaces.training_loop import ExternalTrainingLoop

MODEL = nn.Linear(1, 1)
Seen = list[dict[str, Any]]


def make_loop(cls: type[ExternalTrainingLoop], args: Any, seen: Seen) -> ExternalTrainingLoop:
    def train(model: nn.Module, args: Any) -> nn.Module:
        seen.append(dict(args) if isinstance(args, dict) else dict(vars(args)))
        return model

    return cls(train, args)


class Finetuning(ExternalTrainingLoop):
    def modify_args_for_finetuning(self, args: Any) -> Any:
        args = self._modify_args(args, "epochs", 2)
        return self._modify_args(args, "lr", 0.01)


@pytest.mark.parametrize("kind", [Namespace, dict])
def test_the_function_sees_changed_arguments_and_the_users_stay(kind: Any) -> None:
    seen: Seen = []
    args = kind(epochs=50, validation=True, lr=0.1)
    loop = make_loop(ExternalTrainingLoop, args, seen)
    assert loop.train(MODEL, epochs=3, validation=False) is MODEL
    assert loop.train(MODEL) is MODEL
    assert seen == [
        {"epochs": 3, "validation": False, "lr": 0.1},
        {"epochs": 50, "validation": True, "lr": 0.1},
    ]
    assert args == kind(epochs=50, validation=True, lr=0.1)


def test_fine_tuning_wins_over_epochs() -> None:
    seen: Seen = []
    loop = make_loop(Finetuning, Namespace(epochs=50, validation=True, lr=0.1), seen)
    assert loop.can_finetune
    loop.train(MODEL, epochs=9, finetuning=True)
    assert seen == [{"epochs": 2, "validation": True, "lr": 0.01}]


def test_fine_tuning_without_its_own_arguments_is_epochs() -> None:
    seen: Seen = []
    args = {"epochs": 50, "validation": True}
    loop = make_loop(ExternalTrainingLoop, args, seen)
    assert not loop.can_finetune
    loop.train(MODEL, epochs=1, finetuning=True)
    assert seen == [{"epochs": 1, "validation": True}]
    with pytest.raises(NotImplementedError):
        loop.modify_args_for_finetuning(args)


def test_an_argument_that_is_not_there_is_named() -> None:
    loop = make_loop(ExternalTrainingLoop, Namespace(num_epochs=50, validation=True), [])
    with pytest.raises(
        ConfigError, match=r"no 'epochs'. Add it, or override modify_args_for_epochs"
    ):
        loop.train(MODEL, epochs=1)


def test_the_function_must_return_the_model() -> None:
    loop = ExternalTrainingLoop(lambda model, args: None, {"validation": True})  # type: ignore
    with pytest.raises(ConfigError, match=r"returned a NoneType. Return the trained model"):
        loop.train(MODEL)
