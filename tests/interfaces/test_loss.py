from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import LossError
from compressor.interfaces.device import Device
from compressor.interfaces.loss import LossFunction, call_loss, make_loss

MODEL = nn.Linear(3, 2)
BATCH = (torch.ones(4, 3), torch.zeros(4, dtype=torch.long))


class Forgetful(LossFunction):
    """Does not call `super().__init__()`."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        out = model(batch[0])
        return {"ce": self.weight * nn.functional.cross_entropy(out, batch[1]), "l2": out.norm()}


def test_a_dict_is_kept_by_name() -> None:
    terms = call_loss(Forgetful(), MODEL, BATCH)
    assert terms.keys() == {"ce", "l2"}
    assert all(term.shape == () and term.requires_grad for term in terms.values())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_with_one_element_is_the_loss(shape: tuple[int, ...]) -> None:
    terms = call_loss(lambda model, batch: torch.full(shape, 0.5), MODEL, BATCH)
    assert terms == {"loss": torch.tensor(0.5)}
    assert terms["loss"].shape == ()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(4), r"'loss' has shape \(4,\). Return one number"),
        ({"a": torch.zeros(()), "b": torch.zeros(2)}, r"'b' has shape \(2,\)"),
        (0.5, "'loss' is a float. Return a tensor"),
        (None, "'loss' is a NoneType"),
        ({}, "an empty dict"),
    ],
)
def test_what_is_no_scalar_is_refused(returned: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        call_loss(lambda model, batch: returned, MODEL, BATCH)


def test_the_engine_makes_the_loss_and_tells_it_the_device() -> None:
    loss = make_loss(Forgetful, {"weight": 2.0}, Device.GPU)
    assert isinstance(loss, Forgetful)
    assert loss.weight == 2.0
    assert loss.device is Device.GPU


def test_a_loss_that_was_never_told_is_on_the_cpu() -> None:
    assert Forgetful().device is Device.CPU


def test_a_function_is_its_own_loss() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum()

    assert make_loss(loss, None, Device.CPU) is loss
    with pytest.raises(LossError, match="a loss that is no class"):
        make_loss(loss, {"weight": 1}, Device.CPU)


def test_kwargs_that_the_class_does_not_take_are_refused() -> None:
    with pytest.raises(LossError, match=r"Forgetful cannot be made .* 'wight'"):
        make_loss(Forgetful, {"wight": 1}, Device.CPU)


@pytest.mark.parametrize("cls", [nn.CrossEntropyLoss, object])
def test_a_class_that_is_not_called_with_model_and_batch_is_refused(cls: Any) -> None:
    with pytest.raises(LossError, match=r"is not called with \(model, batch\)"):
        make_loss(cls, {}, Device.CPU)
